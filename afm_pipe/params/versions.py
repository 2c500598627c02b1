"""The declared versions of the code, and the identity of a run, which rests on them."""

from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from afm_pipe.params import Run
from afm_pipe.runtime.identity import fingerprint

FILE = Path(__file__).with_name("versions.yaml")

Part = Literal["data", "autoencoder", "objective", "sampling", "evaluation", "tables"]


@cache
def declared() -> dict[str, int]:
    """Return every declared version."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))["versions"]


def versions(*parts: Part) -> dict[str, int]:
    """Return the declared versions of some parts of the code."""
    return {part: declared()[part] for part in parts}


def run_identity(run: Run, latent_shape: tuple[int, ...], latents: str, origins: dict[str, str]) -> str:
    """Return the fingerprint of a run: its params, the latents' own, and the hashes of what it starts from."""
    settings = {"run": run.model_dump(mode="json"), "latent_shape": latent_shape}
    return fingerprint(settings, {"latents": latents, **origins}, versions("data", "objective"))
