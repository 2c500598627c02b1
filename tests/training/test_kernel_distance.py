"""The kernel distance and its standard error."""

import math

import numpy as np
import pytest

from afm_pipe.training.kernel_distance import kid, kid_with_error


def draw(random: np.random.Generator, count: int, shift: float) -> np.ndarray:
    return random.standard_normal((count, 16)) + shift


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_error_is_the_scatter_over_samples(shift: float) -> None:
    random = np.random.default_rng(0)
    real = draw(random, 300, 0.0)
    found = [kid_with_error(real, draw(random, 300, shift)) for _ in range(200)]
    scatter = float(np.std([value for value, _ in found], ddof=1))
    assert float(np.mean([error for _, error in found])) == pytest.approx(scatter, rel=0.25)


def test_the_distance_is_kids() -> None:
    random = np.random.default_rng(1)
    real, features = draw(random, 400, 0.0), draw(random, 400, 0.3)
    assert kid_with_error(real, features)[0] == pytest.approx(kid(real, features, 1, 400, 0), rel=1e-9)


def test_the_distance_to_one_real_image_is_unknown_and_no_division_by_zero() -> None:
    features = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    for real, samples in ((features[:1], features), (features, features[:1]), (features[:1], features[:1])):
        assert kid_with_error(real, samples) == (0.0, math.inf)
