"""What is kept of images in the features of one network: its file, and its accumulation from a stream.

Shapes: N images, B of a batch, C channels, H x W pixels, D features.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from afm_pipe.evaluation.features import NAMES, FeatureNetwork
from afm_pipe.evaluation.frechet import Array, Statistics, frechet_and_map
from afm_pipe.evaluation.intervals import around, frechet_error, kernel_error
from afm_pipe.evaluation.measures import root_mean_square, within_class_variance
from afm_pipe.evaluation.nearest import load_arrays
from afm_pipe.params import Evaluate
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.kernel_distance import kid_of_subsets

OWN = "training images"
SCALARS = {
    "name": str,
    "sha256": str,
    "manifest_digest": str,
    "count": int,
    "within_class_variance": float,
    "source": str,
}


@dataclass(frozen=True)
class Reference:
    """What is kept of the real images in one network's features, and of which network and images it is."""

    name: str
    sha256: str
    manifest_digest: str
    count: int
    mu: Array
    sigma: Array
    features: np.ndarray
    labels: np.ndarray
    within_class_variance: float
    source: str = OWN
    """Whose statistics: our own images', or `adm SHA256`; count, manifest and labels are then still our images'."""

    @property
    def digest(self) -> str:
        """Hash of mean and covariance, by which a reference is told from another."""
        return hashlib.sha256(self.mu.tobytes() + self.sigma.tobytes()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write NAME.npz into a folder."""
        arrays: dict[str, Any] = {field: np.asarray(value) for field, value in vars(self).items()}
        np.savez(folder / f"{self.name}.npz", **arrays)

    @classmethod
    def load(cls, folder: Path, network: FeatureNetwork) -> "Reference":
        """Read the statistics of a network's features. Raises UserError when they are missing or another's."""
        path = folder / f"{network.name}.npz"
        arrays = load_arrays(path, tuple(cls.__dataclass_fields__))
        fields: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in arrays.items()}
        found = cls(**fields)
        if {name: type(fields[name]) for name in SCALARS} != SCALARS or not _belong_together(arrays):
            raise UserError(
                f"Found {path} with arrays that do not belong together, expected mean (D,), covariance (D, D), "
                "features (N, D) and labels (N,) of one network: build the reference again."
            )
        for what, value, expected in (
            ("network", found.name, network.name),
            ("network sha256", found.sha256, network.sha256),
            ("feature width", found.mu.shape, (network.dim,)),
        ):
            if value != expected:
                raise UserError(
                    f"Found {path} of {what} {value}, expected {expected}: features of one network or mode are never "
                    "compared with statistics of another; build the reference again."
                )
        return found

    def measured(
        self, statistics: Statistics, features: np.ndarray, labels: np.ndarray, params: Evaluate
    ) -> dict[str, tuple[float, list[float]]]:
        """Return the distances to other images by key, each with its interval.

        They are given by their statistics, features (N, D) and labels (N,).
        """
        names = NAMES[self.name]
        value, pull = frechet_and_map(statistics.mu, statistics.sigma, self.mu, self.sigma)
        error = frechet_error(features, labels, self.mu, pull)
        found = {names.distance: (value, around(value, error, 0.0))}
        if names.kid:
            size = root_mean_square(self.features) if names.kid_rescaled else 1.0
            sets = self.features, features
            each = kid_of_subsets(*sets, params.kid_subsets, params.kid_subset_size, params.seed, size)
            found[names.kid] = float(each.mean()), around(each.mean(), kernel_error(*sets, labels, each, size))
        return found


def _belong_together(arrays: dict[str, np.ndarray]) -> bool:
    kinds = [arrays[name].dtype.kind for name in ("mu", "sigma", "features", "labels")]
    if kinds != ["f", "f", "f", "i"] or arrays["mu"].ndim != 1 or arrays["labels"].ndim != 1:
        return False
    width, count, features = len(arrays["mu"]), len(arrays["labels"]), arrays["features"]
    adm = str(arrays["source"]).startswith("adm ")  # then features are ADM's, or those of the images that are shown
    return arrays["sigma"].shape == (width, width) and features.ndim == 2 and (adm or len(features) == count)


class FeatureStream:
    """Statistics of a stream of images in one network's features, and up to `keep` of the features themselves."""

    def __init__(self, network: FeatureNetwork, keep: int) -> None:
        self.network = network
        self.statistics = Statistics.none(network.dim)
        self._features = np.empty((keep, network.dim), dtype=np.float32)
        self._filled = 0

    def add(self, images: Tensor, wanted: np.ndarray | None = None) -> None:
        """Take in images (B, C, H, W) uint8; keep the features of those `wanted` (B,), all without it."""
        self.take(self.network(images), wanted)

    def take(self, seen: Tensor, wanted: np.ndarray | None = None) -> None:
        """Take in features (B, D) of images, as `add` does."""
        features = seen.numpy()
        self.statistics += Statistics.of(features)
        kept = features if wanted is None else features[wanted]
        self._features[self._filled : self._filled + len(kept)] = kept
        self._filled += len(kept)

    @property
    def features(self) -> np.ndarray:
        return self._features[: self._filled]

    def state(self) -> dict[str, np.ndarray]:
        """Return what was taken in, as arrays by name."""
        name, s = self.network.name, self.statistics
        return {f"{name}/features": self.features, f"{name}/mu": s.mu, f"{name}/scatter": s.scatter}

    def restore(self, state: dict[str, np.ndarray], count: int) -> None:
        """Go on from what `state` returned after `count` images."""
        name, features = self.network.name, state[f"{self.network.name}/features"]
        self.statistics = Statistics(count, state[f"{name}/mu"], state[f"{name}/scatter"])
        self._features[: len(features)], self._filled = features, len(features)

    def reference(self, labels: np.ndarray, count: int, manifest_digest: str) -> Reference:
        """Return what was seen of `count` images as a reference; `labels` are of the features kept.

        A network that was shown none gets empty statistics, for others to take their place.
        """
        nothing = self.statistics.count == 0
        return Reference(
            name=self.network.name,
            sha256=self.network.sha256,
            manifest_digest=manifest_digest,
            count=count,
            mu=self.statistics.mu,
            sigma=self.statistics.scatter if nothing else self.statistics.sigma,
            features=self.features,
            labels=labels,
            within_class_variance=math.nan if nothing else within_class_variance(self.features, labels),
        )
