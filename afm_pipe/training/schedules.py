"""What holds at which moment of a run: its phase, learning rate and transport weight. Time is images seen by G."""

from math import cos, pi
from typing import NamedTuple

from afm_pipe.params import Ema, Run


class Setting(NamedTuple):
    """What one update is made with."""

    phase: int
    lr: float
    lr_discriminator: float
    transport: float
    gradient_clip: float | None


def num_updates(run: Run, num_images: int) -> int:
    """Return the number of G updates until the last phase's end, rounded up to whole batches."""
    return -(-round(run.phases[-1].until_epoch * num_images) // run.batch_size)


def setting_at(run: Run, update: int, num_images: int) -> Setting:
    """Return the setting of an update (counted from 0) on a data set of `num_images` images."""
    epoch = update * run.batch_size / num_images
    index = next((i for i, phase in enumerate(run.phases) if epoch < phase.until_epoch), len(run.phases) - 1)
    phase = run.phases[index]
    transport = phase.transport or run.transport
    decay_updates = round(transport.decay_epochs * num_images / run.batch_size)
    lr = phase.lr or run.lr
    return Setting(
        phase=index,
        lr=lr,
        lr_discriminator=phase.lr_discriminator or lr,
        transport=cosine(transport.start, transport.end, update, decay_updates),
        gradient_clip=phase.gradient_clip,
    )


def cosine(start: float, end: float, update: int, updates: int) -> float:
    """Return a half cosine over `updates` updates, from start at the first to end at the last and ever after."""
    progress = min(update / max(updates - 1, 1), 1.0)
    return end + (start - end) * (1 + cos(pi * progress)) / 2


def ema_decay_at(ema: Ema, update: int) -> float:
    """Return the decay of the moving average at an update, counted from 0."""
    return min(ema.decay, (1 + update) / (10 + update)) if ema.warmup else ema.decay
