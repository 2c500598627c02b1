"""The curves in TensorBoard and in Weights & Biases: one unbroken curve for a run that was killed and resumed."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import struct
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.pipeline import training
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress
from afm_pipe.training.checkpoints import checkpoints
from afm_pipe.training.live_log import RowLog, TensorBoardLog, WandbLog
from tests.reporting.test_live_log import project  # noqa: F401 (fixture)

pytestmark = pytest.mark.usefixtures("project")
BOARD = paths.WORK / "tensorboard" / "t4"
STEPS = [10, 20, 30, 40, 50, 60]


class Trainer:
    """The part of a trainer that a log reads: its rows."""

    def __init__(self) -> None:
        self.state = self
        self.rows: list[dict[str, float]] = []

    def train(self, log: RowLog, updates: list[int], loss: float = 1.0) -> None:
        for update in updates:
            self.rows = [*self.rows, {"update": update, "lr": 0.1, "loss": loss / update}]
            log.after_row()


def killed(params: Params, launch: Launch, rows: int) -> None:
    """Train in another process until so many rows are written, and end it as `kill -9` does; lose two checkpoints."""

    def child() -> None:
        def some(_: str, ticks: Generator[Progress, None, Any]) -> None:
            for _ in range(rows + 1):
                next(ticks)
            os.kill(os.getpid(), signal.SIGKILL)

        training.track = some  # type: ignore[assignment]
        pipeline.train(params, "t4", launch)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (work_dir,) = paths.WORK.glob("t4/*/checkpoints")
    for newest in checkpoints(work_dir)[1:]:
        shutil.rmtree(newest)  # the updates after the first are done, and logged, again


def curve(tag: str) -> dict[int, float]:
    """Return what TensorBoard reads as a curve, by step; each step once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(BOARD))
    points = [(event.step, event.value) for event in reader.Reload().Scalars(tag)]
    assert len(dict(points)) == len(points)
    return dict(points)


def rows(tag: str) -> dict[int, float]:
    with paths.curves("t4").open() as file:
        return {int(row["update"]): float(row[tag]) for row in csv.DictReader(file)}


def test_tensorboard_has_every_row_and_a_killed_run_an_unbroken_curve(discs_params: Params) -> None:
    pytest.importorskip("tensorboard")
    launch = Launch(device="cpu", checkpoint_seconds=0, tensorboard=True)
    killed(discs_params, launch, rows=4)
    (file,) = paths.WORK.glob("t4/*/curves.csv")
    assert all(list(curve(tag)) == STEPS[:4] for tag in file.read_text().splitlines()[0].split(",")[1:])
    (events,) = BOARD.iterdir()
    events.write_bytes(events.read_bytes()[:-7])  # what a kill leaves of the last record
    pipeline.train(discs_params, "t4", launch)
    for tag in ("logit_gap", "d_accuracy"):
        assert curve(tag) == pytest.approx(rows(tag), rel=1e-6)
    assert list(curve("logit_gap")) == STEPS and len(list(BOARD.iterdir())) == 1


def test_without_the_setting_nothing_is_written(discs_params: Params) -> None:
    pipeline.train(discs_params, "t4", Launch(device="cpu"))
    assert (paths.WORK / "dvclive" / "t4").is_dir() and not BOARD.exists() and not (paths.WORK / "wandb").exists()


def test_a_rollback_takes_its_rows_back_and_another_run_keeps_its_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    other = paths.WORK / "tensorboard" / "other"
    other.mkdir(parents=True)
    (other / "events.out.tfevents.1").touch()
    trainer = Trainer()
    log = TensorBoardLog(trainer, BOARD)  # type: ignore[arg-type]
    trainer.train(log, STEPS[:4])
    trainer.rows = trainer.rows[:2]
    trainer.train(log, STEPS[2:], loss=9.0)
    log.end()
    assert curve("loss") == pytest.approx({10: 0.1, 20: 0.05, 30: 0.3, 40: 0.225, 50: 0.18, 60: 0.15})
    assert (other / "events.out.tfevents.1").exists()


def test_a_disk_that_is_full_stops_the_log_and_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(TensorBoardLog):
        def write(self, update: int, values: Any) -> None:
            raise OSError(28, "No space left on device")

    pytest.importorskip("tensorboard")
    trainer = Trainer()
    log = Full(trainer, BOARD)  # type: ignore[arg-type]
    trainer.train(log, STEPS)
    log._writer.close()
    assert (
        capsys.readouterr().out.count("Not logged with TensorBoard: [Errno 28] No space left on device. The run") == 1
    )


@pytest.mark.parametrize("setting", ["tensorboard", "wandb"])
def test_a_tool_that_is_not_installed_is_said_before_anything_is_trained(
    setting: str, discs_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("afm_pipe.training.live_log.distribution", missing)
    words = f"Found launch setting {setting} = true, and no package {setting}: pip install {setting}, or unset AFM_"
    with pytest.raises(UserError, match=words):
        pipeline.train(discs_params, "t4", Launch(device="cpu", **{setting: True}))
    assert not paths.WORK.joinpath("t4").exists()


def records(content: bytes) -> Iterator[bytes]:
    """Read records in LevelDB's log format after a header of 7 bytes: (crc, length, kind), data; blocks of 32 KiB."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # no record begins in the last bytes of a block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield whole
            whole = b""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, dict[int, dict[str, float]]]]:
    """Make W&B log to files; return a function that reads them: rows by run id and step."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")

    def read() -> dict[str, dict[int, dict[str, float]]]:
        found: dict[str, dict[int, dict[str, float]]] = {}
        for path in sorted((paths.WORK / "wandb").glob("offline-run-*/*.wandb")):
            steps = found.setdefault(path.stem.removeprefix("run-"), {})
            for content in records(path.read_bytes()):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(content)
                if record.WhichOneof("record_type") != "history":
                    continue
                names = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                step = int(json.loads(names.pop("_step", "null")) or record.history.step.num)
                assert step not in steps, f"step {step} twice"
                steps[step] = {name: json.loads(value) for name, value in names.items() if name[0] != "_"}
        return found

    return read


def test_wandb_offline_has_an_unbroken_curve_of_a_killed_run(
    offline: Callable[[], dict[str, dict[int, dict[str, float]]]], discs_params: Params
) -> None:
    launch = Launch(device="cpu", checkpoint_seconds=0, wandb=True)
    killed(discs_params, launch, rows=4)
    pipeline.train(discs_params, "t4", launch)
    ((run, steps),) = offline().items()
    assert run.startswith("t4-") and run.endswith("-1") and list(steps) == STEPS
    assert {step: row["logit_gap"] for step, row in steps.items()} == rows("logit_gap")


def test_wandb_begins_another_run_after_a_rollback_and_continues_that_one(
    offline: Callable[[], dict[str, dict[int, dict[str, float]]]],
) -> None:
    trainer = Trainer()
    log = WandbLog(trainer, "t4", "ab", {"lr": 0.1})  # type: ignore[arg-type]
    trainer.train(log, STEPS[:4])
    trainer.rows = trainer.rows[:2]
    trainer.train(log, STEPS[2:5], loss=9.0)
    log.end()
    (uploaded,) = (paths.WORK / "wandb").glob("offline-run-*-t4-ab-1")
    (uploaded / "run-t4-ab-1.wandb.synced").touch()
    resumed = WandbLog(trainer, "t4", "ab", {"lr": 0.1})  # type: ignore[arg-type]
    trainer.train(resumed, STEPS[5:], loss=9.0)
    resumed.end()
    found = offline()
    assert {run: list(steps) for run, steps in found.items()} == {"t4-ab-1": STEPS[:4], "t4-ab-2": STEPS}
    assert [row["loss"] for row in found["t4-ab-2"].values()] == [0.1, 0.05, 0.3, 0.225, 0.18, 0.15]


class Server:
    """Stands in for W&B's server, which tests cannot reach: it keeps the steps of each run and takes none twice."""

    offline = False

    def __init__(self) -> None:
        self.kept: dict[str, list[int]] = {}

    def init(self, id: str, **settings: Any) -> "Server":
        self.now, self.resume = id, settings["resume"]
        self.kept.setdefault(id, [])
        self.step = max(self.kept[id], default=-1) + 1
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        assert step >= self.step, "W&B drops a step that it has"
        self.kept[self.now].append(step)
        self.step = step + 1

    def finish(self) -> None:
        pass


def test_wandb_online_continues_after_what_the_server_has(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, server, trainer = pytest.importorskip("wandb"), Server(), Trainer()
    monkeypatch.setattr(wandb, "init", server.init)
    first = WandbLog(trainer, "t4", "ab", {})  # type: ignore[arg-type]
    trainer.train(first, STEPS[:4])  # killed here: three rows arrived, a checkpoint holds two
    server.kept["t4-ab-1"].remove(40)
    trainer.rows = trainer.rows[:2]
    second = WandbLog(trainer, "t4", "ab", {})  # type: ignore[arg-type]
    second.begin()
    trainer.train(second, STEPS[2:])
    assert server.kept == {"t4-ab-1": STEPS} and server.resume == "allow"


def test_wandb_without_a_login_stops_the_log_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb, trainer = pytest.importorskip("wandb"), Trainer()

    def refuse(**settings: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty). Run wandb login.")

    monkeypatch.setattr(wandb, "init", refuse)
    log = WandbLog(trainer, "t4", "ab", {})  # type: ignore[arg-type]
    trainer.train(log, STEPS)
    log.end()
    said = capsys.readouterr().out
    assert (
        said.count("Not logged with Weights & Biases: api_key not configured (no-tty). Run wandb login. The run") == 1
    )
