"""Work shared over processes, with its results on the main process."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from afm_pipe.distributed.process_group import ProcessGroup

P = TypeVar("P")


def map_across_ranks(
    pieces: Sequence[P], compute: Callable[[P], Sequence[Tensor]], group: ProcessGroup
) -> Iterator[tuple[P, list[Tensor]]]:
    """Compute each piece on one process; yield pieces and results in order on the main process, nothing on the others.

    Every process must iterate to the end. A process computes every `world_size`-th piece, in order; if the result of a
    piece depends on the piece alone, the main process yields the same as a single process.
    """
    for start in range(0, len(pieces), group.world_size):
        current = pieces[start : start + group.world_size]
        results = list(compute(current[group.rank])) if group.rank < len(current) else []
        yield from zip(current, _gather_to_main(results, group), strict=False)


def _gather_to_main(tensors: list[Tensor], group: ProcessGroup) -> list[list[Tensor]]:
    """Return every process's tensors on the main process, sent as safetensors, which cannot carry code."""
    if group.world_size == 1:
        return [tensors]
    from safetensors.torch import load, save

    sent = save({str(place): tensor.contiguous() for place, tensor in enumerate(tensors)})
    received = [load(content) for content in group.gather_to_main(sent)]
    return [[each[str(place)] for place in range(len(each))] for each in received]
