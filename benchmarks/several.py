"""Two ranks against one, a thread each, on B/2's shapes; and what two processes get of this machine at all."""

import os
import socket
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from afm_pipe.params import Params, Run
from benchmarks.measuring import Row, matmul_rate


def ranks(params: Params, quick: bool) -> Iterator[Row]:
    """Processes that live side by side and update in turns: one rank alone, then two together."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.training import b2_latents, b2_run

        b2_latents(Path(folder))
        worlds = {size: _world(context, size, b2_run(params), folder) for size in (1, 2)}
        try:
            seconds: dict[str, dict[int, list[float]]] = {"update": {1: [], 2: []}, "matmul": {1: [], 2: []}}
            for number in range(-1, 1 if quick else 2):
                for work in ("update", "matmul"):
                    for size, (_, pipes) in worlds.items():
                        for pipe in pipes:
                            pipe.send(work)
                        spent = [pipe.recv() for pipe in pipes]
                        if number >= 0:
                            seconds[work][size].append(max(spent))
        finally:
            for processes, pipes in worlds.values():
                for pipe in pipes:
                    pipe.close()
                for process in processes:
                    process.join()
    one, two = seconds["update"][1], seconds["update"][2]
    gain = median(alone / both for alone, both in zip(one, two, strict=True))
    times = seconds["matmul"]
    possible = 2 * median(alone / both for alone, both in zip(times[1], times[2], strict=True))
    note = (
        f"two processes that only multiply matrices, sharing nothing, do {possible:.2f} times the work of one here: no "
        "exchange of gradients can do better"
    )
    what = "B/2, 4 x 32 x 32, batch 4: two gloo ranks of one thread"
    yield Row(
        "ranks", what, 1 / median(two), 1 / median(one), "updates/s", "one rank of one thread", gain, ">= 1.6", note
    )


def _world(context: Any, size: int, run: Run, folder: str) -> tuple[list[Any], list[Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        process = context.Process(target=_member, args=(there, rank, size, port, run, folder), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    return processes, pipes


def _member(pipe: Any, rank: int, size: int, port: int, run: Run, folder: str) -> None:
    """Be one rank: do what the pipe says until it closes, and answer with the seconds it took."""
    import time

    import torch

    from afm_pipe.data.latents import Latents
    from afm_pipe.models.checkpoint_format import run_config
    from afm_pipe.ranks import joined
    from afm_pipe.training.state import TrainingState
    from benchmarks.inputs import CLASS_COUNT
    from benchmarks.training import B2_SHAPE, CPU, OurTraining

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined(CPU) as together:
        latents = Latents.open(Path(folder) / "latents.h5")
        config = run_config(run, B2_SHAPE, CLASS_COUNT)
        training = OurTraining(run, latents, TrainingState.fresh(config, run, CPU), config, together)
        while True:
            try:
                work = pipe.recv()
            except EOFError:
                break
            together.barrier()
            started = time.perf_counter()
            if work == "update":
                training.update()
                pipe.send(time.perf_counter() - started)
            else:
                pipe.send(1 / matmul_rate(seconds=1.0))
