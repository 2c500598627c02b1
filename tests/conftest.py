"""Shared parts: the smoke profile, and one small real data set encoded once per session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch: two threads a process on two cores, several processes at once, run many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these are tests of a CPU, also where there is a GPU, which has benchmarks/gpu

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from PIL import Image

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.models import dit
from afm_pipe.models.dit import time_rates
from afm_pipe.models.model_files import ModelConfig, build_generator
from afm_pipe.params import Params, Run
from afm_pipe.params.file import load_params

# Some tests fork. The first backward pass starts threads for the devices there are, which a fork would lose: without a
# GPU there are none, but one appears with the first FakeTensorMode.
torch.ones((), requires_grad=True).backward()

# Fuzzing: always the same few examples, or with --hypothesis-profile fuzz (`make fuzz`) many that differ each time.
BOUNDED: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("tests", max_examples=25, derandomize=True, **BOUNDED)
settings.register_profile("fuzz", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2000")), print_blob=True, **BOUNDED)
settings.load_profile("tests")

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "profiles" / "smoke.yaml"


@pytest.fixture(scope="session")
def smoke_params() -> Params:
    return load_params(SMOKE)


@pytest.fixture(scope="session")
def smoke_run(smoke_params: Params) -> Run:
    return smoke_params.runs["t4"]


@pytest.fixture
def released_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the rates of the time code of the processor that the golden vectors come from.

    Its float32 exponential is one unit in the last place above the correctly rounded one at two of 128 rates, found by
    solving for them; without these, times of 1000 turn that into differences of 1e-6 in the outputs.
    """
    rates = time_rates(torch.device("cpu")).clone()
    rates[[12, 106]] = torch.nextafter(rates[[12, 106]], torch.tensor(2.0))
    monkeypatch.setattr(dit, "time_rates", lambda device: rates)


def write_images(root: Path, classes: int = 3, per_class: int = 20, side: int = 32) -> None:
    """Write a class-folder data set of grey discs: the class is their brightness, the place is random."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(per_class):
            y, x = rng.uniform(8, side - 8, 2)
            disc = (rows - y) ** 2 + (columns - x) ** 2 < 36
            Image.fromarray((disc * (80 * (label + 1))).astype(np.uint8)).save(folder / f"{index:03d}.png")


DISCS = (
    "data.source=folder",
    "data.min_images=10",
    "autoencoder.train.updates=20",
    "train.batch_size=8",
    "runs.t4.phases=[{until_epoch: 8}]",
)


def make_discs(project: Path) -> None:
    """Make a project on images of discs, encoded."""
    write_images(project / "data" / "images")
    before = Path.cwd()
    os.chdir(project)
    try:
        params = load_params(SMOKE, DISCS)
        raw = params.model_dump(mode="json")
        Path("params.yaml").write_text(yaml.safe_dump(raw))
        launch = Launch(device="cpu")
        pipeline.prepare(params)
        pipeline.autoencoder(params, launch)
        pipeline.encode(params, launch)
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project on 60 images of discs, encoded, ready to train a run t4 of 60 updates. Copy it before you write."""
    project = tmp_path_factory.mktemp("discs") / "project"
    make_discs(project)
    return project


@pytest.fixture(scope="session")
def discs_params(discs: Path) -> Params:
    return load_params(discs / "params.yaml")


@pytest.fixture
def change(discs: Path) -> Callable[..., Params]:
    """Return a function from overrides to the params of the discs with them."""
    return lambda *overrides: load_params(discs / "params.yaml", overrides)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_is_run(project: Path) -> Iterator[None]:
    """The same, in which no hostile pickle has left its mark at the end."""
    yield
    assert not (project / "exploded").exists()


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    """A small generator's."""
    return build_generator(ModelConfig(size="t4", channels=4, latent_size=8, num_classes=10)).state_dict()
