"""Evaluation by several processes: the numbers of one."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.runtime.progress import track
from tests.evaluation.painter import Batchwise, params_with, sampler_of
from tests.forked import in_ranks


def evaluated(
    generator: nn.Module, vae: Any, reference: Path, group: ProcessGroup, folder: Path
) -> dict[str, Any] | None:
    sampler, evaluator = sampler_of(generator, vae, group=group), Evaluator(params_with(), reference)
    return track("evaluate", evaluator.evaluate(sampler, {}, folder / "work", checkpoint_seconds=0))


def test_numbers_of_several_processes_are_those_of_one_after_a_kill_too(
    vae: Any, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    alone = evaluated(Batchwise(), vae, reference, SINGLE_PROCESS, tmp_path / "alone")

    class Killed(Batchwise):
        def __init__(self, group: ProcessGroup) -> None:
            super().__init__()
            self.group, self.passes = group, 0

        def sample(self, x: torch.Tensor, labels: torch.Tensor, steps: int | None = None) -> torch.Tensor:
            self.passes += 1
            if self.group.rank == 1 and self.passes == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().sample(x, labels)

    def killed(group: ProcessGroup) -> None:
        evaluated(Killed(group), vae, reference, group, tmp_path)

    def again(group: ProcessGroup) -> None:
        passes = []

        class Counting(Batchwise):
            def sample(self, x: torch.Tensor, labels: torch.Tensor, steps: int | None = None) -> torch.Tensor:
                passes.append(len(x))
                return super().sample(x, labels)

        metrics = evaluated(Counting(), vae, reference, group, tmp_path)
        (tmp_path / f"passes{group.rank}").write_text(json.dumps(passes))
        assert (metrics is not None) == group.is_main_process
        if metrics:
            (tmp_path / "metrics.json").write_text(json.dumps(metrics))

    codes = in_ranks(2, tmp_path, killed)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert in_ranks(3, tmp_path, again) == [0, 0, 0]
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(alone))
    passes = [json.loads((tmp_path / f"passes{rank}").read_text()) for rank in range(3)]
    assert [len(each) for each in passes] == [3, 3, 2]  # of 12 micro-batches 4 were measured before the kill
