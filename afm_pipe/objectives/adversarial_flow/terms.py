"""The loss terms of D and of G, each with name, value and weight. To add a term, add an entry here and its param.

Shapes: N images of a micro-batch, n penalized ones, C, H, W of latents. Every value is a 0-d tensor.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from afm_pipe.objectives.adversarial_flow.guidance import GuidanceLoss
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
    """The inputs of D's loss terms."""

    logits: Logits
    epsilon: float  # finite-difference step
    weighting: Tensor | float  # w(s, t) of the penalized images, (n,)


class GLossInputs(NamedTuple):
    """The inputs of G's loss terms other than the adversarial one."""

    output: Tensor  # (N, C, H, W), G(x_s)
    source: Tensor  # (N, C, H, W), x_s
    weighting: Tensor | float  # w(s, t), (N,)
    guidance: GuidanceLoss | None


class LossTerm(NamedTuple):
    """A term of a loss: its column in the curves, its value and weight, and the images over which it is a mean."""

    term: Term
    value: Callable[[Any], Tensor]
    weight: Callable[[Run, Hyperparameters], float] = lambda run, hp: 1.0
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
        lambda run, hp: run.penalty.weight,
        "penalized",
    ),
    LossTerm(
        Term("r2", "R2 penalty", "Squared slope of D at generated latents, unweighted, log scale", log=True),
        lambda d: gradient_penalty(d.logits.fake_penalized, d.logits.fake_perturbed, d.epsilon, d.weighting),
        lambda run, hp: run.penalty.weight,
        "penalized",
    ),
    LossTerm(
        Term("logit_centering", "Logit centering", "Mean (D(x) + D(G(z)))², log scale", log=True),
        lambda d: logit_centering(d.logits.real, d.logits.fake),
        lambda run, hp: run.logit_centering,
    ),
)
"""Terms of D's loss (paper section 3), in the order of addition."""

G_ADVERSARIAL = Term(
    "g_adversarial", "Generator loss", "softplus(−(D(G(z)) − D(x))), log scale", log=True, role="adversarial_loss"
)
"""The term of G's loss whose gradient is normalized."""

G_TERMS = (
    LossTerm(
        Term("g_transport", "Transport loss", "Mean squared transport distance, unweighted, log scale", log=True),
        lambda g: transport_cost(g.output, g.source, g.weighting),
        lambda run, hp: hp.weights["transport"],
    ),
    LossTerm(
        Term("g_guidance", "Guidance loss", "Weighted"),
        lambda g: g.output.new_zeros(()) if g.guidance is None else g.guidance(g.output),
    ),
)
"""The other terms of G's loss (paper section 3), in the order of addition."""
