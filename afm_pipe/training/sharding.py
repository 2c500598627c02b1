"""Sharding of networks over processes (FSDP2), for networks that do not fit on one device, and sharded checkpoints.

Each process keeps a shard of every parameter and of its gradient, optimizer state and EMA. The parameters of a block
are gathered before it runs and freed afterwards, and its gradients are reduced to shards after every micro-batch, so
that no device holds a whole network. Sharding changes numbers by rounding only.

Checkpoints are written by torch.distributed.checkpoint in safetensors format: every process writes a file with its
shards, and any number of processes, sharded or not, can read them.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.runtime.errors import UnwritableError

if TYPE_CHECKING:
    from afm_pipe.models.dit import DiT

Parts = dict[str, dict[str, Tensor]]  # tensors by part of a state and name


def shard(network: "DiT", group: ProcessGroup) -> None:
    """Shard a network in place: every process holds the whole network before, and a shard on its device afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # torch warns of in-place changes of the output, which never happen.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(group.device.type, (group.world_size,))
    for module in (*network.blocks, network):
        # The root's parameters are also freed after the forward pass, since many forward passes have no backward pass.
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(
            1.0
        )  # gradients are summed, since losses are weighted by their share of the batch
        unit.set_force_sum_reduction_for_comms(True)  # otherwise NCCL's averaging, which gloo lacks


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without the slow import."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor on every process; all processes must call this if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensors(tensors: Mapping[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """Return full tensors on the main process, and none on the others; all must call this if they are sharded.

    Sharded tensors are gathered one by one into host memory.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if group.is_main_process:
            gathered[name] = full if full is tensor else full.cpu()
    return gathered


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor itself if it is not sharded; the memory is shared."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors sharded like their counterparts in `like`."""
    return {name: _shard_like(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


def _shard_like(tensor: Tensor, like: Any) -> Tensor:
    if not is_sharded(like) or is_sharded(tensor) or tensor.shape != like.shape:  # load_exactly reports wrong shapes
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has the full tensor and takes its shard, without communication.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def write_shards(folder: Path, tensors: Parts) -> None:
    """Write a file with this process's shards into `folder`; all processes must call this with the same folder.

    Raises UnwritableError on every process if one cannot write.
    """
    import torch.distributed.checkpoint as dcp
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.save(_flat(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        if not all(isinstance(failure, OSError | SafetensorError) for failure in failures):
            raise
        raise UnwritableError(
            f"Found {folder} not writable ({failures[0]}): free disk space or fix the permissions, and run the same "
            "command again. Earlier checkpoints are intact."
        ) from None


def read_shards(folder: Path, tensors: Parts) -> None:
    """Fill tensors, sharded or not, from a folder of shards, without communication between processes."""
    import torch.distributed.checkpoint as dcp

    dcp.load(_flat(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def tensor_names(folder: Path) -> list[tuple[str, str]]:
    """Return the part and name of every tensor in a folder of shards."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    keys = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return [(part, name) for part, _, name in (key.partition("/") for key in keys)]


def _flat(tensors: Parts) -> dict[str, Any]:
    return {f"{part}/{name}": tensor.detach() for part, named in tensors.items() for name, tensor in named.items()}


def empty_optimizer_tensors(parameters: Iterable[Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Allocate tensors for an optimizer's state, by names such as 3.exp_avg, placed like the parameters."""
    tensors, listed = {}, list(parameters)
    for name in names:
        index, _, kind = name.partition(".")
        parameter = listed[int(index)].detach()
        tensors[name] = torch.zeros(()) if kind == "step" else parameter.clone()
    return tensors
