"""What a phase does to the networks at given moments: EMA reload and D reload (paper section 3, Table 11).

The paper's authors did this by hand; here it is a function of the update's number alone, so that a resumed run does
it again at the same moments.
"""

from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Run
from afm_pipe.training.callback import Callback, Training


class Interventions(Callback):
    """Does what phases declare before the update at which it is due.

    The adversary's weights are kept at the epochs that a later phase goes back to; all processes must see the files.
    """

    def __init__(self, training: Training, run: Run) -> None:
        self.training, self.run = training, run

    def before_update(self) -> None:
        """Keep or reload the adversary, and replace G by its moving average, where a phase says so."""
        state, store, run = self.training.state, self.training.store, self.run
        num_images, start = self.training.latents.num_images, 0
        for phase in run.phases:
            end = update_at(run, phase.until_epoch, num_images)
            if isinstance(phase.reload_discriminator, float | int):
                assert self.training.objective.adversary is not None
                adversary = state.networks[self.training.objective.adversary]
                then = update_at(run, phase.reload_discriminator, num_images)
                path = store.adversary(then, "epoch")
                if state.update == then:
                    store.save(path, adversary)
                if state.update == start:
                    store.load(path, adversary)
                    self._note(f"D put back to epoch {phase.reload_discriminator:g}")
            within = phase.reload_ema == "epoch" and start <= state.update < end
            if within and begins(run, state.update, start, num_images):
                state.sampled_from_ema()
                self._note("G replaced by its moving average")
            start = end

    def _note(self, done: str) -> None:
        self.training.notes.append(f"update {self.training.state.update}: {done}")


def begins(run: Run, update: int, start: int, num_images: int) -> bool:
    """Return whether a phase that started at `start`, or an epoch, begins with this update."""
    epoch = update * run.batch_size // num_images
    return update == start or update == update_at(run, epoch, num_images)
