"""The training loop: alternate D and G updates, log, checkpoint; killed at any moment, the same call goes on."""

import signal
import time
from collections.abc import Collection, Generator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup, report_lost_rank
from afm_pipe.models.flow import Flow
from afm_pipe.models.model_files import ModelConfig, save_tensors
from afm_pipe.objectives.adversarial_flow.batches import Batches, Part
from afm_pipe.params import Run
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.runtime.files import atomic_path, remove_leftovers
from afm_pipe.runtime.progress import Progress
from afm_pipe.runtime.signals import Stopped, shutdown_requested
from afm_pipe.training.checkpoints import RetentionPolicy, Writer, load_latest
from afm_pipe.training.curves import CLOCK, MEANS, append_curve, write_curves
from afm_pipe.training.engine import Engine
from afm_pipe.training.interventions import intervene
from afm_pipe.training.monitor import TrainingMonitor
from afm_pipe.training.schedules import Setting, num_updates
from afm_pipe.training.sharding import whole
from afm_pipe.training.state import Start, TrainingState
from afm_pipe.training.update import Updates

ROWS = 1000  # at the most, in the curves of a run; rows are at least 10 updates apart


class Trained(NamedTuple):
    """A finished training."""

    state: TrainingState
    notes: list[str]  # what a person should know of how it went


def train(
    run: Run,
    config: ModelConfig,
    latents: Latents,
    work_dir: Path,
    fingerprint: str,
    device: torch.device,
    checkpoint_seconds: float,
    start: Start | None = None,
    classifier: nn.Module | None = None,
    keep_at: Collection[int] = (),
    ranks: ProcessGroup = SINGLE_PROCESS,
    micro_batch: int | None = None,
    keeping: RetentionPolicy = RetentionPolicy(),  # noqa: B008  # an immutable value
    engine: Engine = Engine(),  # noqa: B008  # an immutable value
) -> Generator[Progress, None, Trained]:
    """Train a run to its end, from its newest checkpoint under `work_dir`, else from `start`, else from nothing.

    `classifier` is needed by phases with guidance. After the updates in `keep_at` G's moving average is kept, as
    `kept(work_dir, update)`. Several `ranks` share every batch, each in parts of `micro_batch` images (left out: all at
    once), and end up in the same state; the first of them writes the files, which all must see.
    A signal that asks this process to end makes it write a checkpoint after the update at hand and raise Stopped.
    Raises NotFiniteError on a non-finite loss (before it reaches the weights) and UserError on a checkpoint of other
    params.
    """
    total = num_updates(run, latents.num_images)
    row_every = max(10, total // ROWS)
    state = TrainingState.fresh(config, run, device, engine, ranks)
    if start is not None:
        state.begin_from(start)
    notes = load_latest(work_dir / "checkpoints", state, fingerprint)
    _require_same_update(ranks, state.update)
    if ranks.is_main_process:
        for folder in (work_dir, *work_dir.glob("*/")):
            remove_leftovers(folder)
        write_curves(work_dir / "curves.csv", state.rows)
    batches = Batches(latents, run, device, ranks, micro_batch)
    flow = Flow(state.generator, config.form, config.nfe)
    updates = Updates(state, flow, run, ranks)
    lapped = time.monotonic()

    def drawn(setting: Setting) -> list[Part]:
        return batches.parts(setting.phase, classifier, state.update * run.batch_size)

    def advance(parts: list[Part]) -> Tensor:
        figures = updates.update(parts, watcher.setting())
        state.update += 1
        return figures

    def try_update() -> None:
        try:
            advance(drawn(watcher.setting()))
            updates.require_finite()
        except NotFiniteError:
            updates.abandon()
            raise

    watcher = TrainingMonitor(run, state, flow, latents, work_dir, fingerprint, try_update, ranks)
    yield Progress(state.update, total, "updates")
    folder, active = work_dir / "checkpoints", ranks.is_main_process or state.shares.world_size > 1
    writing = Writer(folder, fingerprint, checkpoint_seconds, keeping, active, state.shares)
    with report_lost_rank(), shutdown_requested() as asked, writing as writer:
        while state.update < total and not watcher.finished:
            waited = time.monotonic()
            setting, coming = watcher.setting(), state.update + 1
            row_due = coming == total or coming % row_every == 0
            try:
                parts = drawn(setting)
                if row_due:  # the watch may look at it
                    watcher.prepare()
            except UserError:  # the data are gone: what was trained so far is kept
                if state.shares.world_size == 1:  # else the others would have to be here too
                    writer.finish(state)
                raise
            state.seconds["data_wait"] += time.monotonic() - waited

            for event in intervene(run, state, latents.num_images, work_dir / "discriminators", ranks):
                notes.append(f"update {state.update}: {event}")
            watcher.before_update()
            try:
                state.sums += advance(parts)
                saving = ranks.any(asked.number is not None or writer.due())
                if row_due or saving or state.update in keep_at:
                    updates.require_finite()
            except NotFiniteError as error:
                updates.abandon()
                watcher.not_finite(error)
                continue
            if state.update in keep_at:
                _keep(work_dir, state.update, state, ranks)

            if row_due:
                since = state.update - (state.rows[-1]["update"] if state.rows else start.update if start else 0)
                means = dict(zip(MEANS, (state.sums / since).tolist(), strict=True))
                seen = state.update * run.batch_size
                clock = (state.update, seen, seen / latents.num_images, setting.lr, setting.transport)
                state.rows.append(dict(zip(CLOCK, clock, strict=True)) | means)
                if ranks.is_main_process:
                    append_curve(work_dir / "curves.csv", state.rows[-1])
                state.sums.zero_()
                if watcher.after_row(total):
                    continue
            ended = state.update == total or watcher.finished
            if saving or ended:
                now = time.monotonic()
                state.seconds["training"] += now - lapped
                lapped = now
                stop = ranks.any(asked.number is not None)
                if ended or stop:
                    writer.finish(state)
                else:
                    writer.save(state)
                state.seconds["saving"] += time.monotonic() - now
                if stop and not ended:
                    raise Stopped(asked.number or signal.SIGTERM)
            if row_due:
                facts = f"gap {means['logit_gap']:.2f}  move {means['transport_rms']:.2f}  {writer.trouble}".rstrip()
                yield Progress(state.update, total, "updates", facts)
        notes += writer.notes
    watcher.write_log()
    if watcher.finished:
        for update in sorted(each for each in keep_at if each >= state.update):  # what stands for the schedule's end
            _keep(work_dir, update, state, ranks)
    if state.shares.world_size > 1:
        state.gather(config)
    return Trained(state, notes)


def kept(work_dir: Path, update: int) -> Path:
    """Where the moving average after an update is kept, if it is."""
    return work_dir / "kept" / f"update-{update:09d}.safetensors"


def _keep(work_dir: Path, update: int, state: TrainingState, ranks: ProcessGroup) -> None:
    tensors = whole(state.ema.state_dict(), ranks)
    if ranks.is_main_process:
        with atomic_path(kept(work_dir, update)) as aside:
            save_tensors(aside, tensors)


def _require_same_update(ranks: ProcessGroup, update: int) -> None:
    """Raise UserError when ranks found checkpoints of different updates."""
    found = ranks.all_gather(update)
    if len(set(found)) > 1:
        raise UserError(
            f"Found the ranks at updates {', '.join(map(str, found))}, expected one for all: put work/ where every "
            "machine sees the same files."
        )
