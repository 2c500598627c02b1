"""What is kept of the samples seen so far, and how it outlives a kill.

Shapes: B samples, C channels, h x w pixels of a thumbnail, N samples seen.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afm_pipe.evaluation.measures import ClassSpread
from afm_pipe.evaluation.nearest import load_arrays
from afm_pipe.evaluation.networks import FeatureNetwork
from afm_pipe.evaluation.reference import FeatureStream
from afm_pipe.files import atomic_path

STATE = "state.npz"


class Seen:
    """Features by network, the spread within classes, distances to training images, and the first few samples."""

    def __init__(self, networks: Sequence[FeatureNetwork], samples: int, num_classes: int) -> None:
        self.streams = [FeatureStream(network, samples) for network in networks]
        self.spread = ClassSpread(num_classes)
        self.distances: list[Tensor] = []  # (B, 3) each
        self.pictured: list[Tensor] = []  # (B, C, h, w) each
        self.found: list[Tensor] = []  # (B, 3) each
        self.done = 0

    def add(
        self, images: Tensor, small: Tensor, labels: Tensor, near: Tensor, pictured: tuple[Tensor, Tensor] | None
    ) -> None:
        """Take in a batch: images (B, C, H, W), their thumbnails, labels (B,), distances to the nearest (B, 3)."""
        for stream in self.streams:
            stream.add(images)
        self.spread.add(small, labels)
        self.distances.append(near)
        if pictured is not None:
            self.pictured.append(pictured[0])
            self.found.append(pictured[1])
        self.done += len(images)

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
