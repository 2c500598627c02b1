"""Paths of the pipeline's files, relative to the project's root."""

import os
from pathlib import Path

PARAMS = Path("params.yaml")
PROFILES = Path("profiles")  # complete params files
DVC_YAML = Path("dvc.yaml")  # the pipeline
VERSIONS = Path("versions.yaml")  # declared versions of the code, in a study that `afm-pipe init` wrote
SCHEMA = Path("params.schema.json")  # JSON schema of params files, for editors
MANIFEST = Path("data/manifest.json")  # list of images, written by prepare
HELD_OUT = Path("data/held_out.json")  # list of the held-out real images, or null, written by prepare
LATENTS = Path("data/latents.h5")  # latents of all images, written by encode
AUTOENCODER = Path("models/autoencoder")  # for kind kl, a diffusers AutoencoderKL folder
AUTOENCODER_WEIGHTS = AUTOENCODER / "diffusion_pytorch_model.safetensors"  # their sha256 identifies the autoencoder
CLASSIFIER = Path("models/classifier")  # guidance classifier, written by classifier
REFERENCE = Path("reference")  # statistics of the real images, the default feature network, thumbnails
REFERENCE_DONE = Path(
    "data/reference.done"
)  # constant content: runs wait for the reference but do not rerun when it changes
POOL_DONE = Path("data/pool.done")  # the pool has run in this workspace
WORK = Path("work")  # state of unfinished work, ignored by git and DVC
TRIALS = WORK / "trials"  # trials of the study, by fingerprint
OLD_TRIALS = WORK / "cells"  # trials of version 0.1
RESULTS = Path("results")  # all measurements
TOY = RESULTS / "toy"  # the 1-D toy experiment: results.json, maps as CSV, figures
STUDY = RESULTS / "study"  # tables of the larger study
STUDY_STRONG_1D = STUDY / "strong_discriminator_1d.json"  # and of its 1-D toy experiment
REPORT = RESULTS / "report"  # the page
RENDERED = RESULTS / "rendered"  # tables as CSV, Markdown and LaTeX
BENCHMARKS = Path("benchmarks/results.json")  # speed compared with plain implementations, written by `make bench`

PACKAGE = Path(__file__).parents[1]


def shipped(name: str | Path) -> Path:
    """Return a file or folder of this project, such as profiles, for a study outside its checkout.

    It lies beside the package in a checkout. A wheel has a copy inside the package, made by setup.py.
    """
    copy = PACKAGE / "project_files"
    return (copy if copy.is_dir() else PACKAGE.parent) / name


def expanded(path: str | Path) -> str:
    """Return a path with `~` and `$HOME` expanded."""
    return os.path.expanduser(os.path.expandvars(path))


def local(path: str | Path) -> Path:
    """Return a path of this machine that params or settings name, with `~` and `$HOME` expanded.

    In a copy of the workspace, which `dvc exp run --temp` and `--queue` make without files that git ignores, a relative
    path that the copy lacks is the workspace's.
    """
    here = Path(expanded(path))
    copied_from = next((folder.parent for folder in Path.cwd().parents if folder.name == ".dvc"), None)
    if copied_from and not here.exists() and (copied_from / here).exists():
        return copied_from / here
    return here


def model(run: str) -> Path:
    """Return the folder of a trained model: EMA generator, discriminator, config.json."""
    return Path("models") / run


def kept_discriminator(epoch: float) -> str:
    """Return the name, without suffix, of the discriminator of an epoch in a run's folder."""
    return f"discriminator-epoch-{epoch:g}"


def samples(run: str) -> Path:
    """Return the folder of a model's pictures: grid.png and interpolation.png of sample, nearest.png of evaluate."""
    return Path("samples") / run


def metrics(run: str) -> Path:
    """Return the file of a model's metrics and their protocol."""
    return RESULTS / "metrics" / f"{run}.json"


def curves(run: str) -> Path:
    """Return the file of a run's training curves: one row per logged update."""
    return RESULTS / "curves" / f"{run}.csv"


def events(run: str) -> Path:
    """Return the file of a run's events: one JSON object per line."""
    return RESULTS / "events" / f"{run}.jsonl"


def table(name: str) -> Path:
    """Return the file of a study table: its trials and their measurements."""
    return RESULTS / "tables" / f"{name}.json"


def costs(run: str) -> Path:
    """Return the file of a run's training cost on the machine it ran on."""
    return RESULTS / "costs" / f"{run}.json"
