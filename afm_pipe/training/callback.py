"""Callbacks of the trainer: what they see of a run, and the actions they return."""

from enum import Enum, auto
from typing import Protocol

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.objectives.base import Hyperparameters, Objective
from afm_pipe.runtime.errors import NotFiniteError
from afm_pipe.training.state import TrainingState
from afm_pipe.training.store import RunStore


class Action(Enum):
    """What the trainer does after a callback."""

    CONTINUE = auto()
    RESTORED = auto()
    """The callback has restored the state of an earlier update: continue from there."""
    STOP = auto()
    """The run is finished."""


class Training(Protocol):
    """What a callback sees of the trainer."""

    objective: Objective
    latents: Latents
    group: ProcessGroup
    state: TrainingState
    store: RunStore
    total: int
    """Updates of the whole run."""
    notes: list[str]
    """Lines that a user should read when the run is done."""

    def hyperparameters(self) -> Hyperparameters:
        """Return what the next update uses."""

    def try_update(self) -> None:
        """Make one update that is not logged. Raises NotFiniteError where its loss is not finite."""


class Callback:
    """Called by the trainer at the moments that its methods name; this base class does nothing."""

    @property
    def finished(self) -> bool:
        """Whether the run is finished before its last update; checkpoints remember it."""
        return False

    def begin(self) -> None:
        """Run before the first update of a session."""

    def adjust(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """Return what the next update uses in place of the objective's own hyperparameters."""
        return hyperparameters

    def prepare(self) -> None:
        """Read what `after_row` needs, before the update, so that a failure costs nothing."""

    def before_update(self) -> None:
        """Change the networks before an update."""

    def after_row(self) -> Action:
        """Act after a row of the curves."""
        return Action.CONTINUE

    def not_finite(self, error: NotFiniteError) -> Action:
        """Act on a non-finite loss; the trainer raises it again unless a callback returns RESTORED."""
        return Action.CONTINUE

    def end(self) -> None:
        """Run after the last update."""
