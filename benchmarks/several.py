"""Two ranks against one, a thread each, on B/2's shapes; and what two processes get of this machine at all."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from afm_pipe.distributed.process_group import init_distributed
from afm_pipe.params import Params, Run
from benchmarks.beside import Beside, Works
from benchmarks.measuring import Row, matmul_rate


def ranks(params: Params, quick: bool) -> Iterator[Row]:
    """Processes that live side by side and update in turns: one rank alone, then two together."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        from benchmarks.training import b2_latents, b2_run

        b2_latents(Path(folder))
        worlds = {size: _world(stack, size, b2_run(params), folder) for size in (1, 2)}
        seconds: dict[str, dict[int, list[float]]] = {"update": {1: [], 2: []}, "matmul": {1: [], 2: []}}
        for number in range(-1, 1 if quick else 2):
            for work in ("update", "matmul"):
                for size, members in worlds.items():
                    for member in members:
                        member.begin(work)
                    spent = [member.end() for member in members]
                    if number >= 0:
                        seconds[work][size].append(max(spent))
    one, two = seconds["update"][1], seconds["update"][2]
    gain = median(alone / both for alone, both in zip(one, two, strict=True))
    times = seconds["matmul"]
    possible = 2 * median(alone / both for alone, both in zip(times[1], times[2], strict=True))
    balance = _balance(params)
    note = (
        f"two processes that only multiply matrices, sharing nothing, do {possible:.2f} times the work of one here; "
        f"the one image of four that is penalised is on one rank, so that both end {balance:.2f} times as soon at the "
        f"best: together {possible * balance / 2:.2f}, before any gradient is exchanged"
    )
    what = "B/2, 4 x 32 x 32, batch 4: two gloo ranks of one thread"
    yield Row(
        "ranks", what, 1 / median(two), 1 / median(one), "updates/s", "one rank of one thread", gain, ">= 1.6", note
    )


def _balance(params: Params) -> float:
    """Return how many times less the busier of two ranks has to do, by count of FLOPs, than one rank alone."""
    from afm_pipe.models.model_files import run_config
    from afm_pipe.planning.counting import measure
    from benchmarks.inputs import CLASS_COUNT
    from benchmarks.training import B2_SHAPE, b2_run

    run = b2_run(params)
    config = run_config(run, B2_SHAPE, CLASS_COUNT)
    return measure(run, config, 4).flops / measure(run, config, 2).flops  # one image is penalised in either


def _world(stack: ExitStack, size: int, run: Run, folder: str) -> list[Beside]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [stack.enter_context(Beside(_member, rank, size, port, run, folder)) for rank in range(size)]


@contextmanager
def _member(rank: int, size: int, port: int, run: Run, folder: str) -> Iterator[Works]:
    """Be one rank; each work returns the seconds it took."""
    import time

    import torch

    from afm_pipe.data.latents import Latents
    from benchmarks.training import CPU, one_update, trainer_of

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with init_distributed(CPU) as together:
        trainer = trainer_of(run, Latents.open(Path(folder) / "latents.h5"), together)

        def update() -> float:
            together.barrier()
            started = time.perf_counter()
            one_update(trainer)
            return time.perf_counter() - started

        def matmul() -> float:
            together.barrier()
            return 1 / matmul_rate(seconds=1.0)

        yield {"update": update, "matmul": matmul}
