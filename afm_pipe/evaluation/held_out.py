"""Distances of samples beside those of held-out real images: a ratio of 1, or a difference of 0, is real.

Both are of the same number of images in the same class shares, to the same reference, so the bias of a distance of few
images is in both. The ratio needs no scale of its own: it reads alike on any data and with any features.

Legend: N images, D features.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from afm_pipe.data.classes import require_same_classes
from afm_pipe.data.manifest import Manifest
from afm_pipe.evaluation.arrays import load_arrays
from afm_pipe.evaluation.features import load_networks
from afm_pipe.evaluation.frechet import Statistics
from afm_pipe.evaluation.intervals import Z95, fraction, normal_interval
from afm_pipe.evaluation.measures import sample_suffix
from afm_pipe.evaluation.reference import MAX_FEATURES, SUMMARY, THUMBNAILS, class_counts
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.evaluation.thumbnails import Neighbors, Thumbnails, thumbnail
from afm_pipe.params import Evaluate, Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, write_json
from afm_pipe.runtime.progress import Progress
from afm_pipe.sampling.sampler import labels_in_shares

CPU = torch.device("cpu")
ROWS = 4096  # features at a time, to bound memory
Measured = dict[str, tuple[float, list[float]]]


@dataclass(frozen=True)
class HeldOutFeatures:
    """Held-out images in one network's features, in an order whose first n are in the reference's class shares."""

    name: str
    sha256: str
    manifest_digest: str
    features: np.ndarray
    labels: np.ndarray

    def save(self, folder: Path) -> None:
        """Write held_out-NAME.npz into a folder."""
        arrays: dict[str, Any] = {field: np.asarray(value) for field, value in vars(self).items()}
        np.savez(_path(folder, self.name), **arrays)

    @classmethod
    def load(cls, folder: Path, reference: Reference, manifest_digest: str) -> "HeldOutFeatures":
        """Read held_out-NAME.npz. Raises UserError if it is missing, damaged, or of another network or other images."""
        path = _path(folder, reference.name)
        arrays = load_arrays(path, tuple(cls.__dataclass_fields__))
        fields: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in arrays.items()}
        features, labels = arrays["features"], arrays["labels"]
        shaped = features.ndim == 2 and features.dtype.kind == "f" and features.shape[1] == len(reference.mu)
        if not shaped or labels.dtype.kind != "i" or labels.shape != features.shape[:1]:
            raise UserError(
                f"Found {path} with arrays that do not match, expected features (N, {len(reference.mu)}) and labels "
                "(N,): build the reference again."
            )
        found = fields["name"], fields["sha256"], fields["manifest_digest"]
        if found != (reference.name, reference.sha256, manifest_digest):
            raise UserError(
                f"Found {path} of another network or other images than the reference: build the reference again."
            )
        return cls(**fields)

    def distances(self, reference: Reference, count: int, params: Evaluate) -> Measured:
        """Return the distances of the first `count` images to the reference, by key, each with its interval."""
        return _distances(reference, self.features[:count], self.labels[:count], params)

    def compare(self, reference: Reference, features: np.ndarray, labels: np.ndarray, params: Evaluate) -> "Relative":
        """Return the distances of samples, features (N, D) of classes `labels` (N,), beside those of held-out images.

        Fewer held-out images than samples compare with the first samples, which are in the same class shares. A ratio
        of Frechet distances needs more images than features, since the covariance of fewer is singular.
        """
        count = min(len(self.features), len(features))
        if not np.array_equal(self.labels[:count], labels[:count]):
            raise UserError("Found held-out images in other class shares than the samples: build the reference again.")
        real = self.distances(reference, count, params)
        own = _distances(reference, features[:count], labels[:count], params)
        measured: Measured = {}
        for key, found in own.items():
            if key.startswith("kid"):
                measured[f"difference_{key}{sample_suffix(count)}"] = difference(found, real[key])
            elif (key.startswith("sw") or count > features.shape[1]) and min(found[0], real[key][0]) > 0:
                measured[f"ratio_{key}{sample_suffix(count)}"] = ratio(found, real[key])
        return Relative(count, measured, real, own)


class Relative(NamedTuple):
    """Distances of samples beside those of as many held-out real images."""

    images: int
    """Of each."""
    measured: Measured
    """Ratios and differences, by key."""
    real: Measured
    own: Measured

    def record(self) -> dict[str, Any]:
        """Return the distances that the ratios and differences come from, for the protocol."""
        return {
            "samples": self.images,
            "of_held_out": {key: [value, *interval] for key, (value, interval) in self.real.items()},
            "of_samples": {key: [value, *interval] for key, (value, interval) in self.own.items()},
        }


def ratio(own: tuple[float, list[float]], real: tuple[float, list[float]]) -> tuple[float, list[float]]:
    """Return a distance relative to that of real images, and its interval over the draws of both (delta method).

    The logarithm of a ratio is nearly normal, so the interval is symmetric around the ratio in logarithms.
    """
    value = own[0] / real[0]
    spread = math.hypot(*((interval[1] - each) / each for each, interval in (own, real)))
    return value, [value * math.exp(-spread), value * math.exp(spread)]


def difference(own: tuple[float, list[float]], real: tuple[float, list[float]]) -> tuple[float, list[float]]:
    """Return a kernel distance minus that of real images, and its interval over the draws of both."""
    error = math.hypot(*((interval[1] - each) / Z95 for each, interval in (own, real)))
    return own[0] - real[0], normal_interval(own[0] - real[0], error)


def add_held_out(
    params: Params, manifest: Manifest, images: Any, folder: Path, device: torch.device = CPU
) -> Generator[Progress, None, list[str]]:
    """Write the features of held-out images into the `folder` of a built reference; return lines that say how many.

    `images` (N, C, H, W) uint8 are those of the manifest of held-out images. The summary gets `held_out`: their number,
    their distances at the number that the reference's class shares allow, the classifier's accuracy and the fraction
    that counts as copies. Raises UserError for images of other classes.
    """
    summary, settings = read_json(folder / SUMMARY), params.evaluate
    require_same_classes(manifest.classes, "the held-out images", summary["classes"], folder / SUMMARY)
    networks = load_networks(settings, folder, device)
    references = [Reference.load(folder, network) for network in networks]
    chosen = _in_shares(manifest, class_counts(params, summary, references[0], folder))
    labels, size = manifest.labels[chosen], params.sample.micro_batch
    described: dict[str, Any] = {"images": manifest.num_images, "manifest": manifest.digest, "in_shares": len(chosen)}
    lines = [f"{len(chosen)} of {manifest.num_images} held-out images are in the class shares of the reference."]
    if len(chosen) < _least(summary):
        lines.append(f"Not measured: distances relative to held-out images, which need {_least(summary)} of them.")
        write_json(folder / SUMMARY, summary | {"held_out": described})
        return lines
    thumbnails = Thumbnails.load(folder / THUMBNAILS)
    neighbors, nearest, stored = Neighbors(thumbnails.images), [], [list[np.ndarray]() for _ in networks]
    for start in range(0, len(chosen), size):
        batch = torch.from_numpy(np.ascontiguousarray(images[chosen[start : start + size]]))
        nearest.append(neighbors.nearest(thumbnail(batch), 2)[0])
        for network, features in zip(networks, stored, strict=True):
            features.append(network(batch).numpy())
        yield Progress(min(start + size, len(chosen)), len(chosen), "images", "features of held-out images")
    described["copies"] = float(thumbnails.copied(torch.cat(nearest)).mean())
    for network, reference, parts in zip(networks, references, stored, strict=True):
        held = HeldOutFeatures(network.name, network.sha256, manifest.digest, np.concatenate(parts), labels)
        held.save(folder)
        if network.head is not None:
            predicted = network.predict(torch.from_numpy(held.features)).numpy()
            described["class_accuracy"] = fraction(int((predicted == labels).sum()), len(labels))[0]
        count = min(len(chosen), settings.samples)
        measured = held.distances(reference, count, settings)
        described |= {f"{key}{sample_suffix(count)}": [value, *ends] for key, (value, ends) in measured.items()}
        if count <= network.dim:
            lines.append(
                f"Too few for a ratio of Fréchet distances in {network.name}: {count} held-out images, expected more "
                f"than its {network.dim} features."
            )
    write_json(folder / SUMMARY, summary | {"held_out": described})
    return lines


def load_held_out(
    folder: Path, summary: dict[str, Any], references: Sequence[Reference]
) -> "list[HeldOutFeatures] | None":
    """Return the held-out images in each network's features; None where the reference has none."""
    described = summary.get("held_out")
    if not isinstance(described, dict) or described.get("in_shares", 0) < _least(summary):
        return None
    return [HeldOutFeatures.load(folder, reference, str(described.get("manifest"))) for reference in references]


def _least(summary: dict[str, Any]) -> int:
    """Return how many held-out images are needed: two of a class, as of samples."""
    return 2 * len(summary["classes"])


def _path(folder: Path, name: str) -> Path:
    return folder / f"held_out-{name}.npz"


def _distances(reference: Reference, features: np.ndarray, labels: np.ndarray, params: Evaluate) -> Measured:
    statistics = Statistics.none(features.shape[1])
    for start in range(0, len(features), ROWS):
        statistics += Statistics.of(features[start : start + ROWS])
    measured = reference.distances(statistics, features, labels, params)
    return measured | reference.sliced_distance(features, labels, params)


def _in_shares(manifest: Manifest, counts: Sequence[int]) -> np.ndarray:
    """Return rows of the manifest, in the classes of samples 0, 1, ..., until a class has no more images.

    Those of a class come in the order of their hashes, which is a random one.
    """
    ordered = sorted(range(manifest.num_images), key=lambda row: manifest.sha256[row], reverse=True)
    left: dict[int, list[int]] = {}
    for row in ordered:
        left.setdefault(int(manifest.labels[row]), []).append(row)
    rows = []
    for label in labels_in_shares(min(manifest.num_images, MAX_FEATURES), counts).tolist():
        if not left.get(label):
            break
        rows.append(left[label].pop())
    return np.array(rows, np.int64)
