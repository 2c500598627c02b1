"""The loss terms of D and of G, each with its name, weight and value: a new term is an entry here and its param.

Shapes: N images of a micro-batch, n penalized ones, C, H, W of latents. Every value is a 0-d tensor.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from afm_pipe.objectives.adversarial_flow.guidance import Guide
from afm_pipe.objectives.adversarial_flow.losses import (
    Logits,
    gradient_penalty,
    logit_centering,
    relativistic,
    transport_cost,
)
from afm_pipe.objectives.base import Hyperparameters, Term
from afm_pipe.params import Run


class DLossInputs(NamedTuple):
    """What D's loss terms are functions of."""

    logits: Logits
    epsilon: float  # step of the finite differences
    weighting: Tensor | float  # w(s, t) of the penalized images, (n,)


class GLossInputs(NamedTuple):
    """What G's loss terms, besides the adversarial one, are functions of."""

    output: Tensor  # (N, C, H, W), G(x_s)
    source: Tensor  # (N, C, H, W), x_s
    weighting: Tensor | float  # w(s, t), (N,)
    guide: Guide | None


class LossTerm(NamedTuple):
    """A term of a loss: its column, its value, its weight, and the images that it is a mean over."""

    term: Term
    value: Callable[[Any], Tensor]
    weight: Callable[[Run, Hyperparameters], float] = lambda run, now: 1.0
    over: Literal["batch", "penalized"] = "batch"


D_TERMS = (
    LossTerm(
        Term(
            "d_adversarial",
            "Discriminator loss",
            "softplus(−(D(x) − D(G(z)))), log scale; 0.69: undecided",
            log=True,
            role="adversarial_loss",
        ),
        lambda d: relativistic(d.logits.real, d.logits.fake),
    ),
    LossTerm(
        Term("r1", "R1 penalty", "Squared slope of D at real latents, unweighted, log scale", log=True),
        lambda d: gradient_penalty(d.logits.real_penalized, d.logits.real_perturbed, d.epsilon, d.weighting),
        lambda run, now: run.penalty.weight,
        "penalized",
    ),
    LossTerm(
        Term("r2", "R2 penalty", "Squared slope of D at generated latents, unweighted, log scale", log=True),
        lambda d: gradient_penalty(d.logits.fake_penalized, d.logits.fake_perturbed, d.epsilon, d.weighting),
        lambda run, now: run.penalty.weight,
        "penalized",
    ),
    LossTerm(
        Term("logit_centering", "Logit centering", "Mean (D(x) + D(G(z)))², log scale", log=True),
        lambda d: logit_centering(d.logits.real, d.logits.fake),
        lambda run, now: run.logit_centering,
    ),
)
"""Terms of D's loss (paper section 3), in the order of addition."""

G_ADVERSARIAL = Term(
    "g_adversarial", "Generator loss", "softplus(−(D(G(z)) − D(x))), log scale", log=True, role="adversarial_loss"
)
"""The term of G's loss whose gradient is normalized at G's output."""

G_TERMS = (
    LossTerm(
        Term("g_transport", "Transport loss", "Mean squared transport distance, unweighted, log scale", log=True),
        lambda g: transport_cost(g.output, g.source, g.weighting),
        lambda run, now: now.weights["transport"],
    ),
    LossTerm(
        Term("g_guidance", "Guidance loss", "Weighted"),
        lambda g: g.output.new_zeros(()) if g.guide is None else g.guide(g.output),
    ),
)
"""The other terms of G's loss (paper section 3), in the order of addition."""
