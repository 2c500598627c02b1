"""The loss terms of D and of G, each with its name, weight and value: a new term is an entry here and its param.

Shapes: N images of a micro-batch, n penalized ones, C, H, W of latents. Every value is a 0-d tensor.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from afm_pipe.objectives.adversarial_flow.losses import (
    Logits,
    gradient_penalty,
    logit_centering,
    relativistic,
    transport_cost,
)
from afm_pipe.objectives.base import Hyperparameters, Term
from afm_pipe.params import Run


class Guide(Protocol):
    """A weighted loss of G's output."""

    def __call__(self, output: Tensor) -> Tensor:
        """Return the loss of G's output (N, C, H, W)."""


class Judged(NamedTuple):
    """What D's loss is a function of."""

    logits: Logits
    epsilon: float  # step of the finite differences
    weighting: Tensor | float  # w(s, t) of the penalized images, (n,)


class Generated(NamedTuple):
    """What G's loss is a function of, besides D's logits."""

    output: Tensor  # (N, C, H, W), G(x_s)
    source: Tensor  # (N, C, H, W), x_s
    weighting: Tensor | float  # w(s, t), (N,)
    guide: Guide | None


class LossTerm(NamedTuple):
    """A term of a loss: its column, its value, its weight, and the share of the batch that it is a mean over."""

    term: Term
    value: Callable[[Any], Tensor]
    weight: Callable[[Run, Hyperparameters], float] = lambda run, now: 1.0
    over: Literal["batch", "penalized"] = "batch"


D_TERMS = (
    LossTerm(
        Term("d_adversarial", "Discriminator loss", "Relativistic, log scale", log=True, role="adversarial_loss"),
        lambda seen: relativistic(seen.logits.real, seen.logits.fake),
    ),
    LossTerm(
        Term("r1", "R1 penalty", "Unweighted, log scale", log=True),
        lambda seen: gradient_penalty(seen.logits.real, seen.logits.real_moved, seen.epsilon, seen.weighting),
        lambda run, now: run.penalty.weight,
        "penalized",
    ),
    LossTerm(
        Term("r2", "R2 penalty", "Unweighted, log scale", log=True),
        lambda seen: gradient_penalty(seen.logits.fake, seen.logits.fake_moved, seen.epsilon, seen.weighting),
        lambda run, now: run.penalty.weight,
        "penalized",
    ),
    LossTerm(
        Term("logit_centering", "Logit centering", "Mean (D(x) + D(G(z)))², log scale", log=True),
        lambda seen: logit_centering(seen.logits.real, seen.logits.fake),
        lambda run, now: run.logit_centering,
    ),
)
"""Terms of D's loss (paper section 3), in the order they are added."""

G_ADVERSARIAL = Term("g_adversarial", "Generator loss", "Relativistic, log scale", log=True, role="adversarial_loss")
"""Of G's loss the term whose gradient is normalized at G's output."""

G_TERMS = (
    LossTerm(
        Term("g_transport", "Transport loss", "Unweighted, log scale", log=True),
        lambda made: transport_cost(made.output, made.source, made.weighting),
        lambda run, now: now.weights["transport"],
    ),
    LossTerm(
        Term("g_guidance", "Guidance loss", "Weighted"),
        lambda made: made.output.new_zeros(()) if made.guide is None else made.guide(made.output),
    ),
)
"""The other terms of G's loss (paper section 3), in the order they are added."""
