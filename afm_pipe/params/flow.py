"""Params of flow matching and of continuous adversarial flows."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from afm_pipe.params.base import Fraction, NotNegative, NotNegativeCount, Section


class OdeSampling(Section):
    """Solution of the ODE dx/dt = v(x, t) from noise at t = 1 to data at t = 0, in equal steps."""

    solver: Literal["euler", "heun"]
    """euler: one velocity per step; heun: two."""
    steps: Annotated[int, Field(ge=1, le=250)]
    """Default number of steps."""
    guidance_scale: NotNegative
    """Classifier-free guidance: v(no label) + scale * (v(label) - v(no label)); 1: none."""
    guidance_interval: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    """Times, from low to high, at which to guide."""

    def evaluations(self, steps: int) -> list[float]:
        """Return the times of the velocities that `steps` steps need, in order."""
        ends = [1 - step / steps for step in range(steps + 1)]
        return ends[:-1] if self.solver == "euler" else [t for pair in zip(ends, ends[1:], strict=False) for t in pair]

    def guides(self, t: float) -> bool:
        """Return whether the velocity at a time is guided."""
        low, high = self.guidance_interval
        return self.guidance_scale != 1 and low <= t <= high

    def passes(self, steps: int | None = None) -> int:
        """Return the number of forward passes of the network per sample (NFE); guidance doubles them."""
        return sum(1 + self.guides(t) for t in self.evaluations(steps or self.steps))


class FlowSettings(Section):
    """Settings of the objectives flow_matching and continuous_adversarial_flow."""

    times: Literal["uniform", "logit_normal"]
    """Times in training: U(0, 1), or the logistic function of N(0, 1)."""
    label_dropout: Fraction
    """Fraction of labels replaced by the label of no class; more than 0 adds that label to the networks."""
    warmup: NotNegativeCount
    """continuous_adversarial_flow: updates 0 to `warmup` are of D alone; discriminator_updates says how many of D go
    before each one of G after them. Unused by flow_matching."""
    sampling: OdeSampling

    @model_validator(mode="after")
    def _check(self) -> "FlowSettings":
        sampling = self.sampling
        low, high = sampling.guidance_interval
        if low > high:
            raise ValueError(f"expected sampling.guidance_interval from low to high, found {[low, high]}")
        if sampling.guidance_scale != 1 and self.label_dropout == 0:
            raise ValueError(
                "expected label_dropout above 0 for sampling.guidance_scale other than 1, since guidance needs the "
                "velocity without a label; found 0"
            )
        return self
