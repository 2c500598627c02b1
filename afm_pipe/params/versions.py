"""The declared versions of the code, and what rests on them: the identity of a run, and the code a result records."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from afm_pipe.params import Run
from afm_pipe.params.sizes import SIZES
from afm_pipe.runtime.identity import fingerprint

FILE = Path(__file__).with_name("versions.yaml")

Part = Literal["data", "autoencoder", "objective", "sampling", "evaluation", "tables"]
Stage = Literal[
    "prepare",
    "autoencoder",
    "encode",
    "reference",
    "train",
    "classifier",
    "guide",
    "sample",
    "evaluate",
    "table",
    "toy",
]

# The parts of the code that shape the numbers of each stage: dvc.yaml lists the same.
PARTS: Mapping[Stage, tuple[Part, ...]] = {
    "prepare": ("data",),
    "autoencoder": ("data", "autoencoder"),
    "encode": ("data", "autoencoder"),
    "reference": ("data", "autoencoder", "sampling", "evaluation"),
    "train": ("data", "objective"),
    "classifier": ("data", "objective"),
    "guide": ("data", "objective"),
    "sample": ("autoencoder", "sampling"),
    "evaluate": ("autoencoder", "sampling", "evaluation"),
    "table": ("data", "autoencoder", "objective", "sampling", "evaluation", "tables"),
    "toy": ("objective", "tables"),
}


@cache
def declared() -> dict[str, int]:
    """Return every declared version."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))["versions"]


def versions(stage: Stage) -> dict[str, int]:
    """Return the declared versions of the parts of the code that a stage depends on."""
    return {part: declared()[part] for part in PARTS[stage]}


def run_identity(run: Run, latent_shape: tuple[int, ...], latents: str, origins: Mapping[str, str]) -> str:
    """Return the fingerprint of a run: its params, the latents' own, and the hashes of what it starts from."""
    settings = {"run": run.model_dump(mode="json"), "size": SIZES[run.size], "latent_shape": latent_shape}
    return fingerprint(settings, {"latents": latents, **origins}, versions("train"))
