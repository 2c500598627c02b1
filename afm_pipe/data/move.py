"""Moving batches to a device without waiting for it."""

from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound=tuple[Any, ...])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a tuple with its tensors on a device; to a GPU they are copied from pinned memory, without waiting."""
    moved = [_moved(each, device) if isinstance(each, Tensor) else each for each in batch]
    return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
