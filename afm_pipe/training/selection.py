"""The best moving average of a run by the distance that evaluation measures, as the paper chooses what it reports.

Measured every few epochs while the run is trained; the end of the run then is the best of what was measured.
"""

from collections.abc import Callable
from typing import Any

from afm_pipe.objectives.base import Sampler
from afm_pipe.params import Selection
from afm_pipe.training.callback import Action, Callback, Training

Measure = Callable[[Sampler], float]
"""The distance of a generator's samples to the real images; every process calls it."""


class BestAverage(Callback):
    """Keeps the moving average with the smallest distance, and ends the run with it."""

    def __init__(self, training: Training, settings: Selection, measure: Measure) -> None:
        self.training, self.settings, self.measure = training, settings, measure

    @property
    def measured(self) -> list[dict[str, float]]:
        """What was measured so far, in order: update, epoch, distance."""
        return self.training.state.extra.get("selection", [])

    @property
    def best(self) -> dict[str, float] | None:
        """The smallest distance so far."""
        return min(self.measured, key=lambda each: each["distance"], default=None)

    def after_row(self) -> Action:
        """Measure where an interval of epochs has passed, and at the end; keep the average if it is the best."""
        state, store, training = self.training.state, self.training.store, self.training
        row, before = state.rows[-1], state.rows[-2]["epoch"] if len(state.rows) > 1 else 0.0
        every = self.settings.every_epochs
        if row["epoch"] // every <= before // every and state.update < training.total:
            return Action.CONTINUE
        distance = training.group.broadcast(self.measure(training.objective.sampler(state.ema)))
        at = {"update": row["update"], "epoch": row["epoch"], "distance": distance}
        state.extra["selection"] = [*self.measured, at]
        if self.best == at:
            store.save(store.selected(state.update), state.ema)
            store.keep_selected({int(each["update"]) for each in self._bests()})
        return Action.CONTINUE

    def end(self) -> None:
        """Put the best average in the place of the last."""
        if self.best is not None:
            self.training.store.load(self.training.store.selected(int(self.best["update"])), self.training.state.ema)

    def describe(self) -> dict[str, Any]:
        """Return which average was chosen, from how many, by what."""
        assert self.best is not None, "a run ends with a row, which is measured"
        return {"of": len(self.measured), "samples": self.settings.samples, **self.best}

    def _bests(self) -> list[dict[str, float]]:
        """Return the best of now and of every checkpoint, from which the run may resume."""
        store = self.training.store
        remembered = [self.measured, *store.remembered("selection", store.checkpoints, store.good)]
        return [min(each, key=lambda found: found["distance"]) for each in remembered if each]
