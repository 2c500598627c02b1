"""Count the memory of a run on one device before anything is allocated."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from afm_pipe.models.model_files import ModelConfig, count_parameters
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import num_micro_batches
from afm_pipe.params import Run
from afm_pipe.planning.counting import FLOAT
from afm_pipe.planning.storage import count_peak
from afm_pipe.runtime.environment import local_world_size
from afm_pipe.runtime.machine import available_memory

COPIES = 4  # weights, gradients, two AdamW moments; the sampled network also has an EMA
COUNTED = 4  # images from whose memory the number that fits is estimated
RUNTIME = 600 << 20  # bytes of an imported torch or of a CUDA context, and small buffers
FRAGMENTATION = 0.05  # of activations: what an allocator rounds up and cannot use


class Budget(NamedTuple):
    """Memory of a run on one device."""

    parameters: dict[str, int]  # by network
    state_bytes: int  # weights, gradients, moments, EMA
    activation_bytes: int  # at most, besides gradients: kept for backward passes, and temporaries
    working_bytes: int  # at the peak besides weights, moments and EMA: activations and gradients
    checkpoint_bytes: int  # on disk: the state without gradients

    @property
    def gradient_bytes(self) -> int:
        """Bytes that every update sums over the devices."""
        return FLOAT * sum(self.parameters.values())

    @property
    def memory_bytes(self) -> int:
        """Peak memory, with a margin."""
        return self.peak_bytes + round(FRAGMENTATION * self.activation_bytes) + RUNTIME

    @property
    def peak_bytes(self) -> int:
        """Bytes of all tensors at the peak."""
        return self.state_bytes - self.gradient_bytes + self.working_bytes


def largest_part(run: Run, parts: int) -> tuple[int, int]:
    """Return the images, and the penalized ones among them, of the largest of `parts` parts of a batch."""
    return -(-run.batch_size // parts), -(-round(run.batch_size * run.penalty.batch_fraction) // parts)


def budget(
    run: Run,
    config: ModelConfig,
    world_size: int = 1,
    micro_batch: int | None = None,
    checkpoint_activations: bool = False,
    shard: bool = False,
) -> Budget:
    """Count the memory of one of `world_size` devices.

    A device computes `micro_batch` images at once, or its whole share of the batch. With `shard` it keeps its shard of
    the state.
    """
    objective = build_objective(run, config)
    with torch.device("meta"):
        networks = objective.build_networks()
    micro_batches = num_micro_batches(run.batch_size, world_size, micro_batch)
    images, penalized = largest_part(run, world_size * micro_batches)
    peak = count_peak(run, config, images, penalized, min(micro_batches, 2), checkpoint_activations)
    parameters = {name: count_parameters(network) for name, network in networks.items()}
    working = peak.peak_bytes
    if world_size > 1:  # buckets hold the gradients of all networks all the time
        working = peak.activation_bytes + FLOAT * sum(parameters.values())
    state = state_bytes(networks, objective.sampled, world_size if shard else 1)
    checkpoint = state_bytes(networks, objective.sampled) - FLOAT * sum(parameters.values())
    return Budget(parameters, state, round(peak.activation_bytes), round(working), checkpoint)


def state_bytes(networks: Mapping[str, nn.Module], sampled: str, shards: int = 1) -> int:
    """Count the bytes of weights, gradients, moments and EMA on one device.

    Of several shards it keeps one, plus weights and gradients of two units (the current one and the next), where a unit
    is a block or everything outside the blocks.
    """
    parameters = {name: count_parameters(network) for name, network in networks.items()}
    whole = FLOAT * (COPIES * sum(parameters.values()) + parameters[sampled])
    if shards == 1:
        return whole
    units = []
    for network in networks.values():
        blocks = [sum(p.numel() for p in block.parameters()) for block in getattr(network, "blocks", ())]
        units += [max(blocks, default=0), sum(p.numel() for p in network.parameters()) - sum(blocks)]
    return whole // shards + 4 * FLOAT * max(units)


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; processes of one machine share those of its CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // local_world_size()


def what_fits(run: Run, config: ModelConfig, world_size: int, free: int) -> list[str]:
    """Return a line for each kind of setting with which a device of `free` bytes holds the run, with its memory.

    The number of images follows from counts of a few, and is then counted.
    """
    images, share = min(COUNTED, run.batch_size), -(-run.batch_size // world_size)
    lines = []
    for words, precision, checkpoint in (
        ("", run.precision, False),
        ("AFM_CHECKPOINT_ACTIVATIONS=true ", run.precision, True),
        ("precision: bf16 ", "bf16", False),
    ):

        def needed(count: int, precision: str = precision, checkpoint: bool = checkpoint) -> Budget:
            several = run.model_copy(update={"precision": precision, "batch_size": 4 * count})
            return budget(several, config, 1, count, checkpoint)

        few, twice = needed(images).memory_bytes, needed(2 * images).memory_bytes
        fitting = images + int((free - few) / (twice - few) * images)
        micro_batch = min(1 << (fitting.bit_length() - 1), share) if fitting >= 1 else 0
        while micro_batch and needed(micro_batch).memory_bytes > free:  # more than in proportion
            micro_batch //= 2
        if micro_batch:
            lines.append(
                f"{words}{f'AFM_MICRO_BATCH={micro_batch}' if micro_batch < share else ''}".strip()
                + f": {needed(micro_batch).memory_bytes / 2**30:.1f} GiB"
            )
        elif not words:
            lines.append(
                "on one device alone, nothing: weights and optimizers take "
                f"{needed(images).state_bytes / 2**30:.1f} GiB"
            )
            break
    for devices in (2**power for power in range(1, run.batch_size.bit_length())):
        needs = budget(run, config, devices, images, checkpoint_activations=True, shard=True)
        if devices >= world_size and needs.memory_bytes <= free:
            settings = f"AFM_SHARD=true AFM_CHECKPOINT_ACTIVATIONS=true AFM_MICRO_BATCH={images}"
            lines.append(f"{settings} on {devices} such devices: {needs.memory_bytes / 2**30:.1f} GiB on each")
            break
    return lines
