"""docs/extending.md: every patch applies to a copy of this repository, touches few files, and the result works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PATCHES = dict(
    re.findall(
        r"^## (?:A|An) ([^\n]*)\n(?:(?!^## ).)*?```diff\n(.*?)```",
        (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)

TRAIN = '''
import sys
from pathlib import Path
from afm_pipe.objectives import build_objective
from afm_pipe.models.model_files import run_config
from afm_pipe.params.file import load_params
from afm_pipe.training.trainer import Runtime, Task, Trainer
from benchmarks.inputs import latents_file

def rows_of(*overrides, latents=None):
    """Train on 40 latents and return the rows of the curves and the run."""
    small = "runs.t4={size: s4, seed: 0, batch_size: 8, phases: [{until_epoch: 4}]}"
    run = load_params(Path("params.yaml"), [small, "train.monitor.policy=off", *overrides]).runs["t4"]
    latents = latents or latents_file(Path("latents.h5"), 40, (4, 8, 8))
    objective = build_objective(run, run_config(run, latents.latent_shape, latents.num_classes))
    ticks = Trainer(Task(objective, latents, "example"), Runtime(Path("work"))).train()
    while True:
        try:
            next(ticks)
        except StopIteration as end:
            return end.value.state.rows, run
'''

CHECKS = {
    "loss term": '''
rows, run = rows_of("train.logit_drift=0.5")
assert all(row["logit_drift"] > 0 for row in rows), rows
''',
    "model size": '''
from afm_pipe.models.model_files import run_config
from afm_pipe.planning.budget import budget
params = load_params(Path("params.yaml"), ["runs.s4.size=s2"])
config = run_config(params.runs["s4"], (4, 32, 32), 1000)
assert round(budget(params.runs["s4"], config).parameters["generator"] / 1e6) == 33
''',
    "latent space": '''
import torch
from afm_pipe import pipeline
from afm_pipe.autoencoders import load_autoencoder
from afm_pipe.data.latents import Latents
from afm_pipe.distributed.launch import Launch
from afm_pipe.runtime import paths
from tests.conftest import DISCS, write_images
write_images(Path("images"))
pooled = "autoencoder={kind: pooled, downsample: 4}"
params = load_params(Path("profiles/smoke.yaml"), [*DISCS, "data.root=images", pooled])
pipeline.prepare(params)
pipeline.autoencoder(params, Launch(device="cpu"))
pipeline.encode(params, Launch(device="cpu"))
latents = Latents.open(paths.LATENTS, params)
assert latents.latent_shape == (1, 8, 8)
decoded = load_autoencoder(params, paths.AUTOENCODER).decode(latents.draw(torch.arange(2), torch.Generator()))
assert decoded.shape == (2, 1, 32, 32) and decoded.std() > 0
rows, run = rows_of(latents=latents)
assert rows
''',
    "objective": '''
from afm_pipe.planning.budget import budget
rows, run = rows_of("train.objective=regression")
assert rows[-1]["squared_error"] < rows[0]["squared_error"], rows
assert list(budget(run, run_config(run, (4, 8, 8), 10)).parameters) == ["generator"]
''',
}  # fmt: skip
MOST_FILES = {"loss term": 3, "model size": 1, "latent space": 2, "objective": 2}

IDENTITIES = """
from pathlib import Path
from afm_pipe.params.file import load_params
from afm_pipe.params.versions import run_identity
params = load_params(Path("params.yaml"))
print(*(run_identity(run, (4, 8, 8), "latents", {}) for run in params.runs.values()))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what git tracks, besides results and docs."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith(("results/", "docs/", "tests/golden/")) and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_in(copy: Path, code: str) -> str:
    environment = {"PYTHONPATH": str(copy), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def apply(copy: Path, name: str) -> list[str]:
    """Apply a patch; return the files that it touches."""
    (copy / "example.patch").write_text(PATCHES[name], encoding="utf-8")
    for options in (["--numstat"], []):
        command = ["git", "apply", *options, "example.patch"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if options:
            files = [line.split("\t")[2] for line in done.stdout.splitlines()]
    return files


def test_every_example_has_a_patch_and_a_check() -> None:
    assert PATCHES.keys() == CHECKS.keys() == MOST_FILES.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_example_works_and_touches_few_files(copy: Path, name: str) -> None:
    assert len(apply(copy, name)) <= MOST_FILES[name]
    run_in(copy, TRAIN + CHECKS[name])


@pytest.mark.parametrize("name", ["model size", "latent space", "objective"])
def test_example_retrains_no_other_run(copy: Path, name: str) -> None:
    before = run_in(copy, IDENTITIES)
    apply(copy, name)
    assert run_in(copy, IDENTITIES) == before
