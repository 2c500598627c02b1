"""How a run computes: precision, activation checkpointing, compilation, sharding.

Precision is a param of the run, since it changes numbers. The others are launch settings: they trade speed for memory
and change numbers by rounding at most (activation checkpointing not at all).
"""

import ctypes
import sys
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from afm_pipe.models.dit import DiT

if TYPE_CHECKING:
    from afm_pipe.distributed.launch import Launch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Engine(NamedTuple):
    """The launch settings of the computation; see `Launch` for their meaning."""

    checkpoint_activations: bool = False
    compile: bool = False
    tf32: bool = True
    ema_on_cpu: bool = False
    shard: bool = False
    capture: bool = False

    @classmethod
    def of(cls, launch: "Launch") -> "Engine":
        """Return the engine of launch settings."""
        return cls(*(getattr(launch, name) for name in cls._fields))

    def prepare(self, precision: Literal["fp32", "bf16"], device: torch.device, *networks: nn.Module) -> None:
        """Set up networks and this process for training on a device."""
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        if device.type == "cpu":
            keep_freed_memory()
        for network in networks:
            if not isinstance(network, DiT):
                continue
            network.bf16 = precision == "bf16"
            network.checkpointing = self.checkpoint_activations
            if self.compile:
                # Static shapes: one graph for each size of batch and mode, of which unequal micro-batches have many.
                torch._dynamo.config.recompile_limit = 64
                for block in network.blocks:  # of equal shape, so that one compilation serves all
                    block.compile(fullgraph=True, dynamic=False)


@cache
def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors, like torch's caching allocator on GPUs.

    By default glibc returns large blocks to the kernel, which zeroes new pages: at B/2, 800 MB per update. Other C
    libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
