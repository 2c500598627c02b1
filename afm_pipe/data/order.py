"""Order of the images: a function of (seed, stream, images seen) only, so that a resumed run continues it exactly."""

import hashlib

import torch
from torch import Tensor

ALL = slice(None)  # the shard of a single process: the whole batch


def stream_generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a random generator for a stream, seeded by `seed` and the stream's names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Order:
    """An infinite sequence of image indices, reshuffled every epoch."""

    def __init__(self, num_images: int, seed: int, stream: str) -> None:
        self.num_images, self.seed, self.stream = num_images, seed, stream
        self._epoch, self._shuffled = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, start: int, count: int) -> Tensor:
        """Return the indices at positions start, ..., start + count - 1 of the sequence: (count,) int64."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_images)
            part = self._epoch_order(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = stream_generator(self.seed, self.stream, "epoch", epoch)
            self._epoch, self._shuffled = epoch, torch.randperm(self.num_images, generator=generator)
        return self._shuffled
