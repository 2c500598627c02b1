"""The trainer: updates an objective's networks, logs, writes checkpoints, and resumes after interruptions.

The task determines the numbers; the runtime only how they are computed. Runs, trials of tables and the guidance
classifier all use this trainer. To resume, train again with the same task and folder.
"""

import signal
import time
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup, report_lost_rank
from afm_pipe.objectives.base import Batches, Hyperparameters, Objective
from afm_pipe.params import Phase, Run
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.runtime.progress import Progress
from afm_pipe.runtime.signals import ShutdownRequest, Stopped, shutdown_requested
from afm_pipe.training.callback import Action, Callback
from afm_pipe.training.capture import updates_on
from afm_pipe.training.checkpoints import CheckpointWriter, RetentionPolicy, load_latest
from afm_pipe.training.drawing import DrawnAhead
from afm_pipe.training.engine import Engine
from afm_pipe.training.interventions import Interventions
from afm_pipe.training.learner import Learner
from afm_pipe.training.monitor import TrainingMonitor
from afm_pipe.training.selection import EmaSelection, Measure
from afm_pipe.training.state import Start, TrainingState
from afm_pipe.training.store import RunStore

MAX_ROWS = 1000  # in the curves of a run, unless rows would be closer than MIN_UPDATES_PER_ROW
MIN_UPDATES_PER_ROW = 10
SECONDS_PER_REPORT = 5.0  # of progress, between rows


@dataclass(frozen=True)
class Task:
    """Everything that determines the numbers of a run."""

    objective: Objective
    latents: Latents
    identity: str
    start: Start | None = None
    """Start of a continued run; None: initial weights."""
    keep_at: Collection[int] = ()
    """Updates after which to save the EMA weights, at `RunStore.kept`."""
    measure: Measure | None = None
    """The distance by which a run with `selection` selects its EMA weights."""


@dataclass(frozen=True)
class Runtime:
    """Where and how a run is trained. It changes numbers by rounding only."""

    work_dir: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checkpoint_seconds: float | None = None
    """Seconds between checkpoints; None: by what they cost (see `Launch`)."""
    group: ProcessGroup = SINGLE_PROCESS
    micro_batch: int | None = None
    """Largest number of images in a micro-batch; None: the whole shard of the process."""
    retention: RetentionPolicy = RetentionPolicy()  # immutable
    engine: Engine = Engine()
    draw_ahead: bool | None = None
    """Draw the next batch in a thread while the device computes; None: on a GPU. On a CPU it has no core to itself."""


class Trained(NamedTuple):
    """A finished run."""

    state: TrainingState
    notes: list[str]  # lines to show to the user


class Trainer:
    """Trains a task to its end, from its newest checkpoint, its start, or initial weights."""

    def __init__(self, task: Task, runtime: Runtime) -> None:
        """Build the state and load the newest checkpoint.

        Raises UserError if the checkpoint has another identity or processes find different checkpoints.
        """
        self.task, self.runtime = task, runtime
        self.objective, self.latents, self.group = task.objective, task.latents, runtime.group
        settings = self.objective.settings
        run = settings if isinstance(settings, Run) else None
        auto = run is not None and run.schedule == "auto"
        self.total = self.objective.num_updates(self.latents.num_images)
        self.row_every = max(MIN_UPDATES_PER_ROW, self.total // MAX_ROWS)
        self.store = RunStore(runtime.work_dir, self.group)
        batches = self.objective.batches(self.latents, runtime.device, self.group, runtime.micro_batch)
        ahead = runtime.device.type == "cuda" if runtime.draw_ahead is None else runtime.draw_ahead
        self.batches: Batches = DrawnAhead(batches, self._phase_at) if ahead else batches
        self.state = TrainingState.fresh(self.objective, runtime.device, runtime.engine, self.group, keep_best=auto)
        if task.start is not None:
            self.state.begin_from(Start(self.objective.continued(task.start.networks), task.start.update))
        self.notes = load_latest(self.store.checkpoints, self.state, task.identity)
        _require_same_update(self.group, self.state.update)
        self.learner = Learner(self.state, settings.ema, self.group)
        self._run = updates_on(runtime.device, runtime.engine, self.objective, self.learner)
        self.callbacks: list[Callback] = []
        if run is not None:
            self.callbacks = [Interventions(self, run), TrainingMonitor(self, run, task.identity)]
        self.selection: EmaSelection | None = None
        if run is not None and run.selection is not None and task.measure is not None:
            self.selection = EmaSelection(self, run.selection, task.measure)
            self.callbacks.append(self.selection)
        self._stopped = False  # by a callback
        self._used = self.hyperparameters()  # hyperparameters of the last update
        self._lap = time.monotonic()  # when the training clock was last read

    def train(self) -> Generator[Progress, None, Trained]:
        """Train; on a termination signal, finish the update, write a checkpoint and raise Stopped.

        Raises NotFiniteError for a non-finite loss, before it changes the weights.
        """
        state, store, group = self.state, self.store, self.group
        store.clean()
        store.write_rows(state.rows, self.objective.columns())
        for callback in self.callbacks:
            callback.begin()
        self._stopped = any(callback.finished for callback in self.callbacks)
        yield self._progress()
        active = group.is_main_process or state.is_sharded
        seconds, retention = self.runtime.checkpoint_seconds, self.runtime.retention
        writing = CheckpointWriter(store.checkpoints, state, self.task.identity, seconds, retention, active)
        self._lap = reported = time.monotonic()
        with report_lost_rank(), shutdown_requested() as request, writing as writer:
            while state.update < self.total and not self._stopped:
                next_update = state.update + 1
                row_due = next_update == self.total or next_update % self.row_every == 0
                batch = self._draw(writer, row_due)
                for callback in self.callbacks:
                    callback.before_update()
                saving = None
                try:
                    state.sums += self.update(batch)
                    saving = group.any(request.number is not None or writer.due())
                    if row_due or saving or state.update in self.task.keep_at:
                        self.learner.require_finite()
                except NotFiniteError as error:
                    self.learner.abandon()
                    self._recover(error)
                    continue
                if state.update in self.task.keep_at:
                    store.save(store.kept(state.update), state.ema)
                if row_due and self._row() is Action.RESTORED:
                    continue
                ended = state.update == self.total or self._stopped
                if saving or ended:
                    self._save(writer, request, ended)
                if row_due or time.monotonic() - reported > SECONDS_PER_REPORT:
                    reported = time.monotonic()
                    yield self._progress(writer.trouble)
            self.notes += writer.notes
        for callback in self.callbacks:
            callback.end()
        if self._stopped:  # early: the final EMA weights replace those of later updates
            for update in sorted(each for each in self.task.keep_at if each >= state.update):
                store.save(store.kept(update), state.ema)
        if state.is_sharded:
            state.gather(self.objective)
        return Trained(state, self.notes)

    def hyperparameters(self) -> Hyperparameters:
        """Return the hyperparameters of the next update."""
        hyperparameters = self.objective.hyperparameters(self.state.update, self.latents.num_images)
        for callback in self.callbacks:
            hyperparameters = callback.adjust(hyperparameters)
        return hyperparameters

    def draw(self) -> Any:
        """Return the micro-batches of the next update."""
        return self.batches.draw(self.state.update, self.hyperparameters())

    def _phase_at(self, update: int) -> Phase | None:
        return self.objective.hyperparameters(update, self.latents.num_images).phase

    def update(self, batch: Any) -> Tensor:
        """Run one update; return its terms. On a CPU, raises NotFiniteError before the weights change."""
        self._used = self.hyperparameters()
        terms = self._run(batch, self._used)
        self.state.update += 1
        return terms

    def try_update(self) -> None:
        """Run one update without logging it. Raises NotFiniteError if its loss is not finite."""
        try:
            self.update(self.draw())
            self.learner.require_finite()
        except NotFiniteError:
            self.learner.abandon()
            raise

    def _draw(self, writer: CheckpointWriter, row_due: bool) -> Any:
        waited = time.monotonic()
        try:
            batch = self.draw()
            if row_due:
                for callback in self.callbacks:
                    callback.prepare()
        except UserError:  # the data are gone: save the training so far
            if not self.state.is_sharded:  # otherwise all processes would have to write
                writer.finish()
            raise
        self.state.seconds["data_wait"] += time.monotonic() - waited
        return batch

    def _recover(self, error: NotFiniteError) -> None:
        """Raise the error unless a callback restored an earlier update."""
        actions = [callback.not_finite(error) for callback in self.callbacks]
        if Action.RESTORED not in actions:
            raise error

    def _row(self) -> Action:
        """Append a row to the curves and call the callbacks."""
        state, start = self.state, self.task.start
        since = state.update - (state.rows[-1]["update"] if state.rows else start.update if start else 0)
        now = self._used
        seen = state.update * self.objective.settings.batch_size
        clock = (state.update, seen, seen / self.latents.num_images, now.lr[self.objective.sampled])
        values = (*clock, *(now.weights[term.name] for term in self.objective.scheduled))
        state.rows.append(dict(zip(self.objective.columns(), (*values, *(state.sums / since).tolist()), strict=True)))
        self.store.append_row(state.rows[-1])
        state.sums.zero_()
        actions = []
        for callback in self.callbacks:
            actions.append(callback.after_row())
            if actions[-1] is Action.RESTORED:
                return Action.RESTORED
        self._stopped = Action.STOP in actions
        return Action.STOP if self._stopped else Action.CONTINUE

    def _save(self, writer: CheckpointWriter, request: ShutdownRequest, ended: bool) -> None:
        """Write a checkpoint; raise Stopped after a termination signal."""
        now, seconds = time.monotonic(), self.state.seconds
        seconds["training"] += now - self._lap
        self._lap = now
        stop = self.group.any(request.number is not None)
        if ended or stop:
            writer.finish()
        else:
            writer.save()
        seconds["saving"] += time.monotonic() - now
        if stop and not ended:
            raise Stopped(request.number or signal.SIGTERM)

    def _progress(self, trouble: str = "") -> Progress:
        facts = self.objective.progress(self.state.rows[-1]) if self.state.rows else ""
        return Progress(self.state.update, self.total, "updates", f"{facts}  {trouble}".strip())


def _require_same_update(group: ProcessGroup, update: int) -> None:
    """Raise UserError if processes loaded checkpoints of different updates."""
    updates = group.all_gather(update)
    if len(set(updates)) > 1:
        raise UserError(
            f"Found the processes at updates {', '.join(map(str, updates))}, expected the same on all: put work/ on a "
            "disk that all machines share."
        )
