"""The processes that do one piece of work together: which of them this is, and what they tell each other.

Under `torchrun` (or `--nproc-per-node`, which starts it) every process runs the same code as one rank of several; else
it is alone. Where a number is a sum over the batch, each rank sums its own share and `sum_` adds these up, so that
nothing but speed depends on how many there are.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from afm_pipe.errors import UnwritableError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RankLostError(UserError):
    """Another rank has ended while this one waited for it; that one has said why, or was killed."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1
    device: Any = "cpu"  # where what they tell each other must lie

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    @property
    def own(self) -> slice:
        """Which of the samples of a batch are this rank's: every `size`-th, so that any first part is shared evenly."""
        return slice(self.rank, None, self.size)

    def sum_(self, tensor: "Tensor") -> "Tensor":
        """Add a tensor up over the ranks, in place, to the same bits on each; return it."""
        if self.size > 1:
            with _or_lost():
                _distributed().all_reduce(tensor)
        return tensor

    def begin_sum_(self, tensor: "Tensor") -> Any:
        """Begin to add a tensor up over the ranks, in place; `wait` for what this returns before it is read."""
        with _or_lost():
            return _distributed().all_reduce(tensor, async_op=True)

    def wait(self, work: Any) -> None:
        """Wait for a sum that was begun."""
        with _or_lost():
            work.wait()

    def any(self, flag: bool) -> bool:
        """Tell whether any rank says so; all must ask at the same moment."""
        if self.size == 1:
            return flag
        import torch

        votes = self.sum_(torch.tensor(int(flag), device=self.device))
        with _or_lost():
            return bool(votes.item())

    def gather(self, value: int) -> list[int]:
        """Return every rank's value, on each rank."""
        if self.size == 1:
            return [value]
        import torch

        values = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        return self.sum_(values).tolist()

    def on_first(self, content: bytes) -> list[bytes]:
        """Return every rank's bytes, in order of ranks, on the first rank, and nothing on the others."""
        if self.size == 1:
            return [content]
        import torch

        lengths = self.gather(len(content))
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        padded = padded.to(self.device)
        found = [torch.empty_like(padded) for _ in lengths] if self.first else None
        with _or_lost():
            _distributed().gather(padded, found)
        return [each[:n].cpu().numpy().tobytes() for each, n in zip(found or [], lengths, strict=False)]

    def on_first_or_none(self, act: Callable[[], None]) -> None:
        """Do something with files on the first rank while the others wait; where it fails, all raise a UserError."""
        error: UserError | None = None
        if self.first:
            try:
                act()
            except UserError as raised:
                error = raised
            except OSError as raised:
                error = UnwritableError(f"Found no way to write ({raised}): make room there, or mend its permissions.")
        outcome = 0 if error is None else 1 if isinstance(error, UnwritableError) else 2
        outcome = self.gather(outcome)[0]
        if error is not None:
            raise error
        if outcome:
            raise (UnwritableError if outcome == 1 else UserError)("Found the first rank failing: see what it said.")

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)


ALONE = Ranks()
SECONDS_FIRST = 5.0  # that the rank which has most to say has for it


def under_launcher() -> bool:
    """Tell whether torchrun, or what stands in for it, has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def env_rank() -> int:
    """Return this process's rank as its environment tells it, before anybody has joined."""
    return int(os.environ.get("RANK", "0"))


def env_size() -> int:
    """Return how many ranks there are as the environment tells it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: "torch.device") -> Iterator[Ranks]:
    """Join the other ranks that the environment names (`torchrun` sets it); without any, this process is alone.

    gloo connects CPUs, nccl GPUs. When the block fails the process group is left as it is: the others learn of it when
    this process ends.
    """
    rank, size = env_rank(), env_size()
    if size == 1:
        yield ALONE
        return
    dist = _distributed()
    if dist.is_initialized():  # by whoever called; then it is theirs to end
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    with _or_lost():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    yield Ranks(rank, size, device)
    dist.destroy_process_group()


@contextmanager
def _or_lost() -> Iterator[None]:
    """Turn what torch raises when a peer is gone into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from None


@contextmanager
def peers_needed() -> Iterator[None]:
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


def end(message: str, code: int, agreed: bool = False, lost: bool = False) -> NoReturn:
    """Print on stderr why this process ends, once for all ranks, and end it with an exit code.

    Where all have `agreed` to end the first rank says so. Where several may have the same to say, the others wait for
    it: whoever started the ranks ends them all when one has ended. It also says what became of one that is `lost`.
    """
    if env_size() == 1:
        print(message, file=sys.stderr)
        raise SystemExit(code)
    if env_rank() > 0 and not agreed:
        time.sleep(SECONDS_FIRST)
    if not (agreed and env_rank() > 0 or lost and "TORCHELASTIC_RUN_ID" in os.environ):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # at once: to take an interpreter with torch apart takes seconds, in which the others would wait


def _distributed() -> Any:
    import torch.distributed as dist

    return dist
