"""Callbacks of the trainer: the interface of the trainer that they see, and the actions that they return."""

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
    """The callback restored the state of an earlier update: continue from it."""
    STOP = auto()
    """The run is finished."""


class TrainerView(Protocol):
    """The part of the trainer that callbacks use."""

    objective: Objective
    latents: Latents
    group: ProcessGroup
    state: TrainingState
    store: RunStore
    total: int
    """Number of updates of the whole run."""
    notes: list[str]
    """Lines shown to the user when the run is done."""

    def hyperparameters(self) -> Hyperparameters:
        """Return the hyperparameters of the next update."""

    def try_update(self) -> None:
        """Run one update without logging it. Raises NotFiniteError if its loss is not finite."""


class Callback:
    """Base class of callbacks; its methods do nothing."""

    @property
    def finished(self) -> bool:
        """Whether the run ended before its last update, in an earlier session."""
        return False

    def begin(self) -> None:
        """Called before the first update of a session."""

    def adjust(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """Return the hyperparameters of the next update, given those of the objective or of the callback before."""
        return hyperparameters

    def prepare(self) -> None:
        """Called before an update that ends with a row: read what `after_row` needs, so that failures cost nothing."""

    def before_update(self) -> None:
        """Called before an update; may change the networks."""

    def after_row(self) -> Action:
        """Called after a row of the curves."""
        return Action.CONTINUE

    def not_finite(self, error: NotFiniteError) -> Action:
        """Called after a non-finite loss; the trainer raises `error` unless a callback returns RESTORED."""
        return Action.CONTINUE

    def end(self) -> None:
        """Called after the last update."""
