"""Two processes of one thread against one, on the shapes of B/2, and the bound that this machine sets."""

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
    """Update in turns: one process alone, then two together."""
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
        f"two processes that multiply matrices and share nothing do {possible:.2f} times the work of one; one process "
        f"has the one penalized image of four, so both together end at most {balance:.2f} times as soon: "
        f"{possible * balance / 2:.2f} is possible before any gradient is exchanged"
    )
    what = "B/2, 4 x 32 x 32, batch 4: two gloo processes of one thread"
    yield Row(
        "ranks", what, 1 / median(two), 1 / median(one), "updates/s", "one process of one thread", gain, ">= 1.6", note
    )


def _balance(params: Params) -> float:
    """Return the FLOPs of one process alone over those of the busier of two."""
    from afm_pipe.models.model_files import run_config
    from afm_pipe.planning.counting import measure
    from benchmarks.inputs import CLASS_COUNT
    from benchmarks.training import B2_SHAPE, b2_run

    run = b2_run(params)
    config = run_config(run, B2_SHAPE, CLASS_COUNT)
    return measure(run, config, 4).flops / measure(run, config, 2).flops  # one image is penalized in either


def _world(stack: ExitStack, size: int, run: Run, folder: str) -> list[Beside]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [stack.enter_context(Beside(_member, rank, size, port, run, folder)) for rank in range(size)]


@contextmanager
def _member(rank: int, size: int, port: int, run: Run, folder: str) -> Iterator[Works]:
    """Yield the works of one process; each returns its seconds."""
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
