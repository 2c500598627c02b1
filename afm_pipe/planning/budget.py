"""Count the memory of a run on one device before anything is allocated."""

from typing import NamedTuple

import torch

from afm_pipe.models.model_files import ModelConfig, count_parameters
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import num_micro_batches
from afm_pipe.params import Run
from afm_pipe.planning.counting import FLOAT, measure
from afm_pipe.runtime.environment import local_world_size
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.machine import available_memory

COPIES = 4  # weights, gradients, two AdamW moments; the sampled network also has an EMA
AUTOCAST = 0.7  # bf16 autocast keeps this fraction of float32's activations in a block with qk_norm; 0.6 without
RUNTIME = 600 << 20  # bytes of an imported torch, allocator slack and small buffers


class Budget(NamedTuple):
    """Memory of a run on one device."""

    parameters: dict[str, int]  # by network
    state_bytes: int  # weights, gradients, moments, EMA
    activation_bytes: int  # kept for the backward pass of the largest step
    checkpoint_bytes: int  # on disk: the state without gradients

    @property
    def gradient_bytes(self) -> int:
        """Bytes that every update sums over the devices."""
        return FLOAT * sum(self.parameters.values())

    @property
    def memory_bytes(self) -> int:
        """Peak memory."""
        return self.state_bytes + self.activation_bytes + RUNTIME


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
    """Count the memory of one of `world_size` devices on the meta device.

    A device computes `micro_batch` images at once, or its whole share of the batch. With `shard` it keeps
    1 / world_size of the state, plus weights and gradients of two units (the current one and the next), where a unit is
    a block or everything outside the blocks.
    """
    objective = build_objective(run, config)
    with torch.device("meta"):
        networks = objective.build_networks()
    parts = world_size * num_micro_batches(run.batch_size, world_size, micro_batch)
    work = measure(run, config, *largest_part(run, parts), checkpoint_activations)
    parameters = {name: count_parameters(network) for name, network in networks.items()}
    activations = work.activation_bytes
    if run.precision == "bf16":  # with autocast's copies of the weights
        activations = AUTOCAST * activations + FLOAT / 2 * max(parameters.values())
    whole = FLOAT * (COPIES * sum(parameters.values()) + parameters[objective.sampled])
    state = whole
    if shard and world_size > 1:
        units = []
        for network in networks.values():
            blocks = [sum(p.numel() for p in block.parameters()) for block in getattr(network, "blocks", ())]
            units += [max(blocks, default=0), sum(p.numel() for p in network.parameters()) - sum(blocks)]
        state = whole // world_size + 4 * FLOAT * max(units)
    return Budget(parameters, state, round(activations), whole - FLOAT * sum(parameters.values()))


def require_memory(needs: Budget, run_name: str, device: torch.device) -> None:
    """Raise UserError when the device's free memory cannot hold the run."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory() // local_world_size()
    if needs.memory_bytes > free:
        raise UserError(
            f"Found {free / 2**30:.1f} GiB of memory free on {device}, expected {needs.memory_bytes / 2**30:.1f} GiB "
            f"for the run {run_name} ({needs.state_bytes / 2**30:.1f} for weights and optimizers, "
            f"{needs.activation_bytes / 2**30:.1f} for activations): use a device with more memory, a smaller size or "
            "train.batch_size, AFM_MICRO_BATCH or AFM_CHECKPOINT_ACTIVATIONS=true to keep fewer activations, or "
            "several processes with AFM_SHARD=true."
        )
