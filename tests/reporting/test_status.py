"""How runs stand, told from their files: real ones, killed and diverged ones, and damaged ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from afm_pipe import pipeline
from afm_pipe.cli.app import app
from afm_pipe.cli.status import status_text
from afm_pipe.cli.why import FAILED, why
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.reporting import status
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import NotFiniteError

LAUNCH = Launch(device="cpu", checkpoint_seconds=0)
SHORT = "runs.t4.phases=[{until_epoch: 2}]"  # 15 updates


@pytest.fixture
def project(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(discs, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def work(name: str = "t4") -> Path:
    return next(path for path in (paths.WORK / name).iterdir() if path.is_dir())


def test_a_run_is_followed_from_nothing_over_a_kill_to_its_end(project: Path, change: Callable[..., Params]) -> None:
    params = change("runs.t4.phases=[{until_epoch: 4}]", "guided.g={from: t4, until_epoch: 5}")
    begun = status.run_status(params, "t4")
    assert (begun.state, begun.phase, begun.health, begun.total) == ("not begun", "-", "-", 30)
    assert why(params, "t4")[0].endswith("dvc repro train@t4, or afm-pipe train t4 outside DVC.")
    assert status.run_status(params, "g").note == "for t4, which is not begun"
    paths.curves("t4").parent.mkdir(parents=True, exist_ok=True)
    paths.curves("t4").write_text("update,images,epoch\n10,80,1.0\n")  # such as git keeps of a training elsewhere
    elsewhere = status.run_status(params, "t4")
    assert (elsewhere.state, elsewhere.update, elsewhere.rows, elsewhere.health) == ("not begun", 0, [], "-")
    paths.curves("t4").unlink()
    assert "dvc repro guide@g" in why(params, "g")[0]

    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        pipeline.train(params, "t4", LAUNCH)
        os._exit(0)
    deadline = time.monotonic() + 60
    training = begun
    while not training.rows or training.seconds_left is None:  # until there is a checkpoint
        assert time.monotonic() < deadline
        time.sleep(0.2)
        training = status.run_status(params, "t4")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert training.state == "training" and f"process {child} on " in training.note
    assert 10 <= training.update <= 30 and training.seconds_left >= 0 and training.health == "ok"

    stopped = status.run_status(params, "t4")
    assert stopped.state == "stopped" and stopped.phase == "1 of 1"
    assert "afm-pipe train t4: it resumes where it stopped" in why(params, "t4")[0]

    pipeline.train(params, "t4", LAUNCH)
    done = status.run_status(params, "t4")
    assert (done.state, done.update, done.total) == ("finished", 30, 30)
    text, code = why(params, "t4")
    assert text.startswith("t4: finished after 30 updates, without alarms.") and code == 0
    assert "update 30: D accuracy " in text
    assert status.run_status(params, "g").state == "not begun"  # what it waited for is there
    pipeline.train(params, "g", LAUNCH)
    assert {each.state for each in status.all_statuses(params) if each.name in ("t4", "g")} == {"finished"}
    assert status.run_status(change("runs.t4.phases=[{until_epoch: 4}]", "runs.t4.lr=0.002"), "t4").state == "outdated"
    shutil.rmtree(paths.WORK)
    assert status.run_status(params, "t4").state == "finished"


def test_a_loss_that_is_not_finite_is_told_with_its_update_and_what_to_try(
    project: Path, change: Callable[..., Params]
) -> None:
    params = change("runs.t4.penalty.weight=1.0e+300", "runs.t4.monitor.policy='off'")
    with pytest.raises(NotFiniteError) as error:
        pipeline.train(params, "t4", LAUNCH)
    failed = status.run_status(params, "t4")
    assert failed.state == failed.health == "failed"
    assert failed.events[-1].update == error.value.update
    text, code = why(params, "t4")
    assert code == FAILED
    assert f"failed at update {error.value.update}" in text and "Halve lr" in text
    with pytest.raises(NotFiniteError):
        pipeline.train(params, "t4", LAUNCH)
    assert len(status.run_status(params, "t4").events) == 1  # the same end is not told twice


def event(update: int, kind: str, **more: object) -> str:
    return json.dumps({"update": update, "images": update, "kind": kind, "text": f"a {kind}"} | more) + "\n"


def test_a_run_that_went_back_by_itself_has_not_failed(project: Path, change: Callable[..., Params]) -> None:
    params = change(SHORT)
    pipeline.train(params, "t4", LAUNCH)
    log = work() / "events.jsonl"
    log.write_text(
        event(20, "divergence", evidence={"loss": 1e4, "rolled_back_to": 10}, action="back to update 10")
        + event(30, "identity", evidence={"move": 0.01, "move_error": 0.002}, action="transport weight over 2")
    )
    each = status.run_status(params, "t4")
    assert (each.state, each.health) == ("finished", "identity at 30")
    text, code = why(params, "t4")
    assert code == 0 and "with 2 alarms." in text
    assert "update 20: divergence: a divergence [loss 1e+04, rolled_back_to 10]; back to update 10" in text
    assert "a identity [move 0.01 ± 0.002]" in text
    assert "Lower transport.start" in text and "monitor.policy: act" in text

    shutil.rmtree(paths.model("t4"))
    log.write_text(event(20, "divergence", evidence={"loss": 1e4, "rolled_back_to": 10}))
    assert status.run_status(params, "t4").state == "stopped"
    log.write_text(event(20, "divergence", evidence={"loss": 1e4}, action="given up after 3 rollbacks"))
    assert status.run_status(params, "t4").state == "stopped", "a loss that is large ends nothing"
    log.write_text(event(20, "divergence", text="a loss that is not finite", action="given up after 3 rollbacks"))
    assert status.run_status(params, "t4").state == "failed"
    log.write_text(event(20, "phase") + event(40, "phase"))
    assert status.run_status(params, "t4").phase == "3"


def test_damaged_and_hostile_logs_are_passed_over_and_counted(project: Path, change: Callable[..., Params]) -> None:
    params = change(SHORT)
    pipeline.train(params, "t4", LAUNCH)
    curves, log = work() / "curves.csv", work() / "events.jsonl"
    whole = curves.read_bytes()
    rows = whole.count(b"\n") - 1
    curves.write_bytes(whole + b"\x00\xff,junk\n" + b"1e999," * 40 + b"\n" + b"60,48")  # the last is being written
    log.write_bytes(
        event(5, "stagnation", text="\x1b[2J\x07 [red]gone[/x]").encode()
        + b"[" * 100_000 + b"\n"
        + b'{"update": 1' + b"0" * 5000 + b"}\n"
        + b'{"update": "many", "kind": 3, "text": null}\n[]\nnull\n\xff\xfe\n'
        + event(6, "phase", evidence={"x": float("nan"), "y": "z", "w": None}, action={"a": 1}).encode()
        + b'{"update": 7, "ki'
    )  # fmt: skip
    each = status.run_status(params, "t4")
    assert (len(each.rows), [e.update for e in each.events], each.damaged) == (rows, [5], 9)
    text, code = why(params, "t4")
    assert "\x1b" not in text and "\\x1b[2J" in text and "9 unreadable lines of its logs" in text
    assert "[red]gone[/x]" in text and "stagnation at 5" in status_text(params)
    for path in (curves, log):
        path.write_bytes(os.urandom(5000))
        status_text(params)
        path.unlink()
        os.mkfifo(path)
        status_text(params)
        path.unlink()
        path.mkdir()
        status_text(params)
        path.rmdir()
    for text in ("", "[]", "{", '{"provenance": 3}', '{"updates": "x"}'):
        (paths.model("t4") / "config.json").write_text(text)
        status_text(params)
    Path(paths.LATENTS).write_bytes(b"\x89HDF\r\n")
    assert status.run_status(params, "t4").note == "for data/latents.h5, which cannot be read"


def test_a_stale_lease_holds_nothing(project: Path, change: Callable[..., Params]) -> None:
    folder = paths.WORK / "t4"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    assert status.holder_of(folder) is None
    lease = folder / "lease-000001"
    lease.write_text(json.dumps({"pid": 1, "host": "another", "since": "now"}))
    assert status.holder_of(folder) == "process 1 on another"
    lease.write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
    assert status.holder_of(folder) == f"process {os.getpid()} on {os.uname().nodename}"
    lease.write_text(json.dumps({"pid": 1 << 40, "host": os.uname().nodename}))  # no such process
    assert status.holder_of(folder) is None
    lease.write_text(json.dumps({"pid": 1, "host": "another"}))
    os.utime(lease, (0, 0))
    assert status.holder_of(folder) is None
    lease.write_text("[" * 100_000)
    assert status.holder_of(folder) == "process None on None"


def test_the_commands_print_the_table_and_exit_with_what_it_means(project: Path) -> None:
    shown = CliRunner().invoke(app, ["status"])
    assert shown.exit_code == 0 and "not begun" in shown.output and "run" in shown.output.splitlines()[0]
    assert CliRunner().invoke(app, ["why", "t4"]).exit_code == 0
    unknown = subprocess.run(
        [sys.executable, "-m", "afm_pipe", "why", "nope"], capture_output=True, text=True, check=False
    )
    assert unknown.returncode == 1 and "expected one of t4" in unknown.stderr
    quick = "import sys; from afm_pipe.cli.app import app; app(['status'], standalone_mode=False); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True, check=True)
    assert "torch" not in ran.stdout.splitlines()[-1].split()


def test_a_curve_that_is_removed_while_they_are_listed_is_left_out(tmp_path: Path) -> None:
    for age, name in ((10, "new"), (20, "old")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    found = status.by_age(tmp_path / name for name in ("new", "gone", "old"))
    assert found == [(980.0, tmp_path / "old"), (990.0, tmp_path / "new")]
