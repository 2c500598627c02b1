"""The sliced Wasserstein distance against known values."""

import numpy as np
import pytest

from afm_pipe.evaluation.intervals import normal_interval
from afm_pipe.evaluation.sliced import sliced_distance

DIM = 6


def draw(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(count) % 4
    means = np.random.default_rng(9).normal(size=(4, DIM))
    return (random.gamma(2.0, size=(count, DIM)) + means[labels]).astype(np.float32), labels


def test_a_shift_costs_three_times_its_squared_length() -> None:
    """Over whole orthogonal bases, sum (c u)^2 is |c|^2: the value is exact, however few the samples."""
    x, labels = draw(np.random.default_rng(0), 50)
    shift = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
    value, _ = sliced_distance(x + shift, labels, x, seed=3, directions=5 * DIM)
    assert value == pytest.approx(3 * float(shift @ shift), rel=1e-5)
    assert sliced_distance(x, labels, x, 3)[0] == 0


def test_wider_gaussian_costs_the_squared_difference_of_deviations() -> None:
    """Each projection of N(0, s^2 I) is N(0, s^2): W2^2 = (s - 1)^2, and 3 D times that."""
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(40_000, DIM)).astype(np.float32) * scale for scale in (1.5, 1.0))
    value, _ = sliced_distance(x, np.zeros(len(x), int), y, 0, 4 * DIM)
    assert value == pytest.approx(3 * DIM * 0.25, rel=0.02)


def test_equals_the_published_definition_for_equal_counts() -> None:
    """MIND: 3 D times the mean over random unit vectors of the mean squared difference of sorted projections."""
    random = np.random.default_rng(0)
    (x, labels), (y, _) = draw(random, 300), draw(random, 300)
    y = y * 1.3 + 0.4
    u = random.normal(size=(20_000, DIM))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    expected = 3 * DIM * np.square(np.sort(x @ u.T, axis=0) - np.sort(y @ u.T, axis=0)).mean()
    assert sliced_distance(x, labels, y, 0, 3000)[0] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("count", "others"), [(6, 4), (4, 6), (5, 7), (1, 3)])
def test_unequal_counts_are_matched_optimally(count: int, others: int) -> None:
    """As if each value were repeated until both sets are of equal size."""
    random = np.random.default_rng(count)
    x, y = random.normal(size=(count, 1)), random.normal(size=(others, 1)) + 1
    many = [np.sort(np.repeat(each, times)) for each, times in ((x, others), (y, count))]
    expected = 3 * np.square(many[0] - many[1]).mean()
    assert sliced_distance(x, np.zeros(count, int), y, 0, 4)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("others", [400, 300])
def test_interval_covers_the_mean_of_other_draws(others: int) -> None:
    random = np.random.default_rng(0)
    real, _ = draw(random, others)
    values, intervals = [], []
    for _ in range(300):
        x, labels = draw(random, 400)
        value, error = sliced_distance(x * 1.2 + 0.4, labels, real, 0, 2 * DIM)
        values.append(value)
        intervals.append(normal_interval(value, error, 0.0))
    covered = np.mean([low <= np.mean(values) <= high for low, high in intervals])
    assert 0.9 <= covered <= 0.98


def test_depends_on_its_seed_alone() -> None:
    (x, labels), (y, _) = draw(np.random.default_rng(0), 60), draw(np.random.default_rng(1), 60)
    assert sliced_distance(x, labels, y, 0, 9) == sliced_distance(x, labels, y, 0, 9)
    assert sliced_distance(x, labels, y, 1, 9) != sliced_distance(x, labels, y, 0, 9)
