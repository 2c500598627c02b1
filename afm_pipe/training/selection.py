"""Selection of the best EMA weights of a run by the distance that evaluation measures, as in the paper.

The distance is measured every few epochs of training; the run ends with the best of the measured weights.
"""

from collections.abc import Callable
from typing import Any

from afm_pipe.objectives.base import Sampler
from afm_pipe.params import Selection
from afm_pipe.training.callback import Action, Callback, TrainerView

Measure = Callable[[Sampler], float]
"""Returns the distance between a generator's samples and the real images; all processes call it."""


class EmaSelection(Callback):
    """Saves the EMA weights with the smallest distance, and ends the run with them."""

    def __init__(self, trainer: TrainerView, settings: Selection, measure: Measure) -> None:
        self.trainer, self.settings, self.measure = trainer, settings, measure

    @property
    def measured(self) -> list[dict[str, float]]:
        """The measurements so far, in order: update, epoch, distance."""
        return self.trainer.state.extra.get("selection", [])

    @property
    def best(self) -> dict[str, float] | None:
        """The measurement with the smallest distance so far."""
        return min(self.measured, key=lambda each: each["distance"], default=None)

    def after_row(self) -> Action:
        """Measure every `every_epochs` epochs and at the end of the run; save the EMA weights if they are the best."""
        trainer = self.trainer
        state, store = trainer.state, trainer.store
        row, before = state.rows[-1], state.rows[-2]["epoch"] if len(state.rows) > 1 else 0.0
        every = self.settings.every_epochs
        if row["epoch"] // every <= before // every and state.update < trainer.total:
            return Action.CONTINUE
        distance = trainer.group.broadcast(self.measure(trainer.objective.sampler(state.ema)))
        at = {"update": row["update"], "epoch": row["epoch"], "distance": distance}
        state.extra["selection"] = [*self.measured, at]
        if self.best == at:
            store.save(store.selected(state.update), state.ema)
            store.prune_selected({int(each["update"]) for each in self._bests()})
        return Action.CONTINUE

    def end(self) -> None:
        """Replace the EMA weights by the best ones."""
        if self.best is not None:
            self.trainer.store.load(self.trainer.store.selected(int(self.best["update"])), self.trainer.state.ema)

    def describe(self) -> dict[str, Any]:
        """Return which of how many measured weights were selected, and their distance."""
        assert self.best is not None, "every run ends with a row, where it is measured"
        return {"of": len(self.measured), "samples": self.settings.samples, **self.best}

    def _bests(self) -> list[dict[str, float]]:
        """Return the best measurement of the current state and of every checkpoint, from which the run may resume."""
        store = self.trainer.store
        remembered = [self.measured, *store.remembered("selection", store.checkpoints, store.good)]
        return [min(each, key=lambda found: found["distance"]) for each in remembered if each]
