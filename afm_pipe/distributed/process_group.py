"""The process group: the processes that share a run, and how they communicate.

Under `torchrun` (or `--nproc-per-node`, which starts it) every process runs the same code as one rank of the group. A
sum over the batch is computed on each rank's shard and reduced over the group, so the number of processes affects only
speed.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from afm_pipe.runtime.environment import ADDRESS, VARIABLES, env_rank, env_world_size, under_launcher
from afm_pipe.runtime.errors import RankLostError, UnwritableError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


T = TypeVar("T")
JOIN_SECONDS, SAY_SECONDS = 600.0, 10.0  # to wait for the other processes; between lines that say so
TIMEOUT = timedelta(hours=1)  # of a collective: the others wait while the main process checks images or merges latents


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place in the group."""

    rank: int = 0
    world_size: int = 1
    device: Any = "cpu"  # of networks and batches
    forced: bool = False
    """Communicate even alone, so that one device can test what several need."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def communicates(self) -> bool:
        """Whether there are other ranks to communicate with."""
        return self.world_size > 1 or self.forced

    @property
    def shard(self) -> slice:
        """This rank's part of a batch: a strided shard, so that any prefix of the batch is shared evenly."""
        return slice(self.rank, None, self.world_size)

    def all_reduce(self, tensor: "Tensor") -> "Tensor":
        """Sum a tensor over all ranks in place and return it; the result has the same bits on every rank."""
        if self.communicates:
            with report_lost_rank():
                _dist().all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank. Every rank must call it."""
        return any(self.all_gather(int(flag)))

    def all_gather(self, value: int) -> list[int]:
        """Return the values of all ranks, on every rank."""
        if not self.communicates:
            return [value]
        import torch

        values = torch.zeros(self.world_size, dtype=torch.int64)  # on the CPU: waits for the ranks, not for a GPU
        values[self.rank] = value
        return self.all_reduce(values).tolist()

    def broadcast(self, value: T) -> T:
        """Return the main process's value on every rank."""
        values = [value]
        if self.communicates:
            with report_lost_rank():
                _dist().broadcast_object_list(values)
        return values[0]

    def gather_to_main(self, value: T) -> list[T]:
        """Return the values of all ranks on the main process, and an empty list on the others."""
        if not self.communicates:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main_process else None
        with report_lost_rank():
            _dist().gather_object(value, values)
        return values or []

    def run_on_main(self, write: Callable[[], None]) -> None:
        """Run a function that writes files on the main process while the others wait; every rank raises if it fails.

        Raises UserError, or UnwritableError if the disk is full or not writable.
        """
        error: UserError | None = None
        if self.is_main_process:
            try:
                write()
            except UserError as raised:
                error = raised
            except OSError as raised:
                error = UnwritableError(f"Found a failed write ({raised}): free disk space or fix the permissions.")
        outcome = 0 if error is None else 1 if isinstance(error, UnwritableError) else 2
        outcome = self.all_gather(outcome)[0]
        if error is not None:
            raise error
        if outcome:
            raise (UnwritableError if outcome == 1 else UserError)(
                "Found an error on the main process: see its message."
            )

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def init_distributed(device: "torch.device") -> Iterator[ProcessGroup]:
    """Join the process group that `torchrun` describes in the environment; without one, yield SINGLE_PROCESS.

    Tensors on a CPU are communicated with gloo, those on a GPU with NCCL. If the block fails, the group is not
    destroyed: the other ranks notice when this process ends.
    """
    if not under_launcher() or env_world_size() == 1:
        yield SINGLE_PROCESS
        return
    import torch

    dist = _dist()
    if dist.is_initialized():  # by the caller, which also destroys it
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), device)
        return
    with report_lost_rank():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # FSDP2 uses the current device
            _join(lambda: dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device))
        else:
            _join(lambda: dist.init_process_group("gloo", timeout=TIMEOUT))
    yield ProcessGroup(env_rank(), env_world_size(), device)
    dist.destroy_process_group()


def _join(init: Callable[[], None]) -> None:
    """Initialize the process group in a thread, so that this one can say what it waits for, and obey signals.

    Raises UserError when the others have not come in `JOIN_SECONDS`.
    """
    failures: list[BaseException] = []

    def join() -> None:
        try:
            init()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    began = said = time.monotonic()
    others = f"{env_world_size() - 1} other processes at {':'.join(os.environ.get(name, '?') for name in ADDRESS)}"
    while thread.is_alive():
        thread.join(0.1)
        now = time.monotonic()
        if now - began > JOIN_SECONDS:
            raise UserError(
                f"Found no {others} in {JOIN_SECONDS:.0f} s, as WORLD_SIZE={env_world_size()} says: start them all, or "
                f"unset {', '.join(VARIABLES)}."
            )
        if now - said > SAY_SECONDS:
            said = now
            print(
                f"rank {env_rank()} waits for {others}: {now - began:.0f} of at most {JOIN_SECONDS:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    if failures and "EADDRINUSE" in str(failures[0]):
        address = ":".join(os.environ[name] for name in ADDRESS)
        raise UserError(
            f"Found {address} in use by another program, expected it free for rank 0: set another MASTER_PORT for all "
            f"processes, or unset {', '.join(VARIABLES)}."
        ) from None
    if failures:
        raise failures[0]


@contextmanager
def report_lost_rank() -> Iterator[None]:
    """Convert errors of gloo and of torch.distributed to RankLostError; pass on all others."""
    try:
        yield
    except RuntimeError as error:
        if "gloo/" not in str(error) and not isinstance(error, _dist().DistError):
            raise
        raise RankLostError(
            f"Found another process gone while rank {env_rank()} waited for it ({str(error).splitlines()[0]}): see the "
            "message of that process. To resume from the newest checkpoint, run the same command again."
        ) from None


def _dist() -> Any:
    import torch.distributed as dist

    return dist
