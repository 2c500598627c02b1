"""Work shared over processes, with its results on the main process."""

from pathlib import Path

import pytest
import torch

from afm_pipe.distributed.mapping import map_across_ranks
from afm_pipe.distributed.process_group import ProcessGroup
from tests.forked import in_ranks


@pytest.mark.parametrize("size", [2, 3])
def test_main_process_gets_all_results_in_order_and_each_computes_its_share(tmp_path: Path, size: int) -> None:
    def work(group: ProcessGroup) -> None:
        own = []

        def compute(piece: int) -> list[torch.Tensor]:
            own.append(piece)
            return [torch.full((piece % 3, 2), piece), torch.tensor(piece / 7, dtype=torch.float64)]

        found = list(map_across_ranks(range(7), compute, group))
        assert own == list(range(group.rank, 7, size))
        assert [piece for piece, _ in found] == (list(range(7)) if group.is_main_process else [])
        for piece, (first, second) in found:
            assert first.tolist() == [[piece, piece]] * (piece % 3)
            assert second.item() == piece / 7

    assert in_ranks(size, tmp_path, work) == [0] * size
