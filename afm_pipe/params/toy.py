"""Params of the 1-D toy experiment."""

from typing import Annotated

from pydantic import Field, model_validator

from afm_pipe.params.base import Count, Fraction, NotNegative, Positive, Section
from afm_pipe.params.training import Ema, Penalty


class ToyGuidance(Section):
    """The class-conditional experiment: one class per mode, guided by the exact classifier."""

    pairs: Count
    transport: NotNegative
    """lambda_ot; small, since each class is one mode, which the transport loss pulls toward 0."""
    scale: NotNegative
    """lambda_cg of plain and of flow-based guidance."""
    t: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    """Range of target times t' of flow-based guidance; plain guidance has t' = 0."""
    cfg_scale: Positive
    """Scale of the exact classifier-free guidance used for comparison; 1 is no guidance."""


class StrongDiscriminator(Section):
    """One-step models against ever stronger discriminators, with and without transport and gradient normalization."""

    updates: Annotated[tuple[Count, ...], Field(strict=False, min_length=2)]
    """Updates of D to one of G, ascending; the last stands for a D at its optimum."""
    pairs: Count
    """Updates of G."""


class Toy(Section):
    """The 1-D toy experiment, where the optimal map is known (paper Figures 1 to 3). No gradient normalization."""

    seeds: Annotated[int, Field(ge=2)]
    """Networks trained per setting, in parallel."""
    width: Count
    """Width of the four hidden layers of G and D; 1024 in the paper."""
    batch_size: Count
    """1024 in the paper."""
    pairs: Count
    """Number of updates of D, and of G; 5,000 each in the paper."""
    flow_updates: Count
    """Updates of flow matching; each costs about a fifth of a pair of updates of D and G."""
    lr: Positive
    """Learning rate of Adam; 1e-4 in the paper."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    ema: Ema
    penalty: Penalty
    """In the paper: weight 0.01, on the whole batch."""
    logit_centering: NotNegative
    transport: Positive
    """lambda_ot of adversarial flow models, constant."""
    steps: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Step counts: one adversarial flow model is trained for each, and flow matching is sampled with each."""
    sweep: Annotated[tuple[Positive, ...], Field(strict=False)]
    """Additional values of lambda_ot for one-step models; 0, the GAN, is always trained."""
    guidance: ToyGuidance
    strong_discriminator: StrongDiscriminator | None
    """Null: not trained; each of its updates costs about half a pair."""
    points: Count
    """Number of noise values, at equally spaced quantiles of N(0, 1), at which maps are evaluated."""

    @model_validator(mode="after")
    def _check(self) -> "Toy":
        if 1 not in self.steps:
            raise ValueError(f"expected steps to hold 1, which the GAN is compared with, found {list(self.steps)}")
        if round(self.batch_size * self.penalty.batch_fraction) < 1:
            raise ValueError(
                f"expected penalty.batch_fraction to leave at least one of {self.batch_size} samples, "
                f"found {self.penalty.batch_fraction}"
            )
        return self
