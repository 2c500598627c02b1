"""The declared versions of the code, and what rests on them: the identity of a run, and the code a result records."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from afm_pipe.params import Params, Run
from afm_pipe.params.sizes import SIZES
from afm_pipe.params.yaml import load_yaml
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import read_json, write_json
from afm_pipe.runtime.identity import fingerprint, source_digest

SHOWN = 5  # names in a notice, of each kind
FILE = Path(__file__).with_name("versions.yaml")

Part = Literal["data", "autoencoder", "objective", "sampling", "evaluation", "tables"]

# The parts of the code that shape the numbers of each stage: dvc.yaml lists the same.
PARTS: Mapping[str, tuple[Part, ...]] = {
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

# The packages that hold the source of each part.
ROOMS: Mapping[Part, tuple[str, ...]] = {
    "data": ("data",),
    "autoencoder": ("autoencoders",),
    "objective": ("models", "objectives", "training"),
    "sampling": ("models", "sampling"),
    "evaluation": ("evaluation",),
    "tables": ("study",),
}


@cache
def declared() -> dict[str, int]:
    """Return every declared version."""
    return load_yaml(FILE.read_text(encoding="utf-8"))["versions"]


def versions(stage: str) -> dict[str, int]:
    """Return the declared versions of the parts of the code that a stage depends on."""
    return {part: declared()[part] for part in PARTS[stage]}


def origin_files(params: Params, name: str) -> dict[str, Path]:
    """Return what a run starts from, is guided by and is chosen by, if anything, by name."""
    files = {}
    if name in params.guided:
        guided = params.guided[name]
        base, reload = paths.model(guided.base), guided.reload_discriminator
        d = "discriminator" if not isinstance(reload, float | int) else paths.kept_discriminator(reload)
        files = {"generator": base / "generator.safetensors", "discriminator": base / f"{d}.safetensors"}
    if params.models[name].guided:
        files["classifier"] = paths.CLASSIFIER / "classifier.safetensors"
    if params.models[name].selection is not None:
        files["reference"] = paths.REFERENCE / "summary.json"
    return files


def run_identity(run: Run, latent_shape: tuple[int, ...], latents: str, origins: Mapping[str, str]) -> str:
    """Return the fingerprint of a run: its params, the latents' own, and the hashes of what it starts from."""
    settings = {"run": run.model_dump(mode="json"), "size": SIZES[run.size], "latent_shape": latent_shape}
    measured = {} if run.selection is None else versions("evaluate")  # what the selection measures with
    return fingerprint(settings, {"latents": latents, **origins}, versions("train") | measured)


def code(stage: str) -> dict[str, str]:
    """Return what a result of a stage records: for each part of the code its version and a digest of its source."""
    return {part: f"v{declared()[part]} {source_digest(*ROOMS[part])}" for part in PARTS[stage]}


def begun_with(folder: Path, stage: str) -> dict[str, str]:
    """Return the code that the work in a folder was begun with; in a new folder that is today's, and is recorded."""
    path = folder / "code.json"
    if not path.is_file():
        write_json(path, code(stage))
    return read_json(path)


def code_notice(recorded: Iterable[tuple[str, Any]]) -> str | None:
    """Return one line on the results, by name, made by other source than today's under an equal version, if any.

    Results that record no code are named last: what version 0.1 made.
    """
    today = code("table")
    changed: dict[str, list[str]] = {}
    unknown = []
    for name, codes in recorded:
        known = {part: was for part, was in codes.items() if _is_code(was)} if isinstance(codes, dict) else {}
        for part, was in known.items():
            now = today.get(part, "")
            if was != now and was.split()[0] == now.partition(" ")[0]:
                changed.setdefault(f"{part} {was.split()[1]}, now {now.split()[1]}", []).append(name)
        if not known:
            unknown.append(name)
    lines = []
    if changed:
        listed = "; ".join(f"{_names(names)} ({what})" for what, names in sorted(changed.items()))
        lines.append(
            f"Made by other source code than today's under an equal version: {listed}. If it changes numbers, raise "
            "the version in afm_pipe/params/versions.yaml."
        )
    if unknown:
        lines.append(f"Made by code that was not recorded: {_names(unknown)}.")
    return " ".join(lines) or None


def _is_code(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"v\d{1,9} [0-9a-f]{8}", text) is not None


def _names(names: list[str]) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - SHOWN} more" if len(distinct) > SHOWN else ""
    return ", ".join(distinct[:SHOWN]) + more
