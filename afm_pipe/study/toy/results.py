"""The measurements of the toy experiment, as results/toy/results.json holds them. Free of torch."""

from typing import Literal

from pydantic import BaseModel


class MapResults(BaseModel, frozen=True):
    """The measurements of one setting: mean and standard deviation over seeds, over N(0, 1) noise."""

    method: Literal["gan", "flow", "afm"]
    steps: int
    transport: float | None = None
    w1_mean: float
    """W1 distance of the samples to the data."""
    w1_std: float
    rms_mean: float
    """RMS distance to the optimal map."""
    rms_std: float
    spread_mean: float
    """RMS distance to the maps of the other seeds."""
    spread_std: float
    move_mean: float
    """RMS distance G(z) - z."""
    move_std: float


class GuidanceResults(BaseModel, frozen=True):
    """Mean distance of the samples of outer and inner classes from 0, and their standard deviation within a class."""

    outer_mean: float
    outer_std: float
    inner_mean: float
    inner_std: float
    within_class_std_mean: float
    within_class_std_std: float


class Scale(BaseModel, frozen=True):
    """The size of the experiment; `updates` are those of D and G together."""

    width: int
    batch_size: int
    updates: int
    penalty_weight: float
    lr: float


PAPER = Scale(width=1024, batch_size=1024, updates=10_000, penalty_weight=0.01, lr=1.0e-4)


class OwnScale(Scale, frozen=True):
    """Our size, beside the paper's."""

    seeds: int
    points: int
    paper: Scale = PAPER


class ToyResults(BaseModel, frozen=True):
    """All measurements; `spread_ratio` is that of the GAN over that of the one-step adversarial flow model."""

    maps: dict[str, MapResults]
    guidance: dict[str, GuidanceResults]
    scale: OwnScale
    spread_ratio: float
