"""Sampling by several processes: the images of one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.requests import Request, draw
from afm_pipe.sampling.sampler import balanced_labels
from tests.evaluation.conftest import vae  # noqa: F401 (fixture)
from tests.evaluation.painter import Batchwise, params_with, sampler_of
from tests.forked import in_ranks


@pytest.mark.parametrize("size", [2, 3])
def test_samples_of_several_processes_are_those_of_one(vae: Any, tmp_path: Path, size: int) -> None:  # noqa: F811
    def images(group: ProcessGroup) -> list[torch.Tensor]:
        return list(sampler_of(Batchwise(), vae, group=group).stream(balanced_labels(range(90), 3), 2000))

    whole = torch.cat(images(SINGLE_PROCESS))

    def work(group: ProcessGroup) -> None:
        mine = images(group)
        assert torch.equal(torch.cat(mine), whole) if group.is_main_process else not mine

    assert in_ranks(size, tmp_path, work) == [0] * size
    assert len(whole) == 90


def test_requests_are_drawn_by_all_processes_and_written_by_one(vae: Any, tmp_path: Path) -> None:  # noqa: F811
    def work(group: ProcessGroup) -> None:
        sampler = sampler_of(Batchwise(), vae, group=group)
        for name, wanted in (("count", {"count": 50}), ("strips", {"interpolate": "0,1,2", "frames": 9})):
            request = Request(npz=tmp_path / f"{name}{group.world_size}.npz", **wanted)  # type: ignore[arg-type]
            drawn = track("draw", draw(sampler, request, params_with().sample))
            assert (drawn is not None) == group.is_main_process

    work(SINGLE_PROCESS)
    assert in_ranks(2, tmp_path, work) == [0, 0]
    for name in ("count", "strips"):
        one, two = (np.load(tmp_path / f"{name}{size}.npz")["arr_0"] for size in (1, 2))
        assert np.array_equal(one, two)
