"""Distances beside those of held-out real images: a perfect generator has ratio 1 and difference 0."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afm_pipe.data.manifest import Manifest
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.evaluation.frechet import Statistics
from afm_pipe.evaluation.held_out import HeldOutFeatures, add_held_out, difference, ratio
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.sampler import balanced_labels
from tests.evaluation.painter import CLASSES, Painter, evaluate, load_network, params_with, sampler_of

HELD_OUT_SEED = 5000
KEYS = {"ratio_fd_classifier", "ratio_sw_classifier", "difference_kid_classifier"}


def listed(labels: np.ndarray) -> Manifest:
    """Return a manifest of images whose hashes are their numbers."""
    names = tuple(f"{index:04}" for index in range(len(labels)))
    return Manifest(Path(), tuple(CLASSES), names, labels, names, "held out")


def with_held_out(reference: Path, folder: Path, vae: Any, counts: list[int]) -> tuple[Path, list[str]]:
    """Copy a reference and add images of the perfect painter to it, `counts` of each class; return it and the lines."""
    shutil.copytree(reference, folder)
    labels = np.repeat(np.arange(3), counts)
    images = sampler_of(Painter(), vae).images(range(len(labels)), torch.from_numpy(labels), HELD_OUT_SEED)
    return folder, track("held out", add_held_out(params_with(), listed(labels), images.numpy(), folder))


@pytest.fixture(scope="module")
def beside(reference: Path, vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference, with as many held-out images as samples."""
    return with_held_out(reference, tmp_path_factory.mktemp("beside") / "reference", vae, [80, 80, 80])[0]


def test_a_perfect_generator_has_ratio_one_and_difference_zero(beside: Path, vae: Any) -> None:
    metrics = evaluate(Painter(), vae, beside)
    intervals = metrics["intervals"]
    assert {f"{key}_240" for key in KEYS} <= intervals.keys() & metrics.keys()
    for key, real in (("ratio_fd_classifier_240", 1), ("ratio_sw_classifier_240", 1)):
        assert intervals[key][0] < real < intervals[key][1] and 0.5 < metrics[key] < 2
    low, high = intervals["difference_kid_classifier_240"]
    assert low < 0 < high
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_a_generator_of_too_much_variety_is_far_from_real(beside: Path, vae: Any) -> None:
    metrics = evaluate(Painter(spread=2.0), vae, beside)
    assert metrics["intervals"]["ratio_fd_classifier_240"][0] > 2
    assert metrics["intervals"]["ratio_sw_classifier_240"][0] > 2
    assert metrics["intervals"]["difference_kid_classifier_240"][0] > 0


def test_ratios_are_of_the_distances_in_the_protocol(beside: Path, vae: Any) -> None:
    metrics = evaluate(Painter(spread=0.7), vae, beside)
    recorded = metrics["protocol"]["held_out"]
    assert (recorded["images"], recorded["in_shares"], recorded["manifest"]) == (240, 240, "held out")
    compared = recorded["compared"]["classifier"]
    assert compared["samples"] == 240
    own, real = (compared[side]["fd_classifier"][0] for side in ("of_samples", "of_held_out"))
    assert own == pytest.approx(metrics["fd_classifier_240"], rel=1e-6)
    assert metrics["ratio_fd_classifier_240"] == own / real
    kid = [compared[side]["kid_classifier"][0] for side in ("of_samples", "of_held_out")]
    assert metrics["difference_kid_classifier_240"] == kid[0] - kid[1]
    summary = json.loads((beside / "summary.json").read_text())["held_out"]
    assert summary["fd_classifier_240"] == compared["of_held_out"]["fd_classifier"]
    assert summary["class_accuracy"] > 0.9 and summary["copies"] < 0.05


def test_fewer_held_out_images_compare_with_as_many_samples(reference: Path, vae: Any, tmp_path: Path) -> None:
    """21 of the rarest class allow 62 to 65 in equal shares; the key says so, and no ratio is said to be of 240."""
    folder, lines = with_held_out(reference, tmp_path / "reference", vae, [21, 40, 50])
    assert lines[0].startswith("63 of 111 held-out images") or lines[0].startswith("65 of 111 held-out images")
    metrics = evaluate(Painter(spread=0.7), vae, folder)
    (key,) = (key for key in metrics if key.startswith("ratio_fd_classifier"))
    count = int(key.rpartition("_")[2])
    assert 63 <= count <= 65 and lines[0].startswith(f"{count} of 111")
    evaluator = Evaluator(params_with(), folder)
    labels, network = evaluator.labels[:count], load_network("classifier", folder)
    features = network(sampler_of(Painter(spread=0.7), vae).images(range(count), labels, 2000)).numpy()
    found = evaluator.references[0].distances(Statistics.of(features), features, labels.numpy(), evaluator.settings)[
        "fd_classifier"
    ][0]
    assert evaluator.held_out is not None
    held = evaluator.held_out[0]
    assert (held.labels == balanced_labels(range(count), 3).numpy()).all()
    real = held.distances(evaluator.references[0], count, evaluator.settings)["fd_classifier"][0]
    assert metrics[key] == pytest.approx(found / real, rel=1e-4)
    assert metrics["fd_classifier_240"] == evaluate(Painter(spread=0.7), vae, reference)["fd_classifier_240"]


def test_too_few_for_a_covariance_give_their_distance_and_no_ratio(reference: Path, vae: Any, tmp_path: Path) -> None:
    folder, lines = with_held_out(reference, tmp_path / "reference", vae, [2, 2, 2])
    expected = (
        "Too few for a ratio of Fréchet distances in classifier: 6 held-out images, expected more than its 8 features."
    )
    assert expected in lines
    metrics = evaluate(Painter(), vae, folder)
    assert not any(key.startswith("ratio_fd") for key in metrics) and "ratio_sw_classifier_6" in metrics
    assert metrics["protocol"]["held_out"]["fd_classifier_6"][0] > 0
    folder, lines = with_held_out(reference, tmp_path / "fewer", vae, [2, 1, 2])
    assert lines[1] == "Not measured: distances relative to held-out images, which need 6 of them."
    assert not any(key.startswith(("ratio", "difference")) for key in evaluate(Painter(), vae, folder))


def test_without_held_out_images_nothing_changes(reference: Path, beside: Path, vae: Any) -> None:
    without, with_them = (evaluate(Painter(), vae, folder) for folder in (reference, beside))
    assert "held_out" not in without["protocol"] and not any(key.startswith("ratio") for key in without)
    for key in without.keys() - {"intervals", "protocol"}:
        assert without[key] == with_them[key]


def test_other_networks_images_and_damaged_files_are_refused(beside: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beside, tmp_path / "reference"))
    network = load_network("classifier", folder)
    reference = Reference.load(folder, network)
    held = HeldOutFeatures.load(folder, reference, "held out")
    for other in (replace(held, sha256="other"), replace(held, manifest_digest="other")):
        other.save(folder)
        with pytest.raises(UserError, match="of another network or other images than the reference"):
            Evaluator(params_with(), folder)
    replace(held, features=held.features[:, :3]).save(folder)
    with pytest.raises(UserError, match=r"expected features \(N, 8\) and labels \(N,\)"):
        Evaluator(params_with(), folder)
    with pytest.raises(UserError, match="in other class shares than the samples"):
        held.compare(reference, held.features, held.labels[::-1], params_with().evaluate)


def test_intervals_of_real_images_cover_one_and_zero() -> None:
    """Draws of real images against other draws of them: conservative near 1, where the distance is flat."""
    random, covered = np.random.default_rng(0), {"ratio": 0, "difference": 0}
    settings = params_with().evaluate
    for _ in range(60):
        labels = np.arange(600) % 3
        sets = [(random.gamma(2.0, size=(600, 5)) + labels[:, None]).astype(np.float32) for _ in range(3)]
        own = Statistics.of(sets[0])
        reference = Reference("classifier", "", "", 600, own.mu, own.sigma, sets[0], labels, 1.0)
        held = HeldOutFeatures("classifier", "", "", sets[1][:150], labels[:150])
        for key, (_, (low, high)) in held.compare(reference, sets[2], labels, settings).measured.items():
            if "sw" not in key:
                covered[key.partition("_")[0]] += low <= (1 if key.startswith("ratio") else 0) <= high
    assert covered["ratio"] >= 55 and covered["difference"] >= 55


def test_ratio_and_difference_of_known_errors() -> None:
    value, (low, high) = ratio((6.0, [5.4, 6.6]), (2.0, [1.6, 2.4]))
    assert value == 3 and np.log([low / 3, high / 3]) == pytest.approx([-(0.05**0.5), 0.05**0.5])
    value, ends = difference((0.05, [0.02, 0.08]), (0.01, [-0.03, 0.05]))
    assert value == pytest.approx(0.04) and ends == pytest.approx([-0.01, 0.09])
