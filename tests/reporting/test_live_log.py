"""The DVCLive log of a training and the page that watches it, on a real training that is broken off."""

import csv
import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from afm_pipe import pipeline
from afm_pipe.cli.status import watch as show_live
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.reporting.watch import PAGE, watch
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress
from afm_pipe.training.checkpoints import checkpoints
from afm_pipe.training.events import FILE, Event, append_event

OFTEN = Launch(device="cpu", checkpoint_seconds=0)
LIVE = paths.WORK / "dvclive" / "t4"


@pytest.fixture
def project(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(discs, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    torch.set_num_threads(1)
    return tmp_path / "project"


def break_off(params: Params, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Train until so many rows are written, then stop as Ctrl-C does."""

    def some(_: str, ticks: Generator[Progress, None, Any]) -> None:
        for _ in range(rows + 1):
            next(ticks)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("afm_pipe.pipeline.training.track", some)
        with pytest.raises(KeyboardInterrupt):
            pipeline.train(params, "t4", OFTEN)


def log() -> dict[str, str]:
    return {str(path.relative_to(LIVE)): path.read_text() for path in LIVE.rglob("*") if path.is_file()}


def test_the_log_holds_every_row_while_training_runs(
    project: Path, discs_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_off(discs_params, monkeypatch, rows=3)
    (rows,) = ([*csv.DictReader(path.open())] for path in paths.WORK.glob("t4/*/curves.csv"))
    logged = [*csv.DictReader((LIVE / "plots" / "metrics" / "logit_gap.tsv").open(), delimiter="\t")]
    assert [int(row["step"]) for row in logged] == [10, 20, 30] == [int(row["update"]) for row in rows]
    assert [float(row["logit_gap"]) for row in logged] == [float(row["logit_gap"]) for row in rows]
    assert json.loads((LIVE / "metrics.json").read_text())["step"] == 30


def test_after_a_break_the_log_equals_an_unbroken_one(
    project: Path, discs_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.train(discs_params, "t4", OFTEN)
    unbroken = log()
    shutil.rmtree(paths.WORK)
    break_off(discs_params, monkeypatch, rows=4)
    assert log() != unbroken
    (work_dir,) = paths.WORK.glob("t4/*/checkpoints")
    shutil.rmtree(checkpoints(work_dir)[-1])  # updates after the last checkpoint are done, and logged, again
    pipeline.train(discs_params, "t4", OFTEN)
    assert log() == unbroken
    assert len(unbroken) > 10


def test_logging_touches_neither_git_nor_dvc(project: Path, discs_params: Params) -> None:
    before = {path.name for path in project.iterdir()}
    pipeline.train(discs_params, "t4", OFTEN)
    assert {path.name for path in project.iterdir()} - before == {"results"}


def test_a_git_repository_without_a_commit_stops_the_log_and_not_the_training(
    project: Path, discs_params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    Path(".dvc").mkdir()
    Path(".dvc/config").touch()
    pipeline.train(discs_params, "t4", OFTEN)
    assert "Not logged with DVCLive: Empty git repo." in capsys.readouterr().out
    assert paths.model("t4").is_dir()


def test_watching_shows_how_far_a_training_is_and_reloads(
    project: Path, discs_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(discs_params, 2, rounds=1)
    assert "No run in params has trained yet" in PAGE.read_text()
    break_off(discs_params, monkeypatch, rows=3)
    watch(discs_params, 2, rounds=1)
    page = PAGE.read_text()
    assert '<meta http-equiv="refresh" content="2">' in page
    assert "<dt>t4</dt><dd>epoch 4.00 of 8, running</dd>" in page
    assert "Logit gap over images seen by the generator: t4 ends at" in page
    (curve,) = paths.WORK.glob("t4/*/curves.csv")
    with curve.open("a") as file:
        file.write("40,320,5.3")  # half a row: it is being written
    watch(discs_params, 2, rounds=1)
    assert "epoch 4.00 of 8" in PAGE.read_text()
    old = time.time() - 600
    os.utime(curve, (old, old))
    watch(discs_params, 2, rounds=1)
    assert "quiet for 10.0 min" in PAGE.read_text()
    stop = Event(30, 240, "stop", "no better in the last phase", action="weights of the best probe are the result")
    append_event(curve.parent / FILE, stop)  # as an auto schedule does before its upper bound
    watch(discs_params, 2, rounds=1)
    assert "<dd>epoch 4.00 of 8, finished</dd>" in PAGE.read_text()


@pytest.mark.parametrize("seconds", [0.1, -1, float("nan"), float("inf")])
def test_seconds_that_cannot_be_waited_are_refused_before_anything_is_said(
    discs_params: Params, seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"--every {seconds:g}, expected 1 to 86,400 seconds"):
        show_live(discs_params, seconds)
    assert not capsys.readouterr().out
