"""Optimization of the networks: gradient reduction over processes, optimizer steps, EMA, non-finite losses.

Unsharded networks are wrapped in DistributedDataParallel, with a hook that sums gradients during the backward pass;
sharded ones use FSDP2 (`sharding.py`). Losses are weighted by their share of the batch, so gradients are summed, not
averaged.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.objectives.base import Hyperparameters, Objective
from afm_pipe.objectives.schedules import ema_decay_at
from afm_pipe.params import Ema
from afm_pipe.runtime.errors import NotFiniteError
from afm_pipe.training.sharding import full_tensor, local_shard
from afm_pipe.training.state import TrainingState

NEVER = 2**31 - 1


class Cells(NamedTuple):
    """Numbers of an update as tensors on the device, () each, for a graph that is replayed for other updates."""

    update: Tensor
    """Number of the update."""
    ema_weight: Tensor
    """Weight of the new weights in the EMA: 1 - its decay."""


class Learner:
    """Updates the networks of a state, identically on every process; see `objectives.base.Learner`."""

    def __init__(self, state: TrainingState, ema: Ema, group: ProcessGroup) -> None:
        self.state, self.ema, self.group = state, ema, group
        self.modules: dict[str, nn.Module] = dict(state.networks)
        if group.communicates and not state.is_sharded:
            self.modules = {name: _data_parallel(network) for name, network in state.networks.items()}
        self._moved = False  # the sampled network, in this update
        device = state.sums.device
        # First update with a non-finite loss, on the device; from then on optimizers do not step.
        self._diverged_at = torch.full((), NEVER, device=device)
        # On a GPU, reading a loss would make the host wait for the device, so it is checked once per row.
        self.checks_immediately = device.type == "cpu"
        self.cells: Cells | None = None  # while an update is captured

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self.state.networks

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self.state.buffers

    def module(self, name: str) -> nn.Module:
        return self.modules[name]

    @contextmanager
    def accumulate(self, name: str, last: bool) -> Iterator[None]:
        """Context of a backward pass of `module(name)`; only the `last` one of a batch reduces gradients.

        Sharded networks reduce in every backward pass, since unsharded gradients would not fit in memory.
        """
        module = self.modules[name]
        if last or not isinstance(module, DistributedDataParallel):
            yield
            return
        with module.no_sync():
            yield

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        return self.group.all_reduce(values[0] if len(values) == 1 else torch.stack([*values]).sum(0))

    def update(self, objective: Objective, batch: Any, hyperparameters: Hyperparameters) -> Tensor:
        """Run one update of an objective, and of the EMA; return its terms."""
        terms = objective.update(self, batch, hyperparameters)
        self.update_ema()
        return terms

    def step(self, name: str, loss: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        network, optimizer = self.networks[name], self.state.optimizers[name]
        if self.checks_immediately:
            if not math.isfinite(loss.item()):
                raise _not_finite(f"a {name} loss of {loss.item()}", self.state.update)
        else:
            update = self.state.update if self.cells is None else self.cells.update
            diverged_at = torch.where(loss.isfinite(), NEVER, update)
            torch.minimum(self._diverged_at, diverged_at, out=self._diverged_at)
            optimizer.found_inf = (self._diverged_at < NEVER).float()  # type: ignore[attr-defined]  # read by AdamW
        norm = nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None], foreach=True)
        if hyperparameters.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(network.parameters(), hyperparameters.gradient_clip, norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = hyperparameters.lr[name]
        optimizer.step()
        optimizer.zero_grad()
        self._moved |= name == self.state.sampled
        return full_tensor(norm)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the EMA of the sampled network's weights, if the update stepped them."""
        moved, self._moved = self._moved, False
        if not moved:
            return
        averages: list[Tensor] = [local_shard(average) for average in self.state.ema.parameters()]
        sampled = self.networks[self.state.sampled]
        device = averages[0].device
        weights = [local_shard(weight).to(device, non_blocking=True) for weight in sampled.parameters()]
        if device.type == "cpu" and self.state.sums.device.type == "cuda":  # one wait for all copies, with ema_on_cpu
            torch.cuda.current_stream(self.state.sums.device).synchronize()
        if self.cells is None:
            torch._foreach_lerp_(averages, weights, self.ema_weight())
        else:
            torch._foreach_lerp_(averages, weights, [self.cells.ema_weight] * len(averages))

    def ema_weight(self) -> float:
        """Return the weight of the new weights in the EMA, in the next update."""
        return 1 - ema_decay_at(self.ema, self.state.update)

    def require_finite(self) -> None:
        """Raise NotFiniteError if any loss so far was not finite; the weights are those from before that update."""
        update = int(self._diverged_at)
        if update < NEVER:
            raise _not_finite("a non-finite loss", update)

    def abandon(self) -> None:
        """Clear the gradients and flags that an aborted update left."""
        self._diverged_at.fill_(NEVER)
        self._moved = False
        for network in self.networks.values():
            network.requires_grad_(True).zero_grad()


def _data_parallel(network: nn.Module) -> DistributedDataParallel:
    """Wrap a network, whose weights are equal on every process, so that gradients are summed over processes."""
    device = next(network.parameters()).device
    module = DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    module.broadcast_buffers = False  # buffers are equal on all ranks; the constructor's argument is deprecated
    module.register_comm_hook(None, _sum_gradients)
    return module


def _sum_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over processes; the default hook of DistributedDataParallel averages."""
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _not_finite(found: str, update: int) -> NotFiniteError:
    return NotFiniteError(
        f"Found {found} at update {update}, expected a finite one; the weights from before it are kept. Lower lr, or "
        "raise the weight of the transport loss or of the penalties.",
        update,
    )
