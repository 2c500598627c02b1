"""The measurements of the toy experiment, as results/toy/results.json holds them. Free of torch."""

from typing import Literal

from pydantic import BaseModel

Outcome = Literal["supported", "not supported", "undecided"]


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


class StrongResults(BaseModel, frozen=True):
    """One-step models trained with some number of D updates to one of G; distances by seed, None where not finite."""

    discriminator_updates: int
    transport: bool
    normalized: bool
    rms: list[float | None]
    """RMS distance to the optimal map."""
    w1: list[float | None]
    discriminator_gap: float
    """Fraction by which D's loss falls in further updates against the final G: 0 at D's optimum."""


class StrongClaim(BaseModel, frozen=True):
    """A claim about the distance to the optimal map: its verdict, and the ratio of distances with its 95 % interval."""

    claim: str
    outcome: Outcome
    ratio: float | None = None
    interval: tuple[float, float] | None = None


class Strong(BaseModel, frozen=True):
    """The strong discriminator: all settings, and the claims that they decide."""

    settings: list[StrongResults]
    claims: list[StrongClaim]
    pairs: int
    seeds: int


class ToyResults(BaseModel, frozen=True):
    """All measurements; `spread_ratio` is that of the GAN over that of the one-step adversarial flow model."""

    maps: dict[str, MapResults]
    guidance: dict[str, GuidanceResults]
    scale: OwnScale
    spread_ratio: float
    strong: Strong | None = None
