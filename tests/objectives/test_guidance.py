"""Classifier guidance against the paper's formula."""

import pytest
import torch
import torch.nn.functional as F

from afm_pipe.objectives.adversarial_flow.guidance import multi_step_guidance, one_step_guidance
from afm_pipe.params import Guidance


def linear_classifier(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A classifier whose logits say what it was shown: sums of the latent's first two channels, and the time."""
    return torch.stack([x[:, 0].sum((1, 2)), x[:, 1].sum((1, 2)), 10 * t], dim=1)


def test_guidance_is_the_papers_formula_at_the_interpolated_output() -> None:
    output, labels = torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 2, 0, 1])
    guidance = Guidance(scale=0.003, t=(0.2, 0.6))
    found = one_step_guidance(linear_classifier, guidance, labels, (5, 2, 3, 3), torch.Generator().manual_seed(3))(
        output
    )
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 2, 3, 3, generator=generator)
    t = 0.2 + 0.4 * torch.rand(5, generator=generator)
    assert ((t >= 0.2) & (t <= 0.6)).all()
    noisy = (1 - t[:, None, None, None]) * output + t[:, None, None, None] * z
    log_likelihood = F.log_softmax(linear_classifier(noisy, t), dim=1)[torch.arange(5), labels]
    assert found.item() == pytest.approx(-0.003 * log_likelihood.mean().item(), rel=1e-5)


def test_multi_step_guidance_looks_at_the_chosen_target_times_alone() -> None:
    output, labels = torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 0, 1])
    t = torch.tensor([0.0, 0.25, 0.5, 0.75])
    guide = multi_step_guidance(linear_classifier, Guidance(scale=2.0, at=(0.0, 0.25)), labels, t)
    losses = F.cross_entropy(linear_classifier(output, t), labels, reduction="none")
    assert guide(output).item() == pytest.approx(2 * (losses[0] + losses[1]).item() / 4, rel=1e-5)
