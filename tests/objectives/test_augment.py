"""Augmentation of what D sees, and of what the classifier learns from."""

import pytest
import torch

from afm_pipe.objectives.adversarial_flow.augment import affine_view, discriminator_view
from afm_pipe.params import Affine, Augmentation


def test_augmentation_is_the_same_for_real_and_fake_and_passes_gradients() -> None:
    augment = Augmentation(probability=1.0, translate=0.3, erasings=1, area=(0.1, 0.5))
    view = discriminator_view(augment, 50, 8, torch.Generator().manual_seed(0))
    real = torch.rand(50, 4, 8, 8) + 1
    fake = real.clone().requires_grad_()
    assert torch.equal(view(real), view(fake).detach())
    view(fake).sum().backward()
    assert fake.grad is not None
    assert set(fake.grad.unique().tolist()) == {0.0, 1.0}


def test_translation_moves_whole_pixels_and_lets_zeros_in() -> None:
    augment = Augmentation(probability=1.0, translate=0.3, erasings=0, area=(0.1, 0.5))
    x = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(200, 1, 8, 8)
    moved = discriminator_view(augment, 200, 8, torch.Generator().manual_seed(0))(x)
    seen = set()
    for one in moved[:, 0]:
        dy, dx = next(
            (dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if torch.equal(one, shifted(x[0, 0], dy, dx))
        )
        seen.add((dy, dx))
    assert len(seen) == 25


def shifted(x: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[max(dy, 0) : 8 + min(dy, 0), max(dx, 0) : 8 + min(dx, 0)] = x[
        max(-dy, 0) : 8 + min(-dy, 0), max(-dx, 0) : 8 + min(-dx, 0)
    ]
    return out


def test_erasing_covers_the_requested_share_with_a_rectangle() -> None:
    augment = Augmentation(probability=1.0, translate=0.0, erasings=1, area=(0.25, 0.25))
    erased = discriminator_view(augment, 300, 16, torch.Generator().manual_seed(0))(torch.ones(300, 1, 16, 16)) == 0
    shares = erased.float().mean((1, 2, 3))
    assert shares.mean().item() == pytest.approx(0.25, abs=0.01)
    for mask in erased[:, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()


def test_augmentation_touches_the_requested_share() -> None:
    augment = Augmentation(probability=0.4, translate=0.0, erasings=1, area=(0.1, 0.5))
    seen = discriminator_view(augment, 2000, 8, torch.Generator().manual_seed(0))(torch.ones(2000, 1, 8, 8))
    assert (seen != 1).flatten(1).any(1).float().mean().item() == pytest.approx(0.4, abs=0.03)


def test_affine_view_magnifies_rotates_and_reflects() -> None:
    still = Affine(probability=1.0, degrees=0.0, translate=0.0, scale=(1.0, 1.0))
    x = torch.randn(4, 2, 8, 8)
    assert torch.allclose(affine_view(still, 4, torch.Generator())(x), x, atol=1e-5)
    never = Affine(probability=0.0, degrees=90.0, translate=0.5, scale=(2.0, 2.0))
    assert torch.allclose(affine_view(never, 4, torch.Generator())(x), x, atol=1e-5)
    larger = Affine(probability=1.0, degrees=0.0, translate=0.0, scale=(2.0, 2.0))
    ramp = torch.linspace(-1, 1, 9)[None, None, None].expand(1, 1, 9, 9)
    middle = affine_view(larger, 1, torch.Generator())(ramp)
    assert middle[0, 0, 4, 8].item() == pytest.approx(0.5, abs=0.01)
    ones = torch.ones(3, 1, 8, 8)
    moving = Affine(probability=1.0, degrees=30.0, translate=0.4, scale=(0.5, 1.5))
    assert torch.allclose(affine_view(moving, 3, torch.Generator())(ones), ones, atol=1e-5)  # no zeros come in
