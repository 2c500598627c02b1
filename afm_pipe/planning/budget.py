"""What a run will need before anything is allocated: parameters, updates, memory."""

import os
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator, count_parameters
from afm_pipe.objectives.base import num_micro_batches
from afm_pipe.params import Run
from afm_pipe.planning.counting import FLOAT, checkpointed_bytes, measure
from afm_pipe.runtime.errors import UserError

G_COPIES = 5  # weights, gradients, moving average, two moments of AdamW
D_COPIES = 4  # the same without the moving average
RUNTIME = 600 << 20  # bytes of an imported torch, allocator slack and small buffers


class Budget(NamedTuple):
    """Needs of a run on one device."""

    generator_parameters: int
    discriminator_parameters: int
    state_bytes: int  # weights, gradients, moments, moving average
    activation_bytes: int  # kept for the backward pass of the larger of the two steps; float32
    checkpoint_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Everything that is in memory at once."""
        return self.state_bytes + self.activation_bytes + RUNTIME

    def sharded(self, ranks: int, unit: int) -> "Budget":
        """Return the needs of one of so many ranks that share the state out; `unit` parameters are gathered at once.

        That is at the most two units' weights, the one at work and the next, and two's gradients, that are being sent.
        """
        return self._replace(state_bytes=self.state_bytes // ranks + 4 * FLOAT * unit)


def budget(
    run: Run,
    config: ModelConfig,
    ranks: int = 1,
    micro_batch: int | None = None,
    checkpoint_activations: bool = False,
    shard: bool = False,
) -> Budget:
    """Count the needs of one of `ranks` on the meta device: exact shapes, nothing allocated."""
    with torch.device("meta"):
        generator, discriminator = build_generator(config), build_discriminator(config)
    parts = ranks * num_micro_batches(run.batch_size, ranks, micro_batch)
    n, penalised = -(-run.batch_size // parts), -(-round(run.batch_size * run.penalty.batch_fraction) // parts)
    if checkpoint_activations:
        activations = checkpointed_bytes(config, 2 * (n + penalised), n)
    else:
        activations = measure(run, config, n, penalised).activation_bytes
    g, d = count_parameters(generator), count_parameters(discriminator)
    needs = Budget(
        generator_parameters=g,
        discriminator_parameters=d,
        state_bytes=FLOAT * (G_COPIES * g + D_COPIES * d),
        activation_bytes=round(activations),
        checkpoint_bytes=FLOAT * ((G_COPIES - 1) * g + (D_COPIES - 1) * d),
    )
    if shard and ranks > 1:
        units = [sum(p.numel() for p in network.blocks[0].parameters()) for network in (generator, discriminator)]
        besides = [
            sum(p.numel() for name, p in network.named_parameters() if not name.startswith("blocks."))
            for network in (generator, discriminator)
        ]
        needs = needs.sharded(ranks, max(units + besides))
    return needs


def require_memory(needs: Budget, run_name: str, device: torch.device) -> None:
    """Raise UserError when the device's free memory cannot hold the run, saying how much is needed."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks that share this machine's memory
        free = min(psutil.virtual_memory().available, _cgroup_limit()) // here
    if needs.memory_bytes > free:
        raise UserError(
            f"Found {free / 2**30:.1f} GiB of memory free on {device}, expected {needs.memory_bytes / 2**30:.1f} GiB "
            f"for the run {run_name} ({needs.state_bytes / 2**30:.1f} for weights and optimizers, "
            f"{needs.activation_bytes / 2**30:.1f} for activations): use a larger device, a smaller size, "
            "a smaller train.batch_size, or less of it at once "
            "(AFM_MICRO_BATCH, AFM_CHECKPOINT_ACTIVATIONS=true), or several ranks that share it out (AFM_SHARD=true)."
        )


def _cgroup_limit() -> int:
    """Return what a container may still use; a number too large to matter outside one."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        return int(limit) - int((root / "memory.current").read_text()) if limit != "max" else 1 << 62
    except (OSError, ValueError):
        return 1 << 62  # no such control group on this system
