"""What may look at a run while it is trained, and what it may ask of the trainer."""

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
    """The callback has put the state back to an earlier update: go on from there."""
    STOP = auto()
    """The run has come to its end."""


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
    """What a person should know of how the run went."""

    def hyperparameters(self) -> Hyperparameters:
        """Return what the next update uses."""

    def try_update(self) -> None:
        """Make one update that is not logged. Raises NotFiniteError where its loss is not finite."""


class Callback:
    """Called by the trainer at the moments that its methods name; does nothing by itself."""

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, as a checkpoint remembers it."""
        return False

    def begin(self) -> None:
        """Run before the first update of a session."""

    def adjust(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """Return what the next update uses, given what the objective's schedule says."""
        return hyperparameters

    def prepare(self) -> None:
        """Read what `after_row` needs, before the update, so that a failure costs nothing."""

    def before_update(self) -> None:
        """Change the networks before an update."""

    def after_row(self) -> Action:
        """Look at the run after a row of its curves."""
        return Action.CONTINUE

    def not_finite(self, error: NotFiniteError) -> Action:
        """Answer a non-finite loss."""
        return Action.CONTINUE

    def end(self) -> None:
        """Run after the last update."""
