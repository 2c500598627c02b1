"""The processes that do one piece of work together: which of them this is, and what they tell each other.

Under `torchrun` (or `--nproc-per-node`, which starts it) every process runs the same code as one rank of several; else
it is alone. Where a number is a sum over the batch, each rank sums its own share and `sum_` adds these up, so that
nothing but speed depends on how many there are.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from afm_pipe.runtime.environment import env_rank, env_world_size
from afm_pipe.runtime.errors import RankLostError, UnwritableError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that work together."""

    rank: int = 0
    world_size: int = 1
    device: Any = "cpu"  # where what they tell each other must lie

    @property
    def is_main_process(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    @property
    def shard(self) -> slice:
        """Which of the samples of a batch are this rank's: every `size`-th, so that any first part is shared evenly."""
        return slice(self.rank, None, self.world_size)

    def all_reduce(self, tensor: "Tensor") -> "Tensor":
        """Add a tensor up over the ranks, in place, to the same bits on each; return it."""
        if self.world_size > 1:
            with _or_lost():
                _distributed().all_reduce(tensor)
        return tensor

    def begin_all_reduce(self, tensor: "Tensor") -> Any:
        """Begin to add a tensor up over the ranks, in place; `wait` for what this returns before it is read."""
        with _or_lost():
            return _distributed().all_reduce(tensor, async_op=True)

    def wait(self, work: Any) -> None:
        """Wait for a sum that was begun."""
        with _or_lost():
            work.wait()

    def any(self, flag: bool) -> bool:
        """Tell whether any rank says so; all must ask at the same moment."""
        if self.world_size == 1:
            return flag
        import torch

        votes = self.all_reduce(torch.tensor(int(flag), device=self.device))
        with _or_lost():
            return bool(votes.item())

    def all_gather(self, value: int) -> list[int]:
        """Return every rank's value, on each rank."""
        if self.world_size == 1:
            return [value]
        import torch

        values = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        return self.all_reduce(values).tolist()

    def broadcast(self, value: T) -> T:
        """Return the main process's value, which JSON can hold, on every process."""
        if self.world_size == 1:
            return value
        content = json.dumps(value).encode() if self.is_main_process else b""
        import torch

        length = max(self.all_gather(len(content)))
        sent = torch.zeros(length, dtype=torch.uint8)
        sent[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else 0
        sent = sent.to(self.device)
        with _or_lost():
            _distributed().broadcast(sent, 0)
        return json.loads(sent.cpu().numpy().tobytes())

    def gather_to_main(self, content: bytes) -> list[bytes]:
        """Return every rank's bytes, in order of ranks, on the first rank, and nothing on the others."""
        if self.world_size == 1:
            return [content]
        import torch

        lengths = self.all_gather(len(content))
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        padded = padded.to(self.device)
        found = [torch.empty_like(padded) for _ in lengths] if self.is_main_process else None
        with _or_lost():
            _distributed().gather(padded, found)
        return [each[:n].cpu().numpy().tobytes() for each, n in zip(found or [], lengths, strict=False)]

    def run_on_main(self, act: Callable[[], None]) -> None:
        """Do something with files on the first rank while the others wait; where it fails, all raise a UserError."""
        error: UserError | None = None
        if self.is_main_process:
            try:
                act()
            except UserError as raised:
                error = raised
            except OSError as raised:
                error = UnwritableError(f"Found no way to write ({raised}): make room there, or mend its permissions.")
        outcome = 0 if error is None else 1 if isinstance(error, UnwritableError) else 2
        outcome = self.all_gather(outcome)[0]
        if error is not None:
            raise error
        if outcome:
            raise (UnwritableError if outcome == 1 else UserError)("Found the first rank failing: see what it said.")

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def init_distributed(device: "torch.device") -> Iterator[ProcessGroup]:
    """Join the other ranks that the environment names (`torchrun` sets it); without any, this process is alone.

    gloo connects CPUs, nccl GPUs. When the block fails the process group is left as it is: the others learn of it when
    this process ends.
    """
    rank, size = env_rank(), env_world_size()
    if size == 1:
        yield SINGLE_PROCESS
        return
    dist = _distributed()
    if dist.is_initialized():  # by whoever called; then it is theirs to end
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), device)
        return
    with _or_lost():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    yield ProcessGroup(rank, size, device)
    dist.destroy_process_group()


@contextmanager
def _or_lost() -> Iterator[None]:
    """Turn what torch raises when a peer is gone into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from None


@contextmanager
def report_lost_rank() -> Iterator[None]:
    """Turn what torch's own modules raise within this when a peer is gone into an error that says so, and no other."""
    try:
        yield
    except RuntimeError as error:
        if "gloo/" in str(error) or isinstance(error, _distributed().DistError):
            raise _lost(error) from None
        raise


def _lost(error: RuntimeError) -> RankLostError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RankLostError(
        f"Found another rank gone while this one (rank {env_rank()}) waited for it ({reason}): see what that one "
        "said; the same command goes on from the newest checkpoint."
    )


def _distributed() -> Any:
    import torch.distributed as dist

    return dist
