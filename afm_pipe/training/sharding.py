"""Networks shared out over ranks (FSDP2), for those that do not fit one device, and their checkpoints in shards.

Each rank keeps its rows of every parameter, and of its gradient, moments and moving average. A block's parameters are
gathered before it computes and dropped after it; its gradients are summed to the ranks that keep them, after each part
of a batch, so that at no moment a device holds a whole network. It takes part in the numbers by rounding alone.

Checkpoints are torch.distributed.checkpoint's in its safetensors form, which has no pickle: every rank writes a file of
what it keeps, and any number of ranks, sharded or not, reads what it needs of all.
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


def shard(network: "DiT", ranks: ProcessGroup) -> None:
    """Leave on each rank its share of a network that all hold alike, on the ranks' device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # Nothing here changes an output in place, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in (*network.blocks, network):
        # The network's own parameters go after its forward pass too: passes without a backward one follow each other.
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)  # losses weigh by their share of the batch: gradients add up
        unit.set_force_sum_reduction_for_comms(True)  # else NCCL's own way to divide, which gloo does not have


def whole(tensors: Mapping[str, Tensor], ranks: ProcessGroup) -> dict[str, Tensor]:
    """Return tensors whole on the first rank, and none on the others; all must call where they are sharded.

    Sharded ones are gathered one by one, into the machine's memory.
    """
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if ranks.is_main_process:
            found[name] = full if full is tensor else full.cpu()
    return found


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on every rank, if it is sharded; all must call then."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return what this rank keeps of a tensor, which is all of one that is not sharded; it shares memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, without importing what takes seconds where there are none."""
    return hasattr(tensor, "full_tensor")


def placed(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which those that are sharded in `like` are sharded in the same way, whole as they may be."""
    return {name: _placed(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


def _placed(tensor: Tensor, like: Any) -> Tensor:
    if not is_sharded(like) or is_sharded(tensor) or tensor.shape != like.shape:  # a wrong shape is found elsewhere
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the whole tensor and takes its rows: nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def write_shards(folder: Path, tensors: Parts) -> None:
    """Write a file of what this rank keeps of tensors into `folder`; all ranks must call, with one folder.

    Raises UnwritableError, on every rank, when one has no room.
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
            f"Found no way to write {folder} ({failures[0]}): make room there, or mend its permissions, and run the "
            "same command again. What was there before is unharmed."
        ) from None


def names_in(folder: Path) -> list[tuple[str, str]]:
    """Return part and name of every tensor in a folder of shards."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return [_split(key) for key in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata]


def read_shards(folder: Path, tensors: Parts) -> None:
    """Fill tensors, sharded or not, from a folder of shards; each rank reads for itself, and nothing is sent."""
    import torch.distributed.checkpoint as dcp

    dcp.load(_flat(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def _flat(tensors: Parts) -> dict[str, Any]:
    return {f"{part}/{name}": tensor.detach() for part, named in tensors.items() for name, tensor in named.items()}


def _split(key: str) -> tuple[str, str]:
    part, _, name = key.partition("/")
    return part, name


def unfilled(parameters: Iterable[Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return tensors to read an optimizer's state into, of names such as 3.exp_avg: as its parameters are."""
    found, of = {}, list(parameters)
    for name in names:
        index, _, kind = name.partition(".")
        parameter = of[int(index)].detach()
        found[name] = torch.zeros(()) if kind == "step" else parameter.clone()
    return found
