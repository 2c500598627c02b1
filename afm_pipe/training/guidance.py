"""Flow-based classifier guidance: a classifier's gradient on G's output, at noise levels it was trained for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.params import Guidance
from afm_pipe.training.losses import interpolate
from afm_pipe.training.step import Guide


def guide_to_data(
    classifier: nn.Module, guidance: Guidance, labels: Tensor, shape: tuple[int, ...], generator: torch.Generator
) -> Guide:
    """Return the loss scale * CE(C(interp(output, z', t'), t'), labels) of one step, with z' and t' drawn now.

    z' is fresh noise of `shape` (N, C, H, W), t' ~ U(low, high) (paper section 3).
    """
    assert guidance.t is not None
    low, high = guidance.t
    z = torch.randn(shape, generator=generator).to(labels.device)
    t = (low + (high - low) * torch.rand(shape[0], generator=generator)).to(labels.device)
    return lambda output: guidance.scale * F.cross_entropy(classifier(interpolate(output, z, t), t), labels)


def guide_at_times(classifier: nn.Module, guidance: Guidance, labels: Tensor, t: Tensor) -> Guide:
    """Return the loss of several steps: where the target time t (N,) is one of guidance.at, C sees the output as it is.

    The mean is over the whole batch, so that a guided sample weighs the same whatever the others' times are.
    """
    assert guidance.at is not None
    times = torch.tensor(guidance.at, device=t.device)
    chosen = ((t[:, None] - times).abs() < 1e-6).any(dim=1)  # (N,)
    return lambda output: (
        guidance.scale * (F.cross_entropy(classifier(output, t), labels, reduction="none") * chosen).mean()
    )
