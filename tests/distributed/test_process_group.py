"""What processes exchange, and a group of one that communicates as several do."""

import multiprocessing
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from afm_pipe.distributed import process_group
from afm_pipe.distributed.process_group import ProcessGroup, init_distributed, report_lost_rank
from afm_pipe.params import Run
from afm_pipe.runtime.errors import RankLostError
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


def test_a_process_that_waits_for_a_hung_one_ends_after_the_timeout(tmp_path: Path) -> None:
    """Rank 1 is alive and never comes to the barrier; rank 0 must not wait for ever."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"} | address
        process_group.TIMEOUT = timedelta(seconds=2)
        with init_distributed(CPU) as group:
            assert group.world_size == 2
            if number == 1:
                time.sleep(30)
            began = time.monotonic()
            try:
                with report_lost_rank():
                    group.barrier()
            except RankLostError as error:
                (tmp_path / "said").write_text(f"{time.monotonic() - began:.1f} {error}")
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    processes[0].join(15)
    processes[1].kill()
    processes[0].kill()
    seconds, _, words = (tmp_path / "said").read_text().partition(" ")
    assert 1 < float(seconds) < 10 and "process" in words


def test_collectives_may_take_an_hour_on_the_host_and_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process checks images or merges latents meanwhile: torch's 10 minutes of NCCL would be too few."""
    calls: list[tuple[str, Any]] = []
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: calls.append((backend, more["timeout"])))
    for device in (CPU, torch.device("cuda", 0)):
        with init_distributed(device):
            pass
    assert calls == [("gloo", timedelta(hours=1)), ("cpu:gloo,cuda:nccl", timedelta(hours=1))]
