"""Flow-based classifier guidance: a cross-entropy loss of G's output, at noise levels the classifier is trained on."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.data.move import to_device
from afm_pipe.data.order import ALL
from afm_pipe.objectives.adversarial_flow.losses import interpolate
from afm_pipe.params import Guidance


class GuidanceLoss(Protocol):
    """The weighted guidance loss as a function of G's output."""

    def __call__(self, output: Tensor) -> Tensor:
        """Return the loss of G's output (N, C, H, W)."""


class OneStepGuidance(NamedTuple):
    """The loss scale * CE(C(interp(output, z', t'), t'), labels) of one-step generation (paper section 3)."""

    classifier: nn.Module
    scale: float
    labels: Tensor  # (N,)
    z: Tensor  # (N, C, H, W)
    t: Tensor  # (N,)

    def __call__(self, output: Tensor) -> Tensor:
        """Return the loss of G's output (N, C, H, W)."""
        noisy = interpolate(output, self.z, self.t)
        return self.scale * F.cross_entropy(self.classifier(noisy, self.t), self.labels)


class MultiStepGuidance(NamedTuple):
    """The loss of multi-step generation: CE(C(output, t), labels) of samples whose target time is one of guidance.at.

    The mean is over the whole batch, so that the weight of a sample does not depend on the times of the others.
    """

    classifier: nn.Module
    scale: float
    labels: Tensor  # (N,)
    t: Tensor  # (N,), target times
    chosen: Tensor  # (N,) bool

    def __call__(self, output: Tensor) -> Tensor:
        """Return the loss of G's output (N, C, H, W)."""
        losses = F.cross_entropy(self.classifier(output, self.t), self.labels, reduction="none")
        return self.scale * (losses * self.chosen).mean()


def one_step_guidance(
    classifier: nn.Module,
    guidance: Guidance,
    labels: Tensor,
    shape: tuple[int, ...],
    generator: torch.Generator,
    shard: slice = ALL,
) -> OneStepGuidance:
    """Draw noise z' of `shape` (N, C, H, W) and t' ~ U(low, high) for one-step guidance; return the part of `shard`.

    `labels` are those of the shard.
    """
    assert guidance.t is not None
    low, high = guidance.t
    z = torch.randn(shape, generator=generator)[shard]
    t = (low + (high - low) * torch.rand(shape[0], generator=generator))[shard]
    return to_device(OneStepGuidance(classifier, guidance.scale, labels, z, t), labels.device)


def multi_step_guidance(classifier: nn.Module, guidance: Guidance, labels: Tensor, t: Tensor) -> MultiStepGuidance:
    """Return multi-step guidance of samples with target times t (N,)."""
    assert guidance.at is not None
    chosen = torch.stack([(t - time).abs() < 1e-6 for time in guidance.at]).any(dim=0)  # (N,)
    return MultiStepGuidance(classifier, guidance.scale, labels, t, chosen)
