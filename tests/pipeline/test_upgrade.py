"""A project of version 0.1: its models are used as they are, its unfinished work is named and stays.

tests/pipeline/v0_1 holds what version 0.1 wrote: config.json of two models, and the names and shapes of their tensors.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from afm_pipe import pipeline
from afm_pipe.cli.status import status_text
from afm_pipe.distributed.launch import Launch
from afm_pipe.models.classifier import load_latent_classifier
from afm_pipe.models.model_files import save_tensors
from afm_pipe.params import Params
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import read_json, write_json

V0_1 = Path(__file__).with_name("v0_1")
LAUNCH = Launch(device="cpu")
SHORT = "runs.t4.phases=[{until_epoch: 2}]"  # 15 updates


@pytest.fixture
def params(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Params]) -> Params:
    """Params of a project in which version 0.1 trained t4 and the classifier."""
    shutil.copytree(discs, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    torch.manual_seed(0)
    for name, shapes in read_json(V0_1 / "tensors.json").items():
        (paths.AUTOENCODER.parent / name).parent.mkdir(exist_ok=True)
        tensors = {key: 0.02 * torch.randn(shape) for key, shape in shapes.items()}
        save_tensors(paths.AUTOENCODER.parent / f"{name}.safetensors", tensors)
    factor = read_json(paths.AUTOENCODER / "config.json")["scaling_factor"]
    write_json(paths.model("t4") / "config.json", read_json(V0_1 / "t4.json") | {"scaling_factor": factor})
    shutil.copy(V0_1 / "classifier.json", paths.CLASSIFIER / "config.json")
    return change(SHORT, "tables={}")


def test_a_model_of_0_1_is_sampled_and_exported(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.sample(params, "t4", LAUNCH)
    assert (paths.samples("t4") / "grid.png").stat().st_size > 500
    pipeline.export("t4", "safetensors", Path("t4.safetensors"))
    assert capsys.readouterr().out.count("\n") == 1  # nothing is said of code that was not recorded
    assert "Made by code that was not recorded: t4." in status_text(params)


def test_the_classifier_of_0_1_is_loaded(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = load_latent_classifier(paths.CLASSIFIER, torch.device("cpu"), list("0123456789"))
    assert classifier(torch.zeros(2, 4, 8, 8), torch.zeros(2)).shape == (2, 10)
    assert capsys.readouterr().out.startswith("Not checked: whether the classes of models/classifier/config.json")


def test_unfinished_work_of_0_1_is_named_and_stays(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Path("t4/397caca9b8b7254d/checkpoints/update-000000040/manifest.json")
    left = ["cells/fabcacfb4889391d/trained.json", "encode/latents.0123456789abcdef.h5", str(checkpoint)]
    for name in left:
        (paths.WORK / name).parent.mkdir(parents=True, exist_ok=True)
        (paths.WORK / name).write_text(json.dumps({"fingerprint": "397caca9b8b7254d"}))
    said = []
    for stage in (
        lambda: pipeline.encode(params, LAUNCH),
        lambda: pipeline.train(params, "t4", LAUNCH),
        lambda: pipeline.tables(params, [], LAUNCH),
    ):
        stage()
        said += [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not resumed: ")]
    named = [line.split()[2].rstrip(",") for line in said]
    assert named == ["work/encode/latents.0123456789abcdef.h5", "work/t4/397caca9b8b7254d", "work/cells"]
    assert all((paths.WORK / name).is_file() for name in left)
