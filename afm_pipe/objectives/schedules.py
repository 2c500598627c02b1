"""Schedules of a run, as functions of the number of images seen by G."""

from bisect import bisect_right
from math import ceil, cos, pi

from afm_pipe.params import Ema, Phase, Run


def num_updates(run: Run, num_images: int) -> int:
    """Return the number of updates of G until the end of the last phase, rounded up to whole batches."""
    return update_at(run, run.phases[-1].until_epoch, num_images)


def update_at(run: Run, epoch: float, num_images: int) -> int:
    """Return the first update before which G has seen at least `epoch` epochs."""
    return ceil(round(epoch * num_images) / run.batch_size)


def phase_at(run: Run, update: int, num_images: int) -> Phase:
    """Return the phase of an update (counted from 0) on a data set of `num_images` images."""
    ends = [update_at(run, phase.until_epoch, num_images) for phase in run.phases]
    return run.phases[min(bisect_right(ends, update), len(ends) - 1)]


def cosine(start: float, end: float, update: float, updates: int) -> float:
    """Return a half-cosine schedule: `start` at update 0, `end` from update `updates` - 1 on."""
    progress = min(update / max(updates - 1, 1), 1.0)
    return end + (start - end) * (1 + cos(pi * progress)) / 2


def transport_at(run: Run, update: int, num_images: int, clock: float | None = None) -> float:
    """Return lambda_ot at an update; `clock`, by default the update itself, moves along the cosine in its place."""
    transport = phase_at(run, update, num_images).transport or run.transport
    decay_updates = round(transport.decay_epochs * num_images / run.batch_size)
    return cosine(transport.start, transport.end, update if clock is None else clock, decay_updates)


def transport_decayed(run: Run, update: int, num_images: int, clock: float) -> bool:
    """Return whether lambda_ot changes no more."""
    transport = phase_at(run, update, num_images).transport or run.transport
    return transport.start == transport.end or clock >= update_at(run, transport.decay_epochs, num_images)


def ema_decay_at(ema: Ema, update: int) -> float:
    """Return the EMA decay at an update, counted from 0."""
    return min(ema.decay, (1 + update) / (10 + update)) if ema.warmup else ema.decay
