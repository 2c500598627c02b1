"""How a run computes: precision, activation checkpointing, compilation, sharding.

Precision is a param of the run, since it changes numbers. The rest are launch settings: they trade speed for memory
and change numbers by rounding at most (activation checkpointing not at all).
"""

import ctypes
import sys
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import nn

from afm_pipe.distributed.launch import Launch
from afm_pipe.models.dit import DiT

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Engine(NamedTuple):
    """Launch settings of the computation."""

    checkpoint_activations: bool = False
    """Keep only the input of each block, and recompute its activations in the backward pass."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    tf32: bool = True
    """On NVIDIA GPUs, round the inputs of float32 matrix products to TF32, as the paper does."""
    ema_on_cpu: bool = False
    """Keep G's moving average in the machine's memory instead of on the device."""
    shard: bool = False
    """Shard G, D, their optimizers and the moving average over the processes (`sharding.py`)."""

    @classmethod
    def of(cls, launch: Launch) -> "Engine":
        """Return the engine of launch settings."""
        return cls(launch.checkpoint_activations, launch.compile, launch.tf32, launch.ema_on_cpu, launch.shard)

    def prepare(self, precision: Literal["fp32", "bf16"], device: torch.device, *networks: nn.Module) -> None:
        """Set up networks, and this process, for training on a device."""
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
                for block in network.blocks:  # of the same shape, so that one compilation serves all
                    block.compile(fullgraph=True, dynamic=False)


@cache
def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors, as torch does on GPUs.

    By default glibc returns large blocks to the kernel, which zeroes them again page by page: at B/2, 800 MB in every
    update. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
