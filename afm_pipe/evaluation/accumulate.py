"""What is kept of the samples seen so far, and how it outlives a kill.

Shapes: B samples, C channels, h x w pixels of a thumbnail, N samples seen.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afm_pipe.evaluation.measures import ClassSpread
from afm_pipe.evaluation.nearest import load_arrays
from afm_pipe.evaluation.networks import FeatureNetwork
from afm_pipe.evaluation.statistics import FeatureStream
from afm_pipe.runtime.files import atomic_path

STATE = "state.npz"


class EvalBatch(NamedTuple):
    """What is measured of a batch of samples."""

    small: Tensor  # thumbnails (B, C, h, w)
    near: Tensor  # distances to the nearest training images (B, 3)
    which: Tensor  # and their places among the thumbnails (B, 3)
    features: Sequence[Tensor]  # (B, D) by network


class MetricAccumulator:
    """Features by network, the spread within classes, distances to training images, and the first few samples."""

    def __init__(self, networks: Sequence[FeatureNetwork], samples: int, num_classes: int) -> None:
        self.streams = [FeatureStream(network, samples) for network in networks]
        self.spread = ClassSpread(num_classes)
        self.distances: list[Tensor] = []  # (B, 3) each
        self.pictured: list[Tensor] = []  # (B, C, h, w) each
        self.found: list[Tensor] = []  # (B, 3) each
        self.done = 0

    def add(self, batch: EvalBatch, labels: Tensor, pictured: bool) -> None:
        """Take in a batch of samples of classes `labels` (B,)."""
        for stream, features in zip(self.streams, batch.features, strict=True):
            stream.take(features)
        self.spread.add(batch.small, labels)
        self.distances.append(batch.near)
        if pictured:
            self.pictured.append(batch.small)
            self.found.append(batch.which)
        self.done += len(labels)

    def save(self, folder: Path) -> None:
        """Write all of it, whole or not at all."""
        state = {name: value for stream in self.streams for name, value in stream.state().items()}
        spread = self.spread
        assert spread.sums is not None, "something was seen"
        state |= {
            "done": np.asarray(self.done),
            "counts": spread.counts.numpy(),
            "sums": spread.sums.numpy(),
            "squares": spread.squares.numpy(),
            "distances": torch.cat(self.distances).numpy(),
            "pictured": torch.cat(self.pictured).numpy(),
            "found": torch.cat(self.found).numpy(),
        }
        with atomic_path(folder / STATE) as aside, aside.open("wb") as file:
            np.savez(file, **state)  # type: ignore[arg-type]

    def restore(self, folder: Path) -> None:
        """Go on from what was saved in `folder`, if anything was."""
        path = folder / STATE
        if not path.exists():
            return
        own = ("done", "counts", "sums", "squares", "distances", "pictured", "found")
        names = [f"{stream.network.name}/{part}" for stream in self.streams for part in ("features", "mu", "scatter")]
        state = load_arrays(path, (*own, *names))
        self.done = int(state["done"])
        for stream in self.streams:
            stream.restore(state, self.done)
        self.spread.counts, self.spread.sums, self.spread.squares = (
            torch.from_numpy(state[name]) for name in ("counts", "sums", "squares")
        )
        self.distances, self.pictured, self.found = (
            [torch.from_numpy(state[name])] for name in ("distances", "pictured", "found")
        )
