"""Waiting times: --help, a `dvc repro` with nothing to do, the first update of a run."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from afm_pipe.params import Params
from benchmarks.measuring import Row, in_turns

TRIVIAL = '''
import typer
app = typer.Typer()
@app.command()
def one(name: str) -> None:
    """Do one thing."""
@app.command()
def two(name: str) -> None:
    """Do another."""
app()
'''
IMPORTS = "import torch, diffusers; from diffusers import AutoencoderKL"


def startup(params: Params, quick: bool) -> Iterator[Row]:
    """`afm-pipe --help` beside a trivial typer app; a no-op `dvc repro` beside `dvc status`."""
    with tempfile.TemporaryDirectory() as folder:
        trivial = Path(folder) / "trivial.py"
        trivial.write_text(TRIVIAL)
        afm = [sys.executable, "-c", "from afm_pipe.cli import main; main()"]
        seconds = in_turns(
            3 if quick else 15,
            ours=lambda: _run([*afm, "--help"]),
            trivial=lambda: _run([sys.executable, str(trivial), "--help"]),
        )
    against = "--help of a typer app of two commands"
    yield _times("startup", "afm-pipe --help", seconds, "ours", "trivial", against, "<= 1.5")
    dvc = [sys.executable, "-m", "dvc"]
    status = subprocess.run([*dvc, "status"], capture_output=True, text=True)
    if "up to date" in status.stdout:
        seconds = in_turns(1 if quick else 3, ours=lambda: _run([*dvc, "repro"]), status=lambda: _run([*dvc, "status"]))
        yield _times("startup", "dvc repro with nothing to do", seconds, "ours", "status", "dvc status", "<= 2.0")
    else:
        print("startup: no-op dvc repro is not measured, because stages have changed (make repro)")
    first = [sys.executable, "-c", "from benchmarks.startup import first_update; first_update()"]
    works = {"ours": lambda: _run(first), "imports": lambda: _run([sys.executable, "-c", IMPORTS])}
    seconds = in_turns(1 if quick else 3, **works)
    what, against = "from nothing to the first update of t4", "importing torch and diffusers"
    yield _times("startup", what, seconds, "ours", "imports", against, "")


def first_update() -> None:
    """Run the first update of the small default on random latents."""
    from afm_pipe.params.file import load_params
    from benchmarks.inputs import latents_file
    from benchmarks.training import one_update, trainer_of

    params = load_params()
    with tempfile.TemporaryDirectory() as folder:
        latents = latents_file(Path(folder) / "latents.h5", 256, params.latent_shape)
        one_update(trainer_of(params.runs["t4"], latents))


def _times(
    case: str, what: str, seconds: dict[str, list[float]], ours: str, against: str, baseline: str, bar: str
) -> Row:
    from statistics import median

    ratio = median(own / theirs for own, theirs in zip(seconds[ours], seconds[against], strict=True))
    return Row(case, what, median(seconds[ours]), median(seconds[against]), "s", baseline, ratio, bar)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
