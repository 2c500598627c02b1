"""What tests of training share: a trainer driven to its end, or broken off as a kill would."""

from pathlib import Path

import torch

from afm_pipe.objectives.base import Hyperparameters
from afm_pipe.training.callback import Callback
from afm_pipe.training.state import TrainingState
from afm_pipe.training.trainer import Trainer


class Halved(Callback):
    """Halves the learning rate in every second half of eight updates."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def adjust(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        return hyperparameters.scaled(lr=0.5) if self.trainer.state.update % 8 >= 4 else hyperparameters


def train(trainer: Trainer, stop_at: int | None = None) -> TrainingState:
    """Train to the end and return the state; raise InterruptedError once `stop_at` updates are done."""
    training = trainer.train()
    while True:
        try:
            tick = next(training)
        except StopIteration as end:
            return end.value.state
        if stop_at is not None and tick.done >= stop_at:
            training.close()  # what is being written is broken off
            raise InterruptedError


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    """Return all weights by name."""
    return {
        f"{part}.{name}": tensor
        for part, module in state.modules.items()
        for name, tensor in module.state_dict().items()
    }


def same_weights(one: TrainingState, other: TrainingState) -> bool:
    """Whether two states have the same weights, bit for bit."""
    theirs = weights(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in weights(one).items())


def assert_same(one: TrainingState, other: TrainingState) -> None:
    """Assert that two runs ended with the same bits."""
    assert same_weights(one, other)
    assert one.rows == other.rows
    assert one.extra == other.extra


def updates_of(folder: Path) -> list[int]:
    """Return the updates of the checkpoints in a folder."""
    return sorted(int(path.name.removeprefix("update-")) for path in folder.glob("update-*"))
