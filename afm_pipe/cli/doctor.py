"""Check what a project needs: packages, device, data, weights, disk and memory."""

import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from afm_pipe.distributed.launch import Launch, load_launch, machine_name
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json
from afm_pipe.runtime.progress import finish

PACKAGES = ("torch", "torchvision", "diffusers", "dvc", "clean-fid", "h5py", "scipy", "safetensors")


class Finding(NamedTuple):
    """One line: what was checked, what was found, whether it is ok, and the remedy if not."""

    what: str
    found: str
    ok: bool = True
    remedy: str = ""


def examine(params_path: Path) -> list[Finding]:
    """Return the findings in the order to fix them."""
    device, launch = _device()
    findings = [_python(), *map(_package, PACKAGES), _git(), device]
    try:
        params = load_params(params_path)
    except UserError as error:
        return [*findings, Finding("params", str(error), False, f"Fix {params_path}.")]
    data = _data(params)
    findings += [Finding("params", f"{params_path}, {len(params.runs)} runs"), data, *_weights(params)]
    if paths.MANIFEST.exists() and not data.ok:
        return findings  # what follows depends on the images
    findings += _made(params)
    return findings if launch is None else [*findings, _disk(params, launch), _memory(params, launch)]


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


def _device() -> tuple[Finding, Launch | None]:
    import torch

    try:
        launch = load_launch()
    except UserError as error:
        return Finding("launch settings", str(error), False, "Fix that setting, or remove it."), None
    try:
        device = launch.torch_device()
    except UserError as error:
        return Finding("device", str(error), False, "Set AFM_DEVICE to a device of this machine, or unset it."), None
    return Finding("device", f"{device}, {machine_name(device)}, {torch.get_num_threads()} threads"), launch


def _data(params: Params) -> Finding:
    from afm_pipe.data.held_out import read_held_out
    from afm_pipe.data.manifest import read_manifest
    from afm_pipe.data.reading import compare_images, require_images
    from afm_pipe.data.sources import BUILT_IN

    root = paths.local(params.data.root)
    if paths.MANIFEST.exists():
        try:
            manifest, held_out = read_manifest(paths.MANIFEST), read_held_out(paths.HELD_OUT, params.held_out)
            apart = params.held_out is not None and params.held_out.root is not None
            compare_images(manifest, params.data, held_out.paths if held_out and not apart else ())
            if params.held_out and held_out and apart:
                finish(require_images(held_out, params.held_out.data(params.data)))
        except UserError as error:
            return Finding("data", f"{paths.MANIFEST} does not fit params or the images", False, str(error))
        return Finding("data", f"{paths.MANIFEST} lists the {manifest.num_images} images of {root}")
    if params.data.source in BUILT_IN:
        return Finding("data", f"{params.data.source}, which `dvc repro` writes to {root}")
    exists = root.is_file() if params.data.in_tar else root.is_dir()
    remedy = f"Put your images into {root}, one folder per class or one archive of them, or set data.root."
    return Finding("data", f"{root} {'exists' if exists else 'is missing'}", exists, remedy)


def _made(params: Params) -> list[Finding]:
    """Compare what was made of the images with params and with the manifest."""
    from afm_pipe.pipeline.find import count_images, open_latents

    manifest = count_images(params)
    digests: dict[str, tuple[Path, Callable[[], Any]]] = {
        "encode": (paths.LATENTS, lambda: open_latents(params).provenance.get("manifest_digest")),
        "reference": (paths.REFERENCE, lambda: read_json(paths.REFERENCE / "summary.json").get("manifest")),
    }
    findings = []
    for stage, (path, digest) in digests.items():
        if manifest is None or not path.exists():
            continue
        try:
            fits = digest() == manifest.digest
        except UserError as error:
            findings.append(Finding(path.stem, f"{path} does not fit params", False, str(error)))
            continue
        found = f"{path} is of {'the' if fits else 'other'} images {'' if fits else 'than those '}in {paths.MANIFEST}"
        findings.append(Finding(path.stem, found, fits, f"Run `dvc repro {stage}`."))
    return findings


def _weights(params: Params) -> list[Finding]:
    from afm_pipe.autoencoders.encoders import encoder_path
    from afm_pipe.evaluation.adm import adm_path
    from afm_pipe.evaluation.features import dinov2_path, inception_path
    from afm_pipe.params.encoders import ENCODERS

    settings, needed = params.evaluate, dict[str, Callable[[], Path]]()
    if any(name.startswith("inception") for name in settings.features):
        needed["Inception"] = inception_path
    adm = settings.adm_reference
    if adm is not None:
        needed["ADM's statistics"] = lambda: adm_path(adm)[0]
    if "dinov2" in settings.features:
        needed["DINOv2"] = lambda: dinov2_path(settings.dinov2_sha256)
    encoder = getattr(params.autoencoder, "encoder", None)
    if encoder is not None and ENCODERS[encoder].weights is not None:
        needed["encoder"] = lambda: encoder_path(encoder, getattr(params.autoencoder, "sha256", None))[0]
    findings = []
    for name, find in needed.items():
        try:
            findings.append(Finding(name, str(find())))
        except UserError as error:
            findings.append(Finding(name, "missing or another file", False, str(error)))
    pretrained = getattr(params.autoencoder, "pretrained", None)
    if pretrained is not None:
        place = (
            "a local folder"
            if paths.local(pretrained).is_dir()
            else "no local folder: a repository on the Hugging Face Hub"
        )
        findings.append(Finding("autoencoder", f"{pretrained}, {place}"))
    return findings


def _disk(params: Params, launch: Launch) -> Finding:
    """Compare the free disk space with the checkpoints of all runs; encoding checks the space for latents."""
    from afm_pipe.pipeline import run_budget

    kept = launch.keep_checkpoints
    needed = sum(kept * run_budget(params, name, launch).checkpoint_bytes for name in params.runs)
    free = shutil.disk_usage(".").free
    found = f"{free / 2**30:.0f} GiB free, about {needed / 2**30:.1f} GiB needed for checkpoints"
    return Finding("disk", found, free > needed, "Free disk space, or train fewer runs at a time and remove work/RUN.")


def _memory(params: Params, launch: Launch) -> Finding:
    from afm_pipe.pipeline import require_memory, run_budget

    needs = {name: run_budget(params, name, launch) for name in params.runs}
    largest = max(needs, key=lambda name: needs[name].memory_bytes)
    try:
        require_memory(params, largest, launch, launch.torch_device())
    except UserError as error:
        return Finding("memory", f"too little for the run {largest}", False, str(error))
    return Finding("memory", f"enough for the largest run, {largest}: {needs[largest].memory_bytes / 2**30:.1f} GiB")
