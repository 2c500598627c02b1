"""Augmentation of what D sees, drawn as the release's kornia operators draw it."""

import pytest
import torch

from afm_pipe.objectives.adversarial_flow.augment import draw_translate_and_erase
from afm_pipe.params import Augmentation

SIDE, COUNT = 32, 4000


def view(probability: float, translate: float, erasings: int) -> torch.Tensor:
    settings = Augmentation(probability=probability, translate=translate, erasings=erasings, area=(0.1, 0.5))
    drawn = draw_translate_and_erase(settings, COUNT, SIDE, torch.Generator().manual_seed(0))
    return drawn(torch.ones(COUNT, 1, SIDE, SIDE))[:, 0]


def test_translations_move_content_right_and_down_only() -> None:
    seen = view(1.0, 0.3, 0)
    rows, columns = seen.amax(2), seen.amax(1)  # which hold anything
    assert rows[:, -1].all()
    assert columns[:, -1].all()
    for kept in (rows, columns):
        shift = SIDE - kept.sum(1)
        assert shift.max() <= round(0.3 * SIDE)
        assert shift.min() == 0
        assert shift.float().mean().item() == pytest.approx(0.15 * SIDE, rel=0.05)


def test_half_of_the_erased_rectangles_are_taller_than_wide() -> None:
    erased = 1 - view(1.0, 0.0, 1)
    heights, widths = erased.amax(2).sum(1), erased.amax(1).sum(1)
    ratio = heights / widths
    assert ((ratio > 1.1).float().mean() - (ratio < 1 / 1.1).float().mean()).abs() < 0.1
    tall = ratio[(ratio > 1.15) & (heights < SIDE) & (widths < SIDE)]
    assert tall.mean().item() == pytest.approx(2.1, abs=0.35)  # U(1, 3.3), less those cut off by the side
    assert erased.mean().item() == pytest.approx(0.3, abs=0.03)  # the area is U(0.1, 0.5)


def test_a_probability_of_zero_changes_nothing() -> None:
    assert view(0.0, 0.3, 3).all()
