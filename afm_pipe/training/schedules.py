"""What holds at which moment of a run: its phase, learning rate and transport weight. Time is images seen by G."""

from bisect import bisect_right
from math import ceil, cos, pi
from typing import NamedTuple

from afm_pipe.params import Ema, Phase, Run


class Setting(NamedTuple):
    """What one update is made with."""

    phase: Phase
    lr: float
    lr_discriminator: float
    transport: float


def num_updates(run: Run, num_images: int) -> int:
    """Return the number of G updates until the last phase's end, rounded up to whole batches."""
    return update_at(run, run.phases[-1].until_epoch, num_images)


def update_at(run: Run, epoch: float, num_images: int) -> int:
    """Return the first update that starts when G has seen `epoch` epochs or more."""
    return ceil(round(epoch * num_images) / run.batch_size)


def setting_at(run: Run, update: int, num_images: int) -> Setting:
    """Return the setting of an update (counted from 0) on a data set of `num_images` images."""
    ends = [update_at(run, phase.until_epoch, num_images) for phase in run.phases]
    index = min(bisect_right(ends, update), len(ends) - 1)
    phase = run.phases[index]
    transport = phase.transport or run.transport
    decay_updates = round(transport.decay_epochs * num_images / run.batch_size)
    lr = phase.lr or run.lr
    return Setting(
        phase=phase,
        lr=lr,
        lr_discriminator=phase.lr_discriminator or lr,
        transport=cosine(transport.start, transport.end, update, decay_updates),
    )


def cosine(start: float, end: float, update: float, updates: int) -> float:
    """Return a half cosine over `updates` updates, from start at the first to end at the last and ever after."""
    progress = min(update / max(updates - 1, 1), 1.0)
    return end + (start - end) * (1 + cos(pi * progress)) / 2


def ema_decay_at(ema: Ema, update: int) -> float:
    """Return the decay of the moving average at an update, counted from 0."""
    return min(ema.decay, (1 + update) / (10 + update)) if ema.warmup else ema.decay
