"""SiT's official weights (Ma et al. 2024), which have the names of `VelocityNetwork` and twice its outputs.

SiT's `learn_sigma` doubles the channels of the output, and its sampler ignores the second half: an import drops it, an
export writes zeros. DiT's official weights have the same tensors but predict noise, so they are not recognizable.
"""

import torch
from torch import Tensor

OUTPUTS = ("final_layer.linear.weight", "final_layer.linear.bias")
LABELS = "y_embedder.embedding_table.weight"


def is_sit(tensors: dict[str, Tensor]) -> bool:
    """Return whether the tensors have one time embedding and twice as many outputs as inputs."""
    output, patches = tensors.get(OUTPUTS[1]), tensors.get("x_embedder.proj.weight")
    if output is None or patches is None or patches.dim() != 4 or "t_tgt_embedder.mlp.0.weight" in tensors:
        return False
    return "t_embedder.mlp.0.weight" in tensors and output.shape == (2 * patches[0].numel(),)


def from_sit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the second half of the output channels."""
    channels = tensors["x_embedder.proj.weight"].shape[1]
    kept = {name: tensors[name].unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1) for name in OUTPUTS}
    return tensors | kept


def to_sit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a second half of output channels, all zeros."""
    channels = tensors["x_embedder.proj.weight"].shape[1]
    halves = {name: tensors[name].unflatten(0, (-1, channels)) for name in OUTPUTS}
    doubled = {name: torch.cat([half, torch.zeros_like(half)], dim=1).flatten(0, 1) for name, half in halves.items()}
    return tensors | doubled
