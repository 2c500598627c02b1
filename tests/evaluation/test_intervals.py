"""Intervals beside distances, and precision and recall."""

from typing import Any

import numpy as np
import pytest

from afm_pipe.evaluation.frechet import Statistics, frechet_distance
from afm_pipe.evaluation.intervals import fraction, frechet_error, kernel_error, normal_interval
from afm_pipe.evaluation.measures import inception_score
from afm_pipe.evaluation.precision_recall import precision_recall
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.kernel_distance import kid, kid_of_subsets

DIM, CLASSES = 8, 4


def draw(random: np.random.Generator, count: int, apart: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw features of classes in equal shares, whose means differ, `apart` from the standard Gaussian."""
    labels = np.arange(count) % CLASSES
    means = np.random.default_rng(9).normal(size=(CLASSES, DIM)) * 0.7
    return random.normal(size=(count, DIM)) * (1 + 0.5 * apart) + means[labels] + apart, labels


@pytest.mark.parametrize("apart", [1.0, 0.3])
def test_frechet_interval_covers_the_mean_of_other_draws(apart: float) -> None:
    random, mu, sigma = np.random.default_rng(0), np.zeros(DIM), np.eye(DIM) * 1.5
    values, intervals = [], []
    for _ in range(400):
        x, labels = draw(random, 500, apart)
        own = Statistics.of(x)
        value, pull = frechet_distance(own.mu, own.sigma, mu, sigma)
        values.append(value)
        intervals.append(normal_interval(value, frechet_error(x, labels, mu, pull), 0.0))
    truth = np.mean(values)
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.9 <= covered <= 0.98


def test_kernel_interval_covers_the_mean_of_other_draws() -> None:
    random = np.random.default_rng(1)
    real = random.normal(size=(400, DIM))
    values, intervals = [], []
    for seed in range(200):
        x, labels = draw(random, 300, 0.3)
        each = kid_of_subsets(real, x, 8, 100, seed)
        values.append(each.mean())
        intervals.append(normal_interval(values[-1], kernel_error(real, x, labels, each)))
    truth = np.mean(values)
    assert 0.9 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.98


def test_noise_counts_within_a_class() -> None:
    x, labels = np.repeat([[0.0], [50.0]], 100, axis=0), np.repeat([0, 1], 100)
    x = x + np.random.default_rng(0).normal(size=x.shape)
    own = Statistics.of(x)
    _, pull = frechet_distance(own.mu, own.sigma, np.zeros(1), np.eye(1))
    assert frechet_error(x, labels, np.zeros(1), pull) < 0.3 * frechet_error(x, 0 * labels, np.zeros(1), pull)


def test_the_map_is_the_gradient_of_the_distance() -> None:
    random = np.random.default_rng(0)
    a, b, step = (m @ m.T for m in random.normal(size=(3, 5, 5)))
    mu = random.normal(size=5)
    _, pull = frechet_distance(mu, a, 0 * mu, b)
    np.testing.assert_allclose(pull @ a @ pull, b, rtol=1e-8, atol=1e-8)  # it carries one Gaussian to the other
    ahead, behind = (frechet_distance(mu, a + h * step, 0 * mu, b)[0] for h in (1e-5, -1e-5))
    assert (ahead - behind) / 2e-5 == pytest.approx(np.trace((np.eye(5) - pull) @ step), rel=1e-5)


def test_the_kernel_distance_is_the_mean_of_clean_fids_subsets() -> None:
    from cleanfid.fid import kernel_distance

    a, b = np.random.default_rng(0).normal(size=(2, 900, 4)) + 0.2
    b[:, 0] += 0.3
    for size in (20, 601):  # within a tile, and over several, the last of them narrow
        before: Any = np.random.get_state()
        np.random.seed(3)  # clean-fid draws from the global state
        expected = kernel_distance(a, b, num_subsets=7, max_subset_size=size)
        np.random.set_state(before)
        assert kid(a, b, 7, size, 3) == pytest.approx(expected, rel=1e-9)
        assert kid_of_subsets(2 * a, 2 * b, 7, size, 3, scale=2.0).mean() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.27753), (5, 0.23659, 0.76341), (10, 0.72247, 1.0)])
def test_wilson_interval_of_ten(hits: int, low: float, high: float) -> None:
    assert fraction(hits, 10)[1] == pytest.approx([low, high], abs=1e-5)


def brute(real: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    def share(points: np.ndarray, centers: np.ndarray) -> float:
        apart = np.linalg.norm(centers[:, None] - centers[None], axis=2)
        radii = np.sort(apart, axis=1)[:, 3]
        return float((np.linalg.norm(points[:, None] - centers[None], axis=2) <= radii).any(axis=1).mean())

    return share(samples, real), share(real, samples)


def test_precision_and_recall_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    real, samples = random.normal(size=(90, 3)), random.normal(size=(70, 3)) * 0.5 + 0.4
    for tile in ((128, 2048), (7, 2), (20, 31)):
        monkeypatch.setattr("afm_pipe.evaluation.precision_recall.TILE", tile)
        found = precision_recall(real, samples)
        shares = found.samples_within / found.samples, found.real_within / found.real
        assert shares == pytest.approx(brute(real, samples))
    assert shares[0] > shares[1]  # a narrow generator is precise and misses much


def test_precision_and_recall_equal_torch_fidelitys() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_prc")
    import torch

    random = np.random.default_rng(1)
    real, samples = random.normal(size=(300, 6)), random.normal(size=(200, 6)) + 0.8
    expected = metric.calculate_precision_recall_part(torch.from_numpy(samples), torch.from_numpy(real))
    found = precision_recall(real, samples)
    assert (found.samples_within / 200, found.real_within / 300) == pytest.approx(expected, abs=1e-6)


def test_precision_and_recall_of_a_set_with_itself_are_one_and_of_far_sets_none() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) + 1000
    assert precision_recall(x, x)[::2] == (50, 50)
    assert precision_recall(x, x + 100)[::2] == (0, 0)
    with pytest.raises(UserError, match="Found 3 samples"):
        precision_recall(x, x[:3])


def test_inception_score_of_known_probabilities_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(probabilities: np.ndarray) -> np.ndarray:
        return probabilities

    sure = np.eye(10)[np.repeat(np.arange(10), 100)]  # in the order of their classes
    assert inception_score(sure, same, 0) == pytest.approx(10)
    assert inception_score(np.full((50, 10), 0.1), same, 0) == pytest.approx(1)
    monkeypatch.setattr("afm_pipe.evaluation.measures.SCORE_PART", 250)
    assert inception_score(sure, same, 0) == pytest.approx(10, rel=0.02)  # four parts in that order: at most 3
