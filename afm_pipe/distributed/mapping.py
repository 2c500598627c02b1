"""Pieces of work map_across_ranks to the ranks, and what comes of them brought to the first rank in order."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from afm_pipe.distributed.process_group import ProcessGroup

P = TypeVar("P")


def map_across_ranks(
    pieces: Sequence[P], compute: Callable[[P], Sequence[Tensor]], ranks: ProcessGroup
) -> Iterator[tuple[P, list[Tensor]]]:
    """Compute each piece on one rank, in turn; yield pieces and results in order on the first rank, none on others.

    Every rank must go through it to the end. Which rank computes a piece changes nothing in it, so the first rank sees
    what it would have seen alone.
    """
    for start in range(0, len(pieces), ranks.world_size):
        together = pieces[start : start + ranks.world_size]
        own = list(compute(together[ranks.rank])) if ranks.rank < len(together) else []
        yield from zip(together, _on_first(own, ranks), strict=False)


def _on_first(own: list[Tensor], ranks: ProcessGroup) -> list[list[Tensor]]:
    """Return every rank's tensors on the first rank; they travel as safetensors, which runs nothing when it is read."""
    if ranks.world_size == 1:
        return [own]
    from safetensors.torch import load, save

    packed = save({str(place): tensor.contiguous() for place, tensor in enumerate(own)})
    found = [load(content) for content in ranks.gather_to_main(packed)]
    return [[tensors[str(place)] for place in range(len(tensors))] for tensors in found]
