"""What processes exchange, and a group of one that communicates as several do."""

from pathlib import Path

import pytest
import torch

from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.params import Run
from afm_pipe.training.engine import Engine
from afm_pipe.training.trainer import Trainer
from benchmarks.inputs import latents_file
from benchmarks.training import CPU, trainer_of
from tests.forked import in_ranks
from tests.training.running import same_weights


def test_votes_and_objects_of_gpu_processes_travel_on_the_host(tmp_path: Path) -> None:
    """So that no vote waits for a device; this machine need not have one."""

    def work(group: ProcessGroup) -> None:
        of_gpus = ProcessGroup(group.rank, group.world_size, torch.device("cuda", group.rank))
        assert of_gpus.any(group.rank == 1)
        assert not of_gpus.any(False)
        assert of_gpus.all_gather(group.rank) == [0, 1]
        assert of_gpus.broadcast(group.rank) == 0

    assert in_ranks(2, tmp_path, work) == [0, 0]


@pytest.mark.parametrize("shard", [False, True])
def test_a_forced_group_of_one_communicates_and_has_the_same_numbers(
    smoke_run: Run, tmp_path: Path, shard: bool
) -> None:
    latents = latents_file(tmp_path / "latents.h5", 64, (4, 8, 8))
    run = smoke_run.model_copy(update={"batch_size": 8})

    def work(group: ProcessGroup) -> None:
        def trained(group: ProcessGroup, engine: Engine = Engine()) -> Trainer:  # noqa: B008
            trainer = trainer_of(run, latents, group, engine)
            for _ in range(2):
                trainer.update(trainer.draw())
            return trainer

        alone, forced = trained(group), trained(ProcessGroup(device=CPU, forced=True), Engine(shard=shard))
        if shard:
            assert forced.state.is_sharded
            forced.state.gather(forced.objective)
            assert all(map(torch.allclose, alone.state.ema.parameters(), forced.state.ema.parameters()))
        else:
            assert forced.learner.modules["generator"] is not forced.state.networks["generator"]  # it is wrapped
            assert same_weights(alone.state, forced.state)

    assert in_ranks(1, tmp_path, work) == [0]
