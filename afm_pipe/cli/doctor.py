"""Look at the machine before work is begun on it: what is there, what is missing, what to do about it."""

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from afm_pipe.distributed.launch import Launch, load_launch, machine_name
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError

PACKAGES = ("torch", "torchvision", "diffusers", "dvc", "clean-fid", "h5py", "scipy", "safetensors")


class Finding(NamedTuple):
    """One line: what was looked at, what was found, whether that will do, and what to do if not."""

    what: str
    found: str
    ok: bool = True
    remedy: str = ""


def examine(params_path: Path) -> list[Finding]:
    """Return what was found, in the order a person would mend it in."""
    findings = [_python(), *map(_package, PACKAGES), _git(), _device()]
    try:
        params = load_params(params_path)
    except UserError as error:
        return [*findings, Finding("params", str(error), False, f"Mend {params_path}.")]
    findings.append(Finding("params", f"{params_path}, {len(params.runs)} runs"))
    return [*findings, _data(params), *_weights(params), _disk(params), *_memory(params)]


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", platform.python_version(), ok, "Install Python 3.11 or later.")


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed", False, 'Run `pip install -e ".[dev]"` in the project\'s root.')


def _git() -> Finding:
    found = shutil.which("git")
    return Finding("git", found or "not on PATH", found is not None, "Install git: DVC needs it.")


def _device() -> Finding:
    import torch

    try:
        launch = load_launch()
    except UserError as error:
        return Finding("launch settings", str(error), False, "Mend that setting, or leave it out.")
    try:
        device = launch.torch_device()
    except UserError as error:
        return Finding("device", str(error), False, "Set AFM_DEVICE to a device of this machine, or leave it out.")
    return Finding("device", f"{device}, {machine_name(device)}, {torch.get_num_threads()} threads")


def _data(params: Params) -> Finding:
    root = Path(params.data.root)
    if paths.MANIFEST.exists():
        return Finding("data", f"{paths.MANIFEST} lists the images of {root}")
    if params.data.source not in ("folder", "tar"):
        return Finding("data", f"{params.data.source}, which `dvc repro` writes to {root}")
    there = root.is_dir() if params.data.source == "folder" else root.is_file()
    remedy = f"Put your images into {root}, one folder per class or one archive of them, or set data.root."
    return Finding("data", f"{root} {'is there' if there else 'is missing'}", there, remedy)


def _weights(params: Params) -> list[Finding]:
    from afm_pipe.evaluation.adm import adm_path
    from afm_pipe.evaluation.features import inception_path
    from afm_pipe.evaluation.other_networks import dinov2_path

    findings = []
    if any(name.startswith("inception") for name in params.evaluate.features):
        try:
            findings.append(Finding("Inception", str(inception_path())))
        except UserError as error:
            findings.append(Finding("Inception", "missing or another", False, str(error)))
    if params.evaluate.adm_reference is not None:
        try:
            findings.append(Finding("ADM's statistics", str(adm_path(params.evaluate.adm_reference)[0])))
        except UserError as error:
            findings.append(Finding("ADM's statistics", "missing or another", False, str(error)))
    if "dinov2" in params.evaluate.features:
        try:
            findings.append(Finding("DINOv2", str(dinov2_path(params.evaluate.dinov2_sha256))))
        except UserError as error:
            findings.append(Finding("DINOv2", "missing or another", False, str(error)))
    pretrained = getattr(params.autoencoder, "pretrained", None)
    if pretrained is not None:
        place = "a local folder" if Path(pretrained).is_dir() else "no local folder, so a name on the hub"
        findings.append(Finding("autoencoder", f"{pretrained}, {place}"))
    return findings


def _disk(params: Params) -> Finding:
    """Compare the free disk with two checkpoints of each run; the latents check for their own room."""
    from afm_pipe.pipeline import run_budget

    needed = sum(2 * run_budget(params, name, Launch()).checkpoint_bytes for name in params.runs)
    free = shutil.disk_usage(".").free
    found = f"{free / 2**30:.0f} GiB free, about {needed / 2**30:.1f} needed for checkpoints"
    return Finding("disk", found, free > needed, "Make room, or train fewer runs at a time and remove their work/RUN.")


def _memory(params: Params) -> list[Finding]:
    from afm_pipe.pipeline import run_budget
    from afm_pipe.planning.budget import require_memory

    try:
        launch = load_launch()
        device = launch.torch_device()
    except UserError:
        return []  # the device's own line says so
    needs = {name: run_budget(params, name, launch) for name in params.runs}
    largest = max(needs, key=lambda name: needs[name].memory_bytes)
    try:
        require_memory(needs[largest], largest, device)
    except UserError as error:
        return [Finding("memory", f"too little for the run {largest}", False, str(error))]
    return [Finding("memory", f"enough for the largest run, {largest}: {needs[largest].memory_bytes / 2**30:.1f} GiB")]
