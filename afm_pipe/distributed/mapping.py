"""Work shared over processes, with the results on the main process."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from afm_pipe.distributed.process_group import ProcessGroup

P = TypeVar("P")


def map_across_ranks(
    pieces: Sequence[P], compute: Callable[[P], Sequence[Tensor]], group: ProcessGroup
) -> Iterator[tuple[P, list[Tensor]]]:
    """Compute each piece on one process; yield pieces and results in order on the main process, nothing on the others.

    Rank r computes the pieces r, r + world_size, ... in order. Every process must iterate to the end.
    """
    for start in range(0, len(pieces), group.world_size):
        current = pieces[start : start + group.world_size]
        results = list(compute(current[group.rank])) if group.rank < len(current) else []
        if group.world_size > 1:  # a pickled view would hold its whole storage
            results = [tensor.to("cpu", copy=True) for tensor in results]
        yield from zip(current, group.gather_to_main(results), strict=False)
