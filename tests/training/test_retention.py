"""Which checkpoints are retained, which logs survive a full disk, and data lost before a probe."""

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.launch import load_launch
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run, deep_merge
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import try_append
from afm_pipe.training.checkpoints import CheckpointWriter, RetentionPolicy, retained
from afm_pipe.training.events import FILE
from afm_pipe.training.state import TrainingState
from afm_pipe.training.store import RunStore
from afm_pipe.training.trainer import Runtime, Task, Trainer
from tests.training.running import assert_same, train, updates_of


def survivors(saved: list[int], every: int | None, best: Callable[[int], int | None], last: int = 1) -> list[int]:
    """Return the checkpoints left after those of `saved` were written one by one."""
    present: list[int] = []
    for update in saved:
        present.append(update)
        kept = retained(present, every, best(update))
        present = [each for each in present if each in kept or each in present[-last:]]
    return present


def test_the_first_checkpoint_after_each_multiple_stays() -> None:
    assert survivors([40, 90, 130, 160, 190, 420, 430, 500, 510], 100, lambda _: None) == [130, 420, 500, 510]
    assert survivors([40, 90, 130], None, lambda _: None) == [130]
    assert len(survivors(list(range(1, 1001)), 100, lambda _: None, last=2)) <= 1000 // 100 + 2


def test_the_checkpoint_of_the_best_probe_stays_until_a_better_one_comes() -> None:
    assert survivors([40, 90, 130, 160], None, lambda _: 85) == [90, 160]
    assert survivors([40, 90, 130, 160, 190], None, lambda update: 85 if update < 150 else 155) == [160, 190]


@pytest.fixture(scope="module")
def latents(discs: Path) -> Latents:
    return Latents.open(discs / "data" / "latents.h5")


@pytest.fixture
def trained(latents: Latents, discs_params: Params) -> Callable[..., TrainingState]:
    """Return a function that trains on the discs in a folder."""

    def trained(
        folder: Path,
        retention: RetentionPolicy = RetentionPolicy(),  # noqa: B008  # an immutable value
        checkpoint_seconds: float = 1e9,
        **monitor: object,
    ) -> TrainingState:
        settings = {
            "size": "s4",
            "phases": [{"until_epoch": 5}],
            "monitor": {"settle_epochs": 0.5, "probe": {"every_epochs": 1.25}, **monitor},
        }
        run = Run.model_validate(deep_merge(discs_params.runs["t4"].model_dump(mode="json"), settings))
        objective = build_objective(run, run_config(run, latents.latent_shape, latents.num_classes))
        runtime = Runtime(folder, checkpoint_seconds=checkpoint_seconds, retention=retention)
        return train(Trainer(Task(objective, latents, "retention"), runtime))

    return trained


def test_a_run_keeps_every_n_updates_and_its_best_probe(trained: Callable[..., TrainingState], tmp_path: Path) -> None:
    state = trained(tmp_path, RetentionPolicy(last=1, in_background=False, every=15, best=True), 0.0)
    best = min(state.extra["monitor"]["probes"], key=lambda probe: probe["kid"])["update"]
    assert updates_of(RunStore(tmp_path).checkpoints) == sorted({15, 30, state.update, int(best)})


@pytest.mark.parametrize(("seconds", "cost", "interval"), [(None, 0.001, 60), (None, 6.0, 600), (5.0, 6.0, 5)])
def test_checkpoints_cost_at_most_a_hundredth_of_the_time(
    smoke_run: Run, tmp_path: Path, seconds: float | None, cost: float, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(smoke_run, (4, 8, 8), 10)
    state = TrainingState.fresh(build_objective(smoke_run, config), torch.device("cpu"))
    now = [1000.0]
    monkeypatch.setattr("afm_pipe.training.checkpoints.time.monotonic", lambda: now[0])
    policy = RetentionPolicy(in_background=False, check_lease=lambda: now.__setitem__(0, 1000 + cost))
    with CheckpointWriter(tmp_path, state, "identity", seconds, policy, active=True) as writer:
        writer.save()  # during which the clock moves by its cost
        now[0] = 1000 + cost + interval - 0.01
        assert not writer.due()
        now[0] += 0.02
        assert writer.due()


def test_retention_is_a_launch_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_KEEP_EVERY_EPOCHS", "2.5")
    monkeypatch.setenv("AFM_KEEP_BEST", "1")
    assert (load_launch().keep_every_epochs, load_launch().keep_best) == (2.5, True)
    monkeypatch.setenv("AFM_KEEP_EVERY_EPOCHS", "0")
    with pytest.raises(UserError, match="keep_every_epochs"):
        load_launch()


def test_latents_lost_before_a_probe_leave_a_checkpoint_that_resumes_to_the_same_bits(
    trained: Callable[..., TrainingState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole")

    def lost(*_: object) -> None:
        raise UserError("Found data/latents.h5 cut short")

    with monkeypatch.context() as patched:
        patched.setattr("afm_pipe.training.monitor.Probe", lost)
        with pytest.raises(UserError, match="cut short"):
            trained(tmp_path / "cut")
    assert updates_of(RunStore(tmp_path / "cut").checkpoints) == [9], "the last update before a row that is probed"
    assert_same(trained(tmp_path / "cut"), whole)


def test_a_log_on_a_full_disk_has_no_half_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    try_append(log, "first\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try_append(log, "second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert log.read_text() == "first\n"
    try_append(log, "second\n")
    assert log.read_text() == "first\nsecond\n"


def test_events_that_a_full_disk_refused_are_in_the_log_at_the_end(
    trained: Callable[..., TrainingState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", *arguments: object, **more: object) -> object:
        if self.name == FILE and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    state = trained(tmp_path, policy="warn", identity={"transport_rms": 10.0}, rows=1)
    assert state.update == 38
    assert [event.kind for event in RunStore(tmp_path).read_events()][:1] == ["identity"]
