"""Sampling and evaluation by several ranks: the images and the numbers of one."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from afm_pipe.distributed.mapping import map_across_ranks
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.evaluation.metrics import Evaluator, assist, evaluate_run
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.generate import stream_images
from afm_pipe.sampling.requests import Request, Sampler, draw
from afm_pipe.sampling.requests import assist as assist_drawing
from tests.forked import in_ranks
from tests.test_evaluation import SHAPE, Painter, params_with, real, reference, vae  # noqa: F401 (fixtures)


class Batchwise(Painter):
    """Exaggerates rounding: a sample depends a little on its place in the batch and on the batch's size."""

    nfe = 1

    def sample(self, x: torch.Tensor, labels: torch.Tensor, steps: int = 1) -> torch.Tensor:
        return super().sample(x, labels) + 0.01 * torch.arange(len(x)).view(-1, 1, 1, 1) / len(x)

    def num_steps(self, steps: int | None) -> int:
        return steps or 1


@pytest.mark.parametrize("size", [2, 3])
def test_the_first_rank_gets_all_in_order_and_computes_its_share_alone(tmp_path: Path, size: int) -> None:
    def work(ranks: ProcessGroup) -> None:
        own = []

        def compute(piece: int) -> list[torch.Tensor]:
            own.append(piece)
            return [torch.full((piece % 3, 2), piece), torch.tensor(piece / 7, dtype=torch.float64)]

        found = list(map_across_ranks(range(7), compute, ranks))
        assert own == list(range(ranks.rank, 7, size))
        assert [piece for piece, _ in found] == (list(range(7)) if ranks.is_main_process else [])
        for piece, (first, second) in found:
            assert first.tolist() == [[piece, piece]] * (piece % 3)
            assert second.item() == piece / 7

    assert in_ranks(size, tmp_path, work) == [0] * size


@pytest.mark.parametrize("size", [2, 3])
def test_samples_of_several_ranks_are_those_of_one(vae: Any, tmp_path: Path, size: int) -> None:  # noqa: F811
    def images(ranks: ProcessGroup) -> list[torch.Tensor]:
        return [each for _, _, each in stream_images(Batchwise(), vae, params_with(), 2000, 90, 3, ranks=ranks)]

    whole = torch.cat(images(SINGLE_PROCESS))

    def work(ranks: ProcessGroup) -> None:
        mine = images(ranks)
        assert torch.equal(torch.cat(mine), whole) if ranks.is_main_process else not mine

    assert in_ranks(size, tmp_path, work) == [0] * size
    assert len(whole) == 90


def test_what_is_asked_for_at_a_prompt_is_drawn_by_all_ranks(vae: Any, tmp_path: Path) -> None:  # noqa: F811
    sampler = Sampler(Batchwise(), vae, SHAPE, ["ant", "bee", "cow"], 20)

    def work(ranks: ProcessGroup) -> None:
        for name, wanted in (("count", {"count": 50}), ("strips", {"interpolate": "0,1,2", "frames": 9})):
            request = Request(npz=tmp_path / f"{name}{ranks.world_size}.npz", **wanted)  # type: ignore[arg-type]
            if ranks.is_main_process:
                track("draw", draw(sampler, request, 0, 4, 3, ranks))
            else:
                assist_drawing(sampler, request, 0, 4, 3, ranks)

    work(SINGLE_PROCESS)
    assert in_ranks(2, tmp_path, work) == [0, 0]
    for name in ("count", "strips"):
        one, two = (np.load(tmp_path / f"{name}{size}.npz")["arr_0"] for size in (1, 2))
        assert np.array_equal(one, two)


def evaluated(
    generator: nn.Module,
    vae: Any,  # noqa: F811
    reference: Path,  # noqa: F811
    ranks: ProcessGroup,
    folder: Path,
) -> dict[str, Any] | None:
    params = params_with()
    if not ranks.is_main_process:
        assist(params, generator, vae, Evaluator(params, reference), ranks)
        return None
    run = evaluate_run(
        params, generator, vae, reference, {}, work_dir=folder / "work", checkpoint_seconds=0, ranks=ranks
    )
    metrics, picture = track("evaluate", run)
    picture.save(folder / f"nearest{ranks.world_size}.png")
    return metrics


def test_numbers_of_several_ranks_are_those_of_one_after_a_kill_too(
    vae: Any,  # noqa: F811
    reference: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "alone").mkdir()
    alone = evaluated(Batchwise(), vae, reference, SINGLE_PROCESS, tmp_path / "alone")

    class Killed(Batchwise):
        def __init__(self, ranks: ProcessGroup) -> None:
            super().__init__()
            self.ranks, self.passes = ranks, 0

        def sample(self, x: torch.Tensor, labels: torch.Tensor, steps: int = 1) -> torch.Tensor:
            self.passes += 1
            if self.ranks.rank == 1 and self.passes == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().sample(x, labels)

    def killed(ranks: ProcessGroup) -> None:
        evaluated(Killed(ranks), vae, reference, ranks, tmp_path)

    def again(ranks: ProcessGroup) -> None:
        passes = []

        class Counting(Batchwise):
            def sample(self, x: torch.Tensor, labels: torch.Tensor, steps: int = 1) -> torch.Tensor:
                passes.append(len(x))
                return super().sample(x, labels)

        metrics = evaluated(Counting(), vae, reference, ranks, tmp_path)
        (tmp_path / f"passes{ranks.rank}").write_text(json.dumps(passes))
        if metrics:
            (tmp_path / "metrics.json").write_text(json.dumps(metrics))

    codes = in_ranks(2, tmp_path, killed)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert in_ranks(3, tmp_path, again) == [0, 0, 0]
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(alone))
    assert (tmp_path / "nearest3.png").read_bytes() == (tmp_path / "alone" / "nearest1.png").read_bytes()
    passes = [json.loads((tmp_path / f"passes{rank}").read_text()) for rank in range(3)]
    assert [len(each) for each in passes] == [3, 3, 2]  # of 12 micro-batches 4 were measured before the kill
