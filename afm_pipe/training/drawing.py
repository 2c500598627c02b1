"""Drawing of batches ahead of their update, in a thread, so that a GPU does not wait for them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from afm_pipe.objectives.base import Batches, Hyperparameters
from afm_pipe.params import Phase


class DrawnAhead:
    """Batches that draw the next update's while this one computes. They are the same batches, bit for bit.

    A batch that was drawn for another update or phase, such as before a rollback, is dropped.
    """

    def __init__(self, batches: Batches, phase_at: Callable[[int], Phase | None]) -> None:
        """Draw from `batches`; `phase_at` returns the phase of an update."""
        self.batches, self.phase_at = batches, phase_at
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Phase | None, Future[Any]] | None = None

    def draw(self, update: int, hyperparameters: Hyperparameters) -> Any:
        """Return this process's input to `Objective.update`, for an update counted from 0."""
        drawn, self._next = self._next, None
        if drawn is not None and drawn[:2] == (update, hyperparameters.phase):
            batch = drawn[2].result()
        else:
            batch = self._submit(update, hyperparameters).result()  # after the dropped one: only one thread draws
        phase = self.phase_at(update + 1)
        ahead = Hyperparameters(hyperparameters.lr, hyperparameters.weights, phase=phase)
        self._next = update + 1, phase, self._submit(update + 1, ahead)
        return batch

    def _submit(self, update: int, hyperparameters: Hyperparameters) -> "Future[Any]":
        return self._thread.submit(self.batches.draw, update, hyperparameters)
