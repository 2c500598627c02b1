"""How a training computes: in which precision, with what kept in memory, compiled or not.

Precision is a param of the run, since it changes numbers. The rest are launch settings: they trade speed for memory,
and change a number by rounding at most (activation checkpointing not even that).
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
    """Launch settings of a training's computation."""

    checkpoint_activations: bool = False
    """Keep only what goes into each block, and compute the inside again in the backward pass."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    tf32: bool = True
    """On NVIDIA GPUs, let float32 matrix products round their inputs to TF32, as the paper does."""
    ema_on_cpu: bool = False
    """Keep G's moving average in the machine's memory instead of the device's."""
    shard: bool = False
    """Of G, D, their optimizers and the moving average keep on each rank its share alone (`sharding.py`)."""

    @classmethod
    def of(cls, launch: Launch) -> "Engine":
        """Return the engine that launch settings ask for."""
        return cls(launch.checkpoint_activations, launch.compile, launch.tf32, launch.ema_on_cpu, launch.shard)

    def prepare(self, precision: Literal["fp32", "bf16"], device: torch.device, *networks: nn.Module) -> None:
        """Make networks that are trained on a device compute this way."""
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
                for block in network.blocks:  # alike, so that one compilation serves all
                    block.compile(fullgraph=True, dynamic=False)


@cache
def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones, as torch does on GPUs.

    Left alone it gives large blocks back to the kernel, which then zeroes them anew, page by page: at B/2 800 MB in
    every update. With other C libraries nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def ema_device(engine: Engine, device: torch.device) -> torch.device:
    """Return where G's moving average is kept."""
    return torch.device("cpu") if engine.ema_on_cpu else device
