"""What a phase does to the networks at given moments: EMA reload and D reload (paper section 3, Table 11).

The paper's authors did this by hand; here it is a function of the update's number alone, so that a resumed run does
it again at the same moments.
"""

from pathlib import Path

from torch import Tensor

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import load_exactly, load_tensors, save_tensors
from afm_pipe.params import Run
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path
from afm_pipe.training.schedules import update_at
from afm_pipe.training.sharding import placed, whole
from afm_pipe.training.state import TrainingState


def intervene(
    run: Run, state: TrainingState, num_images: int, folder: Path, ranks: ProcessGroup = SINGLE_PROCESS
) -> list[str]:
    """Do what is due before the update `state.update`; return a line for each thing done.

    D's weights are kept under `folder` at the epochs that a later phase puts D back to; all ranks must see its files.
    """
    done = []
    start = 0
    for phase in run.phases:
        end = update_at(run, phase.until_epoch, num_images)
        if isinstance(phase.reload_discriminator, float | int):
            then = update_at(run, phase.reload_discriminator, num_images)
            path = folder / f"update-{then:09d}.safetensors"
            if state.update == then:
                tensors = whole(state.discriminator.state_dict(), ranks)
                if ranks.is_main_process:
                    with atomic_path(path) as aside:
                        save_tensors(aside, tensors)
                ranks.barrier()
            if state.update == start:
                tensors = placed(_kept(path), state.discriminator.state_dict())
                load_exactly(state.discriminator, tensors, path)
                done.append(f"D put back to epoch {phase.reload_discriminator:g}")
        if phase.reload_ema == "epoch" and start <= state.update < end and begins(run, state.update, start, num_images):
            state.generator.load_state_dict(state.ema.state_dict())
            done.append("G replaced by its moving average")
        start = end
    return done


def begins(run: Run, update: int, start: int, num_images: int) -> bool:
    """Tell whether a phase that started at `start`, or an epoch, begins with this update."""
    epoch = update * run.batch_size // num_images
    return update == start or update == update_at(run, epoch, num_images)


def _kept(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"Found no {path}, which a phase puts D back to: remove the run's folder in work/, train anew.")
    return load_tensors(path)
