"""Params of the study on a line."""

from typing import Annotated

from pydantic import Field, model_validator

from afm_pipe.params.base import Count, Fraction, NotNegative, Positive, Section
from afm_pipe.params.training import Ema, Penalty


class ToyGuidance(Section):
    """The class-conditional part of the study: one class per mode, classified exactly."""

    pairs: Count
    transport: NotNegative
    """lambda_ot; small, since each class has one mode and the transport loss draws it towards 0."""
    scale: NotNegative
    """lambda_cg, of plain and of flow-based guidance alike."""
    t: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    """Range of times t' of the flow-based guidance; plain guidance is t' = 0."""
    cfg_scale: Positive
    """Scale of the exact classifier-free guidance that both are shown against; 1 is none."""


class Toy(Section):
    """The study on a line, where the best map is known exactly (paper Figures 1 to 3); no gradient normalisation."""

    seeds: Annotated[int, Field(ge=2)]
    """Trainings of each setting, at once."""
    width: Count
    """Of the four hidden layers of generator and discriminator; 1024 in the paper."""
    batch_size: Count
    """1024 in the paper."""
    pairs: Count
    """Updates of the discriminator and of the generator, each; 5,000 in the paper."""
    flow_updates: Count
    """Updates of flow matching, which cost about a fifth of a pair each."""
    lr: Positive
    """Adam's; 1e-4 in the paper."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    ema: Ema
    penalty: Penalty
    """Weight 0.01 on the whole batch in the paper."""
    logit_centering: NotNegative
    transport: Positive
    """lambda_ot of the adversarial flow models, constant."""
    steps: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Adversarial flow models of so many steps are trained, and flow matching is sampled in so many."""
    sweep: Annotated[tuple[Positive, ...], Field(strict=False)]
    """Further values of lambda_ot, in one step; 0, the GAN, is always trained."""
    guidance: ToyGuidance
    points: Count
    """Noises, at equal shares of N(0, 1), on which maps are measured."""

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
