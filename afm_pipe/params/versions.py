"""The declared versions of the code, and what depends on them: identities of runs, and the code that results record."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from afm_pipe.params import Params, Run
from afm_pipe.params.objectives import WITHOUT_DISCRIMINATOR
from afm_pipe.params.sizes import SIZES
from afm_pipe.params.yaml import load_yaml
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import atomic_path, read_json, write_json
from afm_pipe.runtime.identity import fingerprint, source_digest

SHOWN = 5  # names per kind of notice
FILE = Path(__file__).with_name("versions.yaml")
STUDY_HEADER = "# The versions of the code of the installed afm-pipe. Its commands keep them up to date: do not edit."

Part = Literal["data", "autoencoder", "objective", "sampling", "evaluation", "tables"]

# The parts of the code that affect the numbers of each stage, as in dvc.yaml.
PARTS: Mapping[str, tuple[Part, ...]] = {
    "prepare": ("data",),
    "autoencoder": ("data", "autoencoder"),
    "encode": ("data", "autoencoder"),
    "reference": ("data", "autoencoder", "sampling", "evaluation"),
    "pool": ("data", "autoencoder", "objective", "sampling", "evaluation", "tables"),
    "train": ("data", "objective"),
    "classifier": ("data", "objective"),
    "guide": ("data", "objective"),
    "sample": ("autoencoder", "sampling"),
    "evaluate": ("autoencoder", "sampling", "evaluation"),
    "table": ("data", "autoencoder", "objective", "sampling", "evaluation", "tables"),
    "toy": ("objective", "tables"),
}

# The packages with the source of each part.
PACKAGES: Mapping[Part, tuple[str, ...]] = {
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


def study_versions() -> str:
    """Return the text of versions.yaml, in which DVC finds the declared versions outside this checkout."""
    lines = "".join(f"  {part}: {version}\n" for part, version in declared().items())
    return f"{STUDY_HEADER}\nversions:\n{lines}"


def refresh_study_versions() -> bool:
    """Write the installed package's versions into the versions.yaml of a study, if it has others; return whether."""
    try:
        text = paths.VERSIONS.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    if not text.startswith(STUDY_HEADER) or text == study_versions():
        return False
    with atomic_path(paths.VERSIONS) as temp:
        temp.write_text(study_versions(), encoding="utf-8")
    return True


def versions(stage: str) -> dict[str, int]:
    """Return the declared versions of the parts of the code that a stage depends on."""
    return {part: declared()[part] for part in PARTS[stage]}


def origin_files(params: Params, name: str) -> dict[str, Path]:
    """Return the input files of a run besides latents, by role: weights to start from, classifier, reference."""
    files = {}
    if name in params.guided:
        guided = params.guided[name]
        base, reload = paths.model(guided.base), guided.reload_discriminator
        d = "discriminator" if not isinstance(reload, float | int) else paths.kept_discriminator(reload)
        files = {"generator": base / "generator.safetensors", "discriminator": base / f"{d}.safetensors"}
        if guided.base in params.imported or params.runs[guided.base].objective in WITHOUT_DISCRIMINATOR:
            del files["discriminator"]
    if params.model(name).guided:
        files["classifier"] = paths.CLASSIFIER / "classifier.safetensors"
    if params.model(name).selection is not None:
        files["reference"] = paths.REFERENCE / "summary.json"
    return files


def run_identity(run: Run, latent_shape: tuple[int, ...], latents: str, origins: Mapping[str, str]) -> str:
    """Return the identity of a run: a hash of its params, the latents' fingerprint and the hashes of its inputs."""
    unused = {"flow"} if run.velocity is None else set()
    settings = {
        "run": run.model_dump(mode="json", exclude=unused),
        "size": SIZES[run.size],
        "latent_shape": latent_shape,
    }
    measured = {} if run.selection is None else versions("evaluate")  # the selection measures distances
    return fingerprint(settings, {"latents": latents, **origins}, versions("train") | measured)


def code_record(stage: str) -> dict[str, str]:
    """Return the code that results of a stage record: by part, its version and a digest of its source."""
    return {part: f"v{declared()[part]} {source_digest(*PACKAGES[part])}" for part in PARTS[stage]}


def recorded_code(folder: Path, stage: str) -> dict[str, str]:
    """Return the code recorded when work in a folder began; record the current code in a new folder."""
    path = folder / "code.json"
    if not path.is_file():
        write_json(path, code_record(stage))
    return read_json(path)


def code_notice(recorded: Iterable[tuple[str, Any]]) -> str | None:
    """Return one line naming results made by different source code under the same version, or None.

    `recorded` is (name of a result, code it records). The line ends with results that record no code, such as those of
    version 0.1.
    """
    current = code_record("table")
    changed: dict[str, set[str]] = {}  # the parts that differ, by result
    unknown = []
    for name, codes in recorded:
        known = {part: was for part, was in codes.items() if _is_code(was)} if isinstance(codes, dict) else {}
        for part, was in known.items():
            now = current.get(part, "")
            if was != now and was.split()[0] == now.partition(" ")[0]:
                changed.setdefault(name, set()).add(part)
        if not known:
            unknown.append(name)
    lines = []
    if changed:
        alike: dict[str, list[str]] = {}
        for name, parts in changed.items():
            alike.setdefault(", ".join(sorted(parts)), []).append(name)
        listed = "; ".join(f"{_names(names)} ({parts})" for parts, names in alike.items())
        lines.append(
            f"Made by different source code under the same version: {listed}. If the change affects numbers, raise "
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
