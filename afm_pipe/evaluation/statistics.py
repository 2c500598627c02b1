"""Statistics of the real images in the features of one network, and distances to them.

Legend: N images, D features.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afm_pipe.evaluation.arrays import load_arrays
from afm_pipe.evaluation.frechet import Array, Statistics, frechet_distance
from afm_pipe.evaluation.intervals import frechet_error, kernel_error, normal_interval
from afm_pipe.evaluation.measures import root_mean_square
from afm_pipe.evaluation.networks import METRIC_NAMES, FeatureNetwork
from afm_pipe.evaluation.sliced import sliced_distance
from afm_pipe.params import Evaluate
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.kernel_distance import kid_of_subsets

TRAINING_IMAGES = "training images"
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
    """Statistics of the real images in one network's features."""

    name: str
    sha256: str
    manifest_digest: str
    count: int
    mu: Array
    sigma: Array
    features: np.ndarray
    labels: np.ndarray
    within_class_variance: float
    source: str = TRAINING_IMAGES
    """Source of mean and covariance: the training images, or `adm SHA256`. Count, manifest and labels are always those
    of the training images."""

    @property
    def digest(self) -> str:
        """Hash of mean and covariance."""
        return hashlib.sha256(self.mu.tobytes() + self.sigma.tobytes()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write NAME.npz into a folder."""
        arrays: dict[str, Any] = {field: np.asarray(value) for field, value in vars(self).items()}
        np.savez(folder / f"{self.name}.npz", **arrays)

    @classmethod
    def load(cls, folder: Path, network: FeatureNetwork) -> "Reference":
        """Read NAME.npz. Raises UserError if it is missing, damaged or of another network."""
        path = folder / f"{network.name}.npz"
        arrays = load_arrays(path, tuple(cls.__dataclass_fields__))
        fields: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in arrays.items()}
        found = cls(**fields)
        if {name: type(fields[name]) for name in SCALARS} != SCALARS or not _match(arrays):
            raise UserError(
                f"Found {path} with arrays that do not match, expected mean (D,), covariance (D, D), features (N, D) "
                "and labels (N,) of one network: build the reference again."
            )
        for what, value, expected in (
            ("network", found.name, network.name),
            ("network sha256", found.sha256, network.sha256),
            ("feature width", found.mu.shape, (network.dim,)),
        ):
            if value != expected:
                raise UserError(
                    f"Found {path} of {what} {value}, expected {expected}: features of different networks or "
                    "resize modes are not comparable; build the reference again."
                )
        return found

    def distances(
        self, statistics: Statistics, features: np.ndarray, labels: np.ndarray, params: Evaluate
    ) -> dict[str, tuple[float, list[float]]]:
        """Return the Frechet and kernel distances of samples to the real images, by key, each with its interval.

        `statistics`, `features` (N, D) and `labels` (N,) are those of the samples.
        """
        names = METRIC_NAMES[self.name]
        value, transport = frechet_distance(statistics.mu, statistics.sigma, self.mu, self.sigma)
        error = frechet_error(features, labels, self.mu, transport)
        found = {names.distance: (value, normal_interval(value, error, minimum=0.0))}
        if names.suffix is not None:
            size = root_mean_square(self.features) if names.kid_rescaled else 1.0
            sets = self.features, features
            each = kid_of_subsets(*sets, params.kid_subsets, params.kid_subset_size, params.seed, size)
            value, error = float(each.mean()), kernel_error(*sets, labels, each, size)
            found[f"kid{names.suffix}"] = value, normal_interval(value, error)
        return found

    def sliced_distance(
        self, features: np.ndarray, labels: np.ndarray, params: Evaluate
    ) -> dict[str, tuple[float, list[float]]]:
        """Return the sliced Wasserstein distance of samples to the real images, by key, with its interval."""
        suffix = METRIC_NAMES[self.name].suffix
        if suffix is None:
            return {}
        value, error = sliced_distance(features, labels, self.features, params.seed)
        return {f"sw{suffix}": (value, normal_interval(value, error, minimum=0.0))}


def _match(arrays: dict[str, np.ndarray]) -> bool:
    kinds = [arrays[name].dtype.kind for name in ("mu", "sigma", "features", "labels")]
    if kinds != ["f", "f", "f", "i"] or arrays["mu"].ndim != 1 or arrays["labels"].ndim != 1:
        return False
    width, count, features = len(arrays["mu"]), len(arrays["labels"]), arrays["features"]
    adm = str(arrays["source"]).startswith("adm ")  # then the features may be those of ADM's images
    return arrays["sigma"].shape == (width, width) and features.ndim == 2 and (adm or len(features) == count)
