"""Gradients summed over the ranks: a network's lie in a few flat buffers, each sent while the backward pass goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from afm_pipe.distributed.process_group import ProcessGroup

BUCKET_BYTES = 64 << 20  # large enough to be sent at full speed, small enough to leave before the backward pass ends


class Bucket:
    """Parameters that follow each other in the backward pass, and the buffer that their gradients are views of."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        sizes = [p.numel() for p in parameters]
        self.views = [
            part.view_as(p) for p, part in zip(parameters, self.buffer.split(sizes), strict=True)
        ]  # of the buffer, so that summing it sums the gradients where they are
        self.missing = 0  # gradients that the last backward pass has not brought yet
        self.work: Any = None  # of the sum that is under way


class SharedGradients:
    """The gradients of a module that several ranks train; alone, and for every part but the last, they only add up.

    torch's DistributedDataParallel does the same for a module whose forward pass it wraps, with one backward pass after
    each; G and D take part in each other's losses, and a batch may come in parts.
    """

    def __init__(self, module: nn.Module, ranks: ProcessGroup) -> None:
        self.module, self.ranks = module, ranks
        self._buckets: list[Bucket] = []
        self._used: set[Tensor] = set()
        self._sending, self._next = False, 0
        if ranks.world_size > 1:
            parameters = [p for p in module.parameters() if p.requires_grad]
            self._buckets = [Bucket(group) for group in _grouped(reversed(parameters))]
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))
            self.clear()

    def clear(self) -> None:
        """Forget the gradients of the last update."""
        if not self._buckets:
            self.module.zero_grad(set_to_none=True)
        for bucket in self._buckets:
            bucket.buffer.zero_()
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view
        self._used.clear()

    @contextmanager
    def last_part(self, is_last: bool) -> Iterator[None]:
        """Within this, run a backward pass; after that of the last part the gradients are those of the whole batch."""
        if not is_last or not self._buckets:
            yield
            return
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._sending, self._next = True, 0
        yield
        self._sending = False
        self._send(len(self._buckets))  # those with parameters that no loss depends on are still here
        for bucket in self._buckets:
            self.ranks.wait(bucket.work)
            for parameter in bucket.parameters:
                if parameter not in self._used:
                    parameter.grad = None  # as it is on one rank: the optimizer leaves it alone

    def _arrived(self, bucket: Bucket, parameter: Tensor) -> None:
        self._used.add(parameter)
        if self._sending:
            bucket.missing -= 1
            ready = self._next
            while ready < len(self._buckets) and self._buckets[ready].missing == 0:
                ready += 1
            self._send(ready)

    def _send(self, until: int) -> None:
        """Begin the sums of the buckets before `until`: on every rank in the same order."""
        for bucket in self._buckets[self._next : until]:
            bucket.work = self.ranks.begin_all_reduce(bucket.buffer)
        self._next = max(self._next, until)


def _grouped(parameters: Iterator[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Cut parameters into groups of one kind and of about `BUCKET_BYTES`."""
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        alike = not group or (group[0].dtype, group[0].device) == (parameter.dtype, parameter.device)
        if group and (size >= BUCKET_BYTES or not alike):
            yield group
            group, size = [], 0
        group.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if group:
        yield group
