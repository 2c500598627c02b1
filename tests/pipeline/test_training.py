"""Runs of every form, and one that continues another with guidance, by the functions that stages call."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.models.classifier import load_latent_classifier
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, write_json

CLASSES = ["class0", "class1", "class2"]
LAUNCH = Launch(device="cpu", checkpoint_seconds=1e9)
GUIDED = (
    "guided={g: {from: t4, until_epoch: 10, transport: 0.01, guidance: {scale: 0.003, t: [0, 0.1]}, "
    "augment: {probability: 0.4, translate: 0.3, erasings: 3, area: [0.1, 0.5]}}}"
)


@pytest.fixture(scope="module")
def guided(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the run t4, a classifier and the guided run g that continues t4, all trained."""
    project = tmp_path_factory.mktemp("guided") / "project"
    shutil.copytree(discs, project)
    before = Path.cwd()
    os.chdir(project)
    try:
        params = load_params(overrides=[GUIDED, "classifier.epochs=2", "classifier.batch_size=8"])
        pipeline.train(params, "t4", LAUNCH)
        pipeline.classifier(params, LAUNCH)
        pipeline.train(params, "g", LAUNCH)
    finally:
        os.chdir(before)
    return project


def test_guided_run_continues_its_base(guided: Path) -> None:
    base, config = (json.loads((guided / paths.model(name) / "config.json").read_text()) for name in ("t4", "g"))
    assert (base["updates"], config["updates"]) == (60, 75)
    assert config["provenance"]["generator"] and config["provenance"]["classifier"]
    with (guided / paths.curves("g")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["update"]) for row in rows] == [70, 75]
    assert all(float(row["g_guidance"]) > 0 for row in rows)
    assert json.loads((guided / paths.costs("g")).read_text())["updates"] == 15


def test_a_classifier_folder_gives_back_its_classifier(guided: Path) -> None:
    classifier = load_latent_classifier(guided / paths.CLASSIFIER, torch.device("cpu"), CLASSES)
    assert classifier(torch.zeros(2, 4, 8, 8), torch.zeros(2)).shape == (2, 3)
    assert "accuracy_t0" in json.loads((guided / paths.CLASSIFIER / "config.json").read_text())


@pytest.mark.parametrize("of", [paths.model("t4"), paths.CLASSIFIER], ids=["base", "classifier"])
def test_a_base_or_classifier_of_other_classes_is_refused_before_training(
    guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], of: Path
) -> None:
    shutil.copytree(guided, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    params = load_params(overrides=[GUIDED])
    described = read_json(of / "config.json")
    assert described["classes"] == CLASSES
    write_json(of / "config.json", described | {"classes": ["class0", "class2", "class1"]})
    with pytest.raises(UserError, match=f"Found 'class2' as class 1 of 3 in {of}/config.json, the same names"):
        pipeline.guide(params, "g", LAUNCH)
    write_json(of / "config.json", described | {"classes": None})  # as version 0.1 wrote the classifier's
    pipeline.guide(params, "g", LAUNCH)
    assert f"Not checked: whether the classes of {of}/config.json" in capsys.readouterr().out


def test_guidance_without_a_classifier_is_refused_before_training(change: Callable[..., Params]) -> None:
    with pytest.raises(UserError, match="expected a `classifier` section, since a phase has guidance"):
        change(GUIDED, "classifier=null")


@pytest.mark.parametrize(
    ("overrides", "nfe"),
    [
        (["runs.t4.nfe=2", "runs.t4.form=residual"], 2),
        (["runs.t4.nfe=4", "runs.t4.form=direct", "runs.t4.qk_norm=true"], 4),
        (["runs.t4.nfe=any", "runs.t4.form=residual"], "any"),
        (["runs.t4.repeats=2"], 1),
    ],
    ids=["2NFE residual", "4NFE direct with QK-norm", "any-step", "2x deep"],
)
def test_every_form_trains_and_samples_with_the_same_code(
    discs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., Params],
    overrides: list[str],
    nfe: object,
) -> None:
    shutil.copytree(discs, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    params = change(*overrides, "runs.t4.phases=[{until_epoch: 2}]")
    pipeline.train(params, "t4", LAUNCH)
    assert json.loads((paths.model("t4") / "config.json").read_text())["model"]["nfe"] == nfe
    pipeline.sample(params, "t4", LAUNCH)
    assert (paths.samples("t4") / "grid.png").exists()
