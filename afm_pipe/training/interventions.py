"""Interventions declared by phases: reloads of EMA weights and of D (paper section 3, Table 11).

The authors of the paper intervened by hand; here interventions depend on the update number only, so that a resumed run
intervenes at the same updates.
"""

from collections.abc import Collection

from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Run
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.callback import Callback, TrainerView


class Interventions(Callback):
    """Reloads networks before the updates that phases specify.

    The weights of the adversary are saved at the epochs that a later phase reloads, on a disk all processes share.
    """

    def __init__(self, trainer: TrainerView, run: Run) -> None:
        """Check the phases. Raises UserError if one reloads the adversary and the objective has none."""
        self.trainer, self.run, self.adversary = trainer, run, trainer.objective.adversary or ""
        if not self.adversary and any(phase.reload_discriminator is not None for phase in run.phases):
            raise UserError(
                f"Found reload_discriminator in a phase of objective {trainer.objective.name}, expected none, since "
                "the objective has no discriminator: remove it from the phase."
            )

    def before_update(self) -> None:
        """Save or reload the adversary, and replace G by its EMA."""
        state, store, run = self.trainer.state, self.trainer.store, self.run
        num_images, start = self.trainer.latents.num_images, 0
        self._keep({update_at(run, epoch, num_images) for epoch in run.keep_discriminators})
        for phase in run.phases:
            end = update_at(run, phase.until_epoch, num_images)
            if isinstance(phase.reload_discriminator, float | int):
                adversary = state.networks[self.adversary]
                source = update_at(run, phase.reload_discriminator, num_images)
                path = store.adversary(source, "epoch")
                self._keep({source})
                if state.update == start:
                    store.load(path, adversary)
                    self._note(f"D reloaded from epoch {phase.reload_discriminator:g}")
            within = phase.reload_ema == "epoch" and start <= state.update < end
            if within and begins(run, state.update, start, num_images):
                state.reload_ema()
                self._note("G replaced by its moving average")
            start = end

    def _keep(self, updates: Collection[int]) -> None:
        """Save the adversary if the current update is one of `updates`."""
        name, state = self.trainer.objective.adversary, self.trainer.state
        if name is not None and state.update in updates:
            self.trainer.store.save(self.trainer.store.adversary(state.update, "epoch"), state.networks[name])

    def end(self) -> None:
        """Save the adversary at the end of the run, if params say so."""
        num_images = self.trainer.latents.num_images
        self._keep({update_at(self.run, epoch, num_images) for epoch in self.run.keep_discriminators})

    def _note(self, done: str) -> None:
        self.trainer.notes.append(f"update {self.trainer.state.update}: {done}")


def begins(run: Run, update: int, start: int, num_images: int) -> bool:
    """Return whether an update is the first of an epoch or of a phase that starts at `start`."""
    epoch = update * run.batch_size // num_images
    return update == start or update == update_at(run, epoch, num_images)
