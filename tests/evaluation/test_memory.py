"""The memory of an evaluation, and the passes that ADM's statistics save."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from afm_pipe.evaluation.accumulate import MetricAccumulator
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.evaluation.frechet import Statistics
from afm_pipe.evaluation.measures import inception_score, within_class_variance
from afm_pipe.evaluation.networks import LEGACY, SPATIAL, FeatureNetwork
from afm_pipe.evaluation.precision_recall import precision_recall
from afm_pipe.evaluation.reference import build_reference
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, sha256_file
from afm_pipe.runtime.progress import track
from tests.evaluation.painter import Painter, load_network, manifest_of, params_with, sampler_of

DIM = 64
DISTANCES = 3 * 4  # bytes of a sample's distances to its nearest training images


class Largest(TorchDispatchMode):
    """Records the bytes of the largest result of an operation, views of its arguments excluded."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def held(thing: Any, known: set[int]) -> int:
    """Return the bytes of all arrays and tensors that an object holds, at any depth, each counted once."""
    if id(thing) in known:
        return 0
    known.add(id(thing))
    if isinstance(thing, np.ndarray | torch.Tensor):
        return thing.nbytes
    if isinstance(thing, list | tuple):
        return sum(held(each, known) for each in thing)
    if hasattr(thing, "__dict__") and not callable(thing):
        return sum(held(each, known) for each in vars(thing).values())
    return 0


def features_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, DIM)).astype(np.float32)


def test_memory_grows_by_features_and_three_distances_per_sample() -> None:
    network = FeatureNetwork("classifier", DIM, "0" * 64, lambda x: x.flatten(1)[:, :DIM].float())

    def kept(samples: int) -> int:
        seen = MetricAccumulator([network], samples, 5)
        for _ in range(0, samples, 50):
            images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
            seen.add([network(images)], images, torch.rand(50, 3), torch.arange(50) % 5)
        assert len(seen.streams[0].features) == samples
        return held(seen, set())

    assert kept(2000) - kept(500) == 1500 * (4 * DIM + DISTANCES)


@pytest.mark.parametrize("measure", ["distances", "precision and recall", "score"])
def test_metrics_do_not_copy_the_features(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afm_pipe.evaluation.precision_recall.TILE", (64, 256))
    monkeypatch.setattr("afm_pipe.evaluation.measures.SCORE_PART", 250)
    monkeypatch.setattr("afm_pipe.evaluation.intervals.BLOCK", 64)
    monkeypatch.setattr("afm_pipe.evaluation.intervals.KERNEL_ROWS", 500)
    settings, their = params_with().evaluate, features_of(600)
    own = Statistics.of(their)
    held_against = Reference("classifier", "0" * 64, "", 600, own.mu, own.sigma, their, np.arange(600), 1.0)

    def steps(features: np.ndarray, statistics: Statistics) -> dict[str, Callable[[], Any]]:
        labels = np.arange(len(features)) % 40
        return {
            "distances": lambda: (
                held_against.distances(statistics, features, labels, settings),
                within_class_variance(features, labels),
            ),
            "precision and recall": lambda: precision_recall(their, features),
            "score": lambda: inception_score(features, lambda x: np.abs(x) / np.abs(x).sum(1, keepdims=True), 0),
        }

    def peak(count: int) -> tuple[int, int]:
        features = features_of(count)
        step = steps(features, Statistics.of(features))[measure]
        tracemalloc.start()
        with Largest() as largest:
            step()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, largest.bytes

    peak(1000)  # what is imported at first use
    (few, few_tensor), (many, many_tensor) = peak(1000), peak(5000)
    assert many - few < 0.5 * 4000 * 4 * DIM  # a copy in float32 would be 1, one in float64 2
    assert many_tensor <= max(few_tensor, 5000 * 4 * 8)  # tiles, and the four nearest distances of each sample


class Counting:
    """Stands in for Inception: returns a few pixels, and counts images."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, :5].float() + torch.rand(len(images), 5)


@pytest.fixture
def adm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of ADM's shape in the folder of weights."""
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path))
    write_adm(tmp_path / "adm.npz", 0)
    return tmp_path / "adm.npz"


def write_adm(path: Path, seed: int) -> None:
    random, spread = np.random.default_rng(seed), np.eye(5)
    arrays = {"mu": random.normal(size=5), "sigma": spread, "mu_s": random.normal(size=5), "sigma_s": 2 * spread}
    np.savez(path, arr_0=random.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8), **arrays)


@pytest.mark.parametrize("first", [True, False])
def test_adms_statistics_save_passes_through_their_networks(
    first: bool,
    real: tuple[np.ndarray, np.ndarray],
    vae: Any,
    tmp_path: Path,
    adm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pooled, spatial = Counting(), Counting()

    def load(settings: Any, folder: Path, device: Any = None, names: Any = None) -> list[FeatureNetwork]:
        found = {
            "classifier": lambda: [load_network("classifier", folder)],
            LEGACY: lambda: [
                FeatureNetwork(LEGACY, 5, "1" * 64, pooled),
                FeatureNetwork(SPATIAL, 5, "1" * 64, spatial),
            ],
        }
        return [network for name in names or settings.features for network in found[name]()]

    monkeypatch.setattr("afm_pipe.evaluation.reference.load_networks", load)
    monkeypatch.setattr("afm_pipe.evaluation.evaluator.load_networks", load)
    monkeypatch.setattr("afm_pipe.evaluation.reference.MAX_FEATURES", 60)
    names = [LEGACY, "classifier"] if first else ["classifier", LEGACY]
    changes = {"features": names, "adm_reference": {"file": "adm.npz", "sha256": sha256_file(adm)}}
    params, folder = params_with(evaluate=changes), tmp_path / "reference"
    track("reference", build_reference(params, manifest_of(real[1]), real[0], vae, folder))
    rebuilt, batch = params.evaluate.samples, 20
    assert pooled.seen == (60 if first else 0) + batch + rebuilt
    assert spatial.seen == rebuilt
    summary = read_json(folder / "summary.json")
    assert summary["fid_reconstruction"] > 0 and summary["within_class_variance"] > 0

    evaluator = Evaluator(params, folder)
    found = evaluator.references
    assert {each.count for each in found} == {300}
    assert [each.source for each in found].count(f"adm {sha256_file(adm)}") == 2
    metrics = track("evaluate", evaluator.evaluate(sampler_of(Painter(), vae), {}))
    assert (
        metrics is not None
        and metrics["fid_240"] > 0
        and metrics["sfid_240"] > 0
        and metrics["within_class_variance_features"] > 0
    )


def test_reference_of_a_different_adm_file_is_refused(
    vae: Any,
    real: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    adm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> list[FeatureNetwork]:
        return [FeatureNetwork(name, 5, "1" * 64, Counting()) for name in (LEGACY, SPATIAL)]

    monkeypatch.setattr("afm_pipe.evaluation.reference.load_networks", load)
    monkeypatch.setattr("afm_pipe.evaluation.evaluator.load_networks", load)

    def params(file: str | None, sha256: str | None) -> Any:
        named = {"file": file, "sha256": sha256} if file else None
        return params_with(evaluate={"features": [LEGACY], "adm_reference": named})

    right, folder = sha256_file(adm), tmp_path / "reference"
    track("r", build_reference(params("adm.npz", None), manifest_of(real[1]), real[0], vae, folder))
    for sha256 in (right, None):
        Evaluator(params("adm.npz", sha256), folder)
    with pytest.raises(
        UserError, match=f"of adm {right} .*expected those of adm {'2' * 64}.*build the reference again"
    ):
        Evaluator(params("adm.npz", "2" * 64), folder)
    with pytest.raises(UserError, match="expected those of training images"):
        Evaluator(params(None, None), folder)
    Evaluator(params("gone.npz", None), folder)  # without a hash, any reference of ADM's statistics
    write_adm(adm, 1)
    with pytest.raises(UserError, match=f"of adm {right} .*expected those of adm {sha256_file(adm)}"):
        Evaluator(params("adm.npz", None), folder)
