"""Interventions that phases declare: EMA reload and D reload (paper section 3, Table 11).

The paper's authors intervened by hand; here it depends on the update's number only, so that a resumed run intervenes at
the same moments.
"""

from collections.abc import Collection

from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Run
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.callback import Callback, Training


class Interventions(Callback):
    """Reloads networks before the update at which a phase says so.

    The adversary's weights are kept at the epochs that a later phase reloads; all processes must see the files.
    """

    def __init__(self, training: Training, run: Run) -> None:
        """Check the phases. Raises UserError when one reloads the adversary of an objective that has none."""
        self.training, self.run, self.adversary = training, run, training.objective.adversary or ""
        if not self.adversary and any(phase.reload_discriminator is not None for phase in run.phases):
            raise UserError(
                f"Found reload_discriminator in a phase of objective {training.objective.name}, expected none, since "
                "the objective has no discriminator: remove it from the phase."
            )

    def before_update(self) -> None:
        """Keep or reload the adversary, and replace G by its moving average."""
        state, store, run = self.training.state, self.training.store, self.run
        num_images, start = self.training.latents.num_images, 0
        self._keep({update_at(run, epoch, num_images) for epoch in run.keep_discriminators})
        for phase in run.phases:
            end = update_at(run, phase.until_epoch, num_images)
            if isinstance(phase.reload_discriminator, float | int):
                adversary = state.networks[self.adversary]
                then = update_at(run, phase.reload_discriminator, num_images)
                path = store.adversary(then, "epoch")
                self._keep({then})
                if state.update == start:
                    store.load(path, adversary)
                    self._note(f"D reloaded from epoch {phase.reload_discriminator:g}")
            within = phase.reload_ema == "epoch" and start <= state.update < end
            if within and begins(run, state.update, start, num_images):
                state.reload_ema()
                self._note("G replaced by its moving average")
            start = end

    def _keep(self, updates: Collection[int]) -> None:
        """Keep the adversary if it is before one of some updates, or at the end of the run."""
        name, state = self.training.objective.adversary, self.training.state
        if name is not None and state.update in updates:
            self.training.store.save(self.training.store.adversary(state.update, "epoch"), state.networks[name])

    def end(self) -> None:
        """Keep the adversary at the end of the run, where params say so."""
        num_images = self.training.latents.num_images
        self._keep({update_at(self.run, epoch, num_images) for epoch in self.run.keep_discriminators})

    def _note(self, done: str) -> None:
        self.training.notes.append(f"update {self.training.state.update}: {done}")


def begins(run: Run, update: int, start: int, num_images: int) -> bool:
    """Return whether a phase that started at `start`, or an epoch, begins with this update."""
    epoch = update * run.batch_size // num_images
    return update == start or update == update_at(run, epoch, num_images)
