"""The Frechet distance and the statistics it is taken of."""

from typing import Any

import numpy as np
import pytest
import torch

from afm_pipe.evaluation.frechet import Statistics, frechet_distance
from afm_pipe.evaluation.measures import ClassSpread, sample_suffix, within_class_variance
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.kernel_distance import kid


def features(seed: int, count: int = 400, dim: int = 16) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(dim, dim))
    return (random.normal(size=(count, dim)) @ mixing + random.normal(size=dim) + 3).astype(np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    first, second = Statistics.of(a), Statistics.of(b)
    return frechet_distance(first.mu, first.sigma, second.mu, second.sigma)[0]


def test_equals_the_closed_form_for_gaussians_with_commuting_covariances() -> None:
    random = np.random.default_rng(0)
    turn, _ = np.linalg.qr(random.normal(size=(6, 6)))
    a, b, mu = random.uniform(0.1, 4, 6), random.uniform(0.1, 4, 6), random.normal(size=6)
    expected = (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found, _ = frechet_distance(mu, turn * a @ turn.T, np.zeros(6), turn * b @ turn.T)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(400, 16), (60, 200)])
def test_a_set_is_at_distance_zero_from_itself(count: int, dim: int) -> None:
    assert 0 <= distance(features(1, count, dim), features(1, count, dim)) < 1e-4  # (60, 200): singular covariance


def test_is_symmetric_and_never_negative() -> None:
    a, b = features(1), features(2)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
    assert distance(a, a + np.float32(1e-6)) >= 0


def test_agrees_with_clean_fid() -> None:
    fid = pytest.importorskip("cleanfid.fid")
    a, b = Statistics.of(features(1)), Statistics.of(features(2))
    try:
        expected = fid.frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    except TypeError:
        pytest.skip("this scipy has no sqrtm(disp=), which clean-fid's formula calls")
    assert frechet_distance(a.mu, a.sigma, b.mu, b.sigma)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("position", range(4))
def test_refuses_what_is_not_finite(position: int) -> None:
    inputs = [np.zeros(3), np.eye(3), np.zeros(3), np.eye(3)]
    inputs[position] = inputs[position] * np.nan
    with pytest.raises(UserError, match="non-finite feature"):
        frechet_distance(*inputs)


def test_streamed_statistics_equal_those_of_all_at_once() -> None:
    x = features(3, count=501) + 1000  # far from zero, where sums of squares would cancel
    streamed = Statistics.none(16)
    for start in range(0, 501, 50):
        streamed += Statistics.of(x[start : start + 50])
    assert streamed.count == 501
    np.testing.assert_allclose(streamed.mu, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(streamed.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)


def test_merging_parts_in_any_grouping_gives_the_same() -> None:
    a, b, c = (Statistics.of(features(seed, count)) for seed, count in ((1, 30), (2, 1), (3, 200)))
    left, right = (a + b) + c, c + (b + a)
    np.testing.assert_allclose(left.mu, right.mu, rtol=1e-12)
    np.testing.assert_allclose(left.sigma, right.sigma, rtol=1e-10)
    assert (Statistics.none(16) + Statistics.none(16)).count == 0


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(UserError, match="at least 2"):
        _ = Statistics.of(features(1, count=1)).sigma


def test_kid_is_repeatable_and_leaves_the_global_random_state_alone() -> None:
    before: Any = np.random.get_state()
    first, again, other = (kid(features(1), features(2), 5, 50, seed) for seed in (7, 7, 8))
    assert first == again != other
    after: Any = np.random.get_state()
    assert (after[1] == before[1]).all() and after[2] == before[2]


def test_kid_is_near_zero_for_two_draws_of_one_distribution() -> None:
    x = features(1, count=2000)
    same, shifted = (kid(x[::2], x[1::2] + shift, 20, 500, 0) for shift in (0, 1))
    assert abs(same) < 0.05 * shifted


def test_kid_is_unbiased_where_the_closed_form_is_known() -> None:
    # k(x, y) = (x y / 1 + 1)^3 in one dimension, of points 0 and 1: k(0, 0) = k(0, 1) = 1, k(1, 1) = 8
    zeros, ones = np.zeros((10, 1), np.float32), np.ones((10, 1), np.float32)
    assert kid(zeros, ones, 3, 10, 0) == pytest.approx(1 + 8 - 2)


def test_within_class_variance_is_the_mean_trace_over_classes() -> None:
    random = np.random.default_rng(0)
    spread = np.array([1.0, 3.0])
    labels = np.repeat([0, 1], 20_000)
    x = random.normal(size=(40_000, 4)) * spread[labels][:, None] + 10 * labels[:, None]
    assert within_class_variance(x.astype(np.float32), labels) == pytest.approx((4 * 1 + 4 * 9) / 2, rel=0.02)


def test_within_class_variance_wants_two_of_a_class() -> None:
    x = np.array([[0.0], [2.0], [9.0]])
    assert within_class_variance(x, np.array([0, 0, 1])) == pytest.approx(2)
    with pytest.raises(UserError, match="two images in some class"):
        within_class_variance(x, np.array([0, 1, 2]))


@pytest.mark.parametrize(("samples", "suffix"), [(5000, "_5k"), (1234, "_1234"), (49_999, "_49999"), (50_000, "")])
def test_keys_carry_the_sample_count_below_fifty_thousand(samples: int, suffix: str) -> None:
    assert sample_suffix(samples) == suffix


def test_class_spread_of_a_stream_is_the_variance_of_the_whole() -> None:
    x, labels = torch.randn(60, 2, 3), torch.arange(60) % 4
    spread = ClassSpread(5)
    for start in range(0, 60, 7):
        spread.add(x[start : start + 7], labels[start : start + 7])
    assert spread.variance() == pytest.approx(within_class_variance(x.flatten(1).numpy(), labels.numpy()), rel=1e-5)
