"""Accumulate the features of a stream of images, with checkpoints.

Legend: N images, C channels, H x W pixels, D features.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afm_pipe.evaluation.arrays import load_arrays
from afm_pipe.evaluation.frechet import Statistics
from afm_pipe.evaluation.measures import ClassSpread
from afm_pipe.evaluation.networks import FeatureNetwork
from afm_pipe.runtime.files import atomic_path

STATE = "state.npz"


class FeatureStream:
    """Statistics of a stream of images in one network's features, and up to `maximum` of the features."""

    def __init__(self, network: FeatureNetwork, maximum: int) -> None:
        self.network = network
        self.statistics = Statistics.none(network.dim)
        self._features = np.empty((maximum, network.dim), dtype=np.float32)
        self._filled = 0

    @property
    def features(self) -> np.ndarray:
        return self._features[: self._filled]

    def add(self, features: Tensor, kept: np.ndarray | slice = slice(None)) -> None:
        """Add features (N, D) to the statistics, and store `features[kept]`."""
        batch = features.numpy()
        self.statistics += Statistics.of(batch)
        self._append(batch[kept])

    def _append(self, features: np.ndarray) -> None:
        self._features[self._filled : self._filled + len(features)] = features
        self._filled += len(features)

    def state(self) -> dict[str, np.ndarray]:
        """Return the state as arrays by name."""
        arrays = {"features": self.features, "mu": self.statistics.mu, "scatter": self.statistics.scatter}
        return {f"{self.network.name}/{part}": array for part, array in arrays.items()}

    def restore(self, state: dict[str, np.ndarray], count: int) -> None:
        """Restore the state after `count` images."""
        features, mu, scatter = (state[f"{self.network.name}/{part}"] for part in ("features", "mu", "scatter"))
        self.statistics = Statistics(count, mu, scatter)
        self._append(features)


class MetricAccumulator:
    """Accumulates what metrics need: features, variance within classes, distances to the nearest training images."""

    def __init__(self, networks: Sequence[FeatureNetwork], samples: int, num_classes: int) -> None:
        self.streams = [FeatureStream(network, samples) for network in networks]
        self.spread = ClassSpread(num_classes)
        self.distances: list[Tensor] = []  # (N, 3) each
        self.done = 0

    def add(self, features: Sequence[Tensor], thumbnails: Tensor, distances: Tensor, labels: Tensor) -> None:
        """Add samples: features (N, D) by network, thumbnails (N, C, H, W), distances (N, 3) and labels (N,)."""
        for stream, each in zip(self.streams, features, strict=True):
            stream.add(each)
        self.spread.add(thumbnails, labels)
        self.distances.append(distances)
        self.done += len(labels)

    def save(self, folder: Path) -> None:
        """Write a checkpoint atomically."""
        spread = self.spread
        assert spread.sums is not None, "samples were added"
        state = {name: value for stream in self.streams for name, value in stream.state().items()} | {
            "done": np.asarray(self.done),
            "counts": spread.counts.numpy(),
            "sums": spread.sums.numpy(),
            "squares": spread.squares.numpy(),
            "distances": torch.cat(self.distances).numpy(),
        }
        with atomic_path(folder / STATE) as temp, temp.open("wb") as file:
            np.savez(file, **state)  # type: ignore[arg-type]

    def restore(self, folder: Path) -> None:
        """Restore the checkpoint in `folder`, if any."""
        if not (folder / STATE).exists():
            return
        names = [name for stream in self.streams for name in stream.state()]
        state = load_arrays(folder / STATE, ("done", "counts", "sums", "squares", "distances", *names))
        self.done = int(state["done"])
        for stream in self.streams:
            stream.restore(state, self.done)
        spread = self.spread
        spread.counts, spread.sums, spread.squares, distances = (
            torch.from_numpy(state[name]) for name in ("counts", "sums", "squares", "distances")
        )
        self.distances = [distances]
