"""Everywhere a model meets data, a reference, a classifier or another model, other classes are refused by name."""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Imported, Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError

LAUNCH = Launch(device="cpu", workers=1)
GUIDANCE = "lr: 3.0e-4, guidance: {scale: 0.03, t: [0.0, 0.1]}"
OVERRIDES = (
    "runs.t4.phases=[{until_epoch: 1}]",
    f"guided={{g: {{from: t4, until_epoch: 2, {GUIDANCE}}}}}",
    "classifier.epochs=1",
    "classifier.batch_size=8",
    "evaluate.samples=60",
)
GUIDED_ROW = f"tables.transport.rows.settings={{'0.2': {{}}, '0': {{then: {{until_epoch: 2, {GUIDANCE}}}}}}}"


@pytest.fixture(scope="module")
def trained(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a short run, the classifier and the reference."""
    folder = tmp_path_factory.mktemp("classes") / "project"
    shutil.copytree(discs, folder)
    with chdir(folder):
        params = load_params(overrides=OVERRIDES)
        pipeline.train(params, "t4", LAUNCH)
        pipeline.classifier(params, LAUNCH)
        pipeline.reference(params, LAUNCH)
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def rename(file: Path, classes: list[str]) -> None:
    described = json.loads(file.read_text())
    assert described["classes"] == ["class0", "class1", "class2"]
    file.write_text(json.dumps(described | {"classes": classes}))


def evaluate_exported(params: Params) -> None:
    """Export a model, import the file under another name, and evaluate that."""
    pipeline.export("t4", "safetensors", Path("t4.safetensors"))
    pipeline.import_weights(params, "moved", Imported(file="t4.safetensors"))
    pipeline.evaluate(params, "moved", LAUNCH)


MODEL, CLASSIFIER, REFERENCE = paths.model("t4") / "config.json", paths.CLASSIFIER / "config.json", "summary.json"
ACTIONS: dict[str, tuple[Path, Callable[[Params], object]]] = {
    "evaluate": (MODEL, lambda params: pipeline.evaluate(params, "t4", LAUNCH)),
    "sample for ADM": (MODEL, lambda params: pipeline.export_samples(params, "t4", LAUNCH, Path("samples.npz"))),
    "keep samples": (
        MODEL,
        lambda _: pipeline.sample(load_params(overrides=[*OVERRIDES, "sample.keep_images=true"]), "t4", LAUNCH),
    ),
    "evaluate where it is imported": (MODEL, lambda params: evaluate_exported(params)),
    "continue": (MODEL, lambda params: pipeline.train(params, "g", LAUNCH)),
    "guide": (CLASSIFIER, lambda params: pipeline.train(params, "g", LAUNCH)),
    "select": (
        paths.REFERENCE / REFERENCE,
        lambda _: pipeline.train(
            load_params(overrides=[*OVERRIDES, "runs.t4.selection={every_epochs: 0.5, samples: 100}"]), "t4", LAUNCH
        ),
    ),
    "table": (paths.REFERENCE / REFERENCE, lambda params: pipeline.tables(params, [], LAUNCH)),
    "guided trial": (
        CLASSIFIER,
        lambda _: pipeline.tables(load_params(overrides=[*OVERRIDES, GUIDED_ROW]), [], LAUNCH),
    ),
}


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (["class0", "class2", "class1"], "the same names in another order"),
        (["cat", "dog", "owl"], "'cat'"),
    ],
    ids=["order", "names"],
)
@pytest.mark.parametrize("action", ACTIONS)
def test_other_classes_are_refused_and_nothing_is_written(
    project: Path, action: str, classes: list[str], named: str
) -> None:
    file, act = ACTIONS[action]
    rename(file, classes)
    with pytest.raises(UserError) as caught:
        act(load_params(overrides=OVERRIDES))
    said = str(caught.value)
    assert named in said and ("'class0'" in said or "'class1'" in said), said
    assert not any(paths.metrics(name).exists() for name in ("t4", "moved"))
    assert not any(path.exists() for path in (Path("samples.npz"), paths.samples("t4") / "images", paths.model("g")))
