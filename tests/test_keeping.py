"""Which checkpoints stay, which logs survive a full disk, and that data lost under the probe lose nothing trained."""

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from afm_pipe.training.loop import train

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.launch import load_launch
from afm_pipe.models.model_files import run_config
from afm_pipe.params import Params, Run, deep_merge
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import try_append
from afm_pipe.training.checkpoints import RetentionPolicy, checkpoints, staying
from afm_pipe.training.events import FILE, read_events
from afm_pipe.training.state import TrainingState

CPU = torch.device("cpu")


def survivors(saved: list[int], every: int | None, best: Callable[[int], int | None], last: int = 1) -> list[int]:
    """What is left of checkpoints written one after the other."""
    present: list[int] = []
    for update in saved:
        present.append(update)
        stay = staying(present, every, best(update))
        present = [each for each in present if each in stay or each in present[-last:]]
    return present


def test_the_first_checkpoint_after_each_multiple_stays() -> None:
    assert survivors([40, 90, 130, 160, 190, 420, 430, 500, 510], 100, lambda _: None) == [130, 420, 500, 510]
    assert survivors([40, 90, 130], None, lambda _: None) == [130]
    assert len(survivors(list(range(1, 1001)), 100, lambda _: None, last=2)) <= 1000 // 100 + 2


def test_the_checkpoint_of_the_best_probe_stays_until_a_better_one_comes() -> None:
    assert survivors([40, 90, 130, 160], None, lambda _: 85) == [90, 160]
    assert survivors([40, 90, 130, 160, 190], None, lambda update: 85 if update < 150 else 155) == [160, 190]


def run_of(params: Params, **own: object) -> Run:
    base = {
        "size": "s4",
        "phases": [{"until_epoch": 5}],
        "monitor": {"settle_epochs": 0.5, "probe": {"every_epochs": 1.25}},
    }
    return Run.model_validate(deep_merge(deep_merge(params.runs["t4"].model_dump(mode="json"), base), own))


def trained(
    run: Run,
    latents: Latents,
    folder: Path,
    keeping: RetentionPolicy = RetentionPolicy(),  # noqa: B008
    checkpoint_seconds: float = 0.0,
) -> TrainingState:
    config = run_config(run, latents.latent_shape, latents.num_classes)
    training = train(run, config, latents, folder, "kept", CPU, checkpoint_seconds, keeping=keeping)
    while True:
        try:
            next(training)
        except StopIteration as end:
            return end.value.state


def test_a_training_keeps_every_so_many_updates_and_its_best_probe(
    discs: Path, discs_params: Params, tmp_path: Path
) -> None:
    latents = Latents.open(discs / "data" / "latents.h5")
    keeping = RetentionPolicy(last=1, in_background=False, every=15, best=True)
    state = trained(run_of(discs_params), latents, tmp_path, keeping)
    best = min(state.extra["monitor"]["probes"], key=lambda probe: probe["kid"])["update"]
    expected = sorted({15, 30, state.update, int(best)})
    assert [int(path.name[-9:]) for path in checkpoints(tmp_path / "checkpoints")] == expected


def test_settings_of_keeping_are_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_KEEP_EVERY_EPOCHS", "2.5")
    monkeypatch.setenv("AFM_KEEP_BEST", "1")
    assert (load_launch().keep_every_epochs, load_launch().keep_best) == (2.5, True)
    monkeypatch.setenv("AFM_KEEP_EVERY_EPOCHS", "0")
    with pytest.raises(UserError, match="keep_every_epochs"):
        load_launch()


def test_latents_lost_before_a_probe_leave_a_checkpoint_from_which_all_is_as_if_nothing_had_been(
    discs: Path, discs_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = Latents.open(discs / "data" / "latents.h5")
    whole = trained(run_of(discs_params), latents, tmp_path / "whole")

    def lost(*_: object) -> None:
        raise UserError("Found data/latents.h5 cut short")

    with monkeypatch.context() as patched:
        patched.setattr("afm_pipe.training.monitor.Probe", lost)
        with pytest.raises(UserError, match="cut short"):
            trained(run_of(discs_params), latents, tmp_path / "cut", checkpoint_seconds=1e9)
    saved = checkpoints(tmp_path / "cut" / "checkpoints")
    assert [path.name[-2:] for path in saved] == ["09"], "the last update before a row that is probed"
    again = trained(run_of(discs_params), latents, tmp_path / "cut")
    assert again.extra == whole.extra
    for name, tensor in whole.ema.state_dict().items():
        assert torch.equal(again.ema.state_dict()[name], tensor), name


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
    discs: Path, discs_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = Latents.open(discs / "data" / "latents.h5")
    strict = run_of(discs_params, watch={"policy": "warn", "identity": {"transport_rms": 10.0}, "rows": 1})
    opened = Path.open

    def full(self: Path, mode: str = "r", *arguments: object, **more: object) -> object:
        if self.name == FILE and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    state = trained(strict, latents, tmp_path)
    assert state.update == 38
    assert [event.kind for event in read_events(tmp_path / FILE)][:1] == ["identity"]
