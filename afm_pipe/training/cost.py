"""The cost of training, in the form that runs and trials record."""

import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from afm_pipe.distributed.launch import machine_name


def training_cost(updates: int, batch_size: int, seconds: float | None, device: torch.device) -> dict[str, Any]:
    """Return the cost of updates on this machine; `seconds` is None if a non-finite loss ended the run."""
    return {
        "machine": machine_name(device),
        "threads": torch.get_num_threads(),  # of each process
        "seconds": None if seconds is None else round(seconds, 1),
        "updates": updates,
        "images": updates * batch_size,
    }


def run_cost(
    updates: int, batch_size: int, seconds: Mapping[str, float], device: torch.device, num_processes: int
) -> dict[str, Any]:
    """Return the cost of a run with rates, time shares and peak memory; `seconds` as in TrainingState."""
    total = seconds["training"]
    return training_cost(updates, batch_size, total, device) | {
        "device": str(device),
        "ranks": num_processes,
        "updates_per_second": updates / total,
        "images_per_second": updates * batch_size / total,
        "data_wait_share": seconds["data_wait"] / total,
        "checkpoint_share": seconds["saving"] / total,
        "peak_memory_gib": peak_memory(device) / 2**30,
    }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process held: on its GPU, or in host memory if it computes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError, StopIteration, ValueError):  # Linux; ru_maxrss there includes that of the parent before exec
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # macOS counts bytes, Linux KiB
