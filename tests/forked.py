"""Real ranks in a test: forked processes that find each other through gloo."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from afm_pipe.distributed.process_group import ProcessGroup


def in_ranks(size: int, folder: Path, work: Callable[[ProcessGroup], None]) -> list[int | None]:
    """Run `work` in `size` forked processes, each a rank; return their exit codes. `folder` is for where they meet."""
    meeting = folder / f"meeting{len(list(folder.glob('meeting*')))}"
    meeting.touch()

    def child(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        work(ProcessGroup(rank, size))
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
