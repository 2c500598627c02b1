"""A current stage does its work again when the user forces it, and resumes like any other when it is interrupted."""

import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch, load_launch
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress

GUIDED = "guided={g: {from: t4, until_epoch: 10, lr: 3.0e-4}}"


def launch(force: str = "") -> Launch:
    return Launch(device="cpu", checkpoint_seconds=0, force=force)


@pytest.fixture(scope="module")
def trained(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a short run t4, the classifier and a guided run g, all trained."""
    project = tmp_path_factory.mktemp("force") / "project"
    shutil.copytree(discs, project)
    before = Path.cwd()
    os.chdir(project)
    try:
        for stage in (lambda p: pipeline.train(p, "t4", launch()), lambda p: pipeline.train(p, "g", launch())):
            stage(own_params())
        pipeline.classifier(own_params(), launch())
    finally:
        os.chdir(before)
    return project


def own_params() -> Params:
    return load_params(overrides=[GUIDED, "classifier.epochs=1", "classifier.batch_size=8"])


@pytest.fixture
def params(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return own_params()


def updates(monkeypatch: pytest.MonkeyPatch, train: Any, stop_at: int | None = None) -> list[int]:
    """Return the updates that a stage reports; stop as Ctrl-C does once `stop_at` of them are done."""
    seen: list[int] = []

    def watch(_: str, work: Generator[Progress, None, Any]) -> Any:
        while True:
            try:
                seen.append(next(work).done)
            except StopIteration as end:
                return end.value
            if stop_at is not None and seen[-1] >= stop_at:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("afm_pipe.pipeline.training.track", watch)
        patch.setattr("afm_pipe.pipeline.images.track", watch)
        if stop_at is None:
            train()
        else:
            with pytest.raises(KeyboardInterrupt):
                train()
    return seen


def test_a_current_run_does_nothing_unless_it_is_forced(
    params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (paths.model("t4") / "generator.safetensors").read_bytes()
    for other in ("", "train@g", "train@t4x", "evaluate@t4", "classifier"):
        assert updates(monkeypatch, lambda other=other: pipeline.train(params, "t4", launch(other))) == []
    assert capsys.readouterr().out.count(": current.") == 5
    seen = updates(monkeypatch, lambda: pipeline.train(params, "t4", launch("evaluate@t4,train@t4")))
    assert seen[0] <= 10 and seen[-1] == 60, "it begins at the beginning"
    assert "current, and done again, as AFM_FORCE says." in capsys.readouterr().out
    assert (paths.model("t4") / "generator.safetensors").read_bytes() == before
    assert updates(monkeypatch, lambda: pipeline.train(params, "t4", launch())) == []


def test_a_forced_run_that_is_interrupted_resumes_with_the_same_command(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = lambda: pipeline.train(params, "t4", launch("train@t4"))  # noqa: E731
    updates(monkeypatch, again, stop_at=40)
    seen = updates(monkeypatch, again)
    assert seen[0] >= 30 and seen[-1] == 60, "it does not begin again"


def test_guided_runs_and_the_classifier_are_forced_by_the_names_of_their_stages(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert updates(monkeypatch, lambda: pipeline.train(params, "g", launch("guide@g")))[-1] == 75
    assert updates(monkeypatch, lambda: pipeline.classifier(params, launch())) == []
    assert updates(monkeypatch, lambda: pipeline.classifier(params, launch("classifier")))[0] <= 1
    assert launch("evaluate-guided@g").forces("evaluate", "g") and launch("table@x").forces("table", "x")
    assert not launch("evaluate-guided@g").forces("sample", "g") and not launch().forces("toy", "")


def test_other_state_under_work_is_left_alone(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = paths.WORK / "t4" / "0123456789abcdef" / "code.json"
    kept.parent.mkdir()
    kept.touch()
    updates(monkeypatch, lambda: pipeline.train(params, "t4", launch("train@t4")))
    assert kept.exists() and list((paths.WORK / "g").iterdir())


@pytest.mark.parametrize("value", ["1", "true", "t4", "train@", "train@t4;train@g"])
def test_what_names_no_stage_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_FORCE", value)
    with pytest.raises(UserError, match=r"launch setting force = .*Fix the environment variable AFM_FORCE"):
        load_launch()
