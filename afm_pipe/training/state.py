"""The state of a run: all that changes during training."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import load_exactly
from afm_pipe.objectives.base import Objective
from afm_pipe.training.curves import Row
from afm_pipe.training.engine import Engine
from afm_pipe.training.sharding import Parts, empty_optimizer_tensors, full_tensors, shard, shard_like

CLOCKS = ("training", "data_wait", "saving")  # the first includes the others


class Start(NamedTuple):
    """The start of a continued run: weights of its networks by name, and the number of updates of its base run."""

    networks: Parts
    update: int


@dataclass
class TrainingState:
    """Networks, optimizers, EMA, number of updates, rows and callback states of a run."""

    networks: dict[str, nn.Module]
    ema: nn.Module
    """EMA of the sampled network."""
    best: nn.Module | None
    """The EMA at the best probe, for an auto schedule."""
    optimizers: dict[str, torch.optim.AdamW]
    buffers: dict[str, Tensor]
    sums: Tensor
    """Sums of the objective's terms since the last row; in the state, since a checkpoint may fall between rows."""
    sampled: str
    shard_group: ProcessGroup = SINGLE_PROCESS
    """The processes over which networks, optimizers and EMA are sharded."""
    update: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLOCKS, 0.0))  # over all sessions
    rows: list[Row] = field(default_factory=list)  # of the training curves so far
    extra: dict[str, Any] = field(default_factory=dict)  # state of callbacks, by name, as JSON

    @classmethod
    def fresh(
        cls,
        objective: Objective,
        device: torch.device,
        engine: Engine = Engine(),  # noqa: B008  # an immutable value
        group: ProcessGroup = SINGLE_PROCESS,
        keep_best: bool = False,
    ) -> "TrainingState":
        """Return the state before the first update; initial weights depend only on the seed.

        If the engine shards, each process of `group` first builds the full networks in host memory.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(objective.settings.seed)
            networks = objective.build_networks()
        sharded = engine.shard and group.communicates
        if not sharded:
            networks = {name: network.to(device) for name, network in networks.items()}
        ema = copy.deepcopy(networks[objective.sampled]).requires_grad_(False)
        best = copy.deepcopy(ema) if keep_best else None
        engine.prepare(objective.settings.precision, device, *networks.values())
        if sharded:
            for network in (*networks.values(), ema, *(() if best is None else (best,))):
                shard(network, group)
        elif engine.ema_on_cpu:
            ema.cpu()
        return cls(
            networks,
            ema,
            best,
            {name: objective.optimizer(network) for name, network in networks.items()},
            objective.build_buffers(device),
            torch.zeros(len(objective.terms), device=device),
            objective.sampled,
            group if sharded else SINGLE_PROCESS,
        )

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a shard of the state."""
        return self.shard_group.communicates

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All modules with weights, by part of a checkpoint."""
        return {**self.networks, "ema": self.ema, **({} if self.best is None else {"best": self.best})}

    def begin_from(self, start: Start) -> None:
        """Load a trained run's weights and number of updates; optimizers start anew (they average over ten updates)."""
        for name, network in self.networks.items():
            network.load_state_dict(shard_like(start.networks[name], network.state_dict()))
        self.ema.load_state_dict(shard_like(start.networks[self.sampled], self.ema.state_dict()))
        self.update = start.update

    def reload_ema(self) -> None:
        """Replace the sampled network's weights by their EMA."""
        self.networks[self.sampled].load_state_dict(self.ema.state_dict())

    def tensors(self) -> Parts:
        """Return all tensors of the state by part and name."""
        return {
            **{name: module.state_dict() for name, module in self.modules.items()},
            **{f"optimizer_{name}": optimizer_tensors(optimizer) for name, optimizer in self.optimizers.items()},
            "curve": {"sums": self.sums},
            **({"buffers": self.buffers} if self.buffers else {}),
        }

    def load_tensors(self, tensors: Parts, folder: Path) -> None:
        """Load tensors as `tensors` returns them. Raises UserError if they do not match the model."""
        for name, module in self.modules.items():
            load_exactly(module, shard_like(tensors[name], module.state_dict()), folder / f"{name}.safetensors")
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, tensors[f"optimizer_{name}"])
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors["buffers"][name])
        self.sums.copy_(tensors["curve"]["sums"])

    def targets(self, names: Iterable[tuple[str, str]]) -> Parts:
        """Allocate tensors to read a sharded checkpoint with these parts and names into, for `load_tensors`."""
        found, names = self.tensors(), list(names)
        for name, network in self.networks.items():
            key = f"optimizer_{name}"
            of_optimizer = (tensor for part, tensor in names if part == key)
            found[key] = empty_optimizer_tensors(network.parameters(), of_optimizer)
        return found

    def gather(self, objective: Objective) -> None:
        """Replace the sharded networks by full ones in host memory on the main process, to save the model.

        The EMA takes the place of the sampled network. All processes must call this; training cannot continue after it.
        """
        with torch.device("meta"):
            modules = objective.build_networks()
        modules["ema"] = modules.pop(self.sampled)
        for name, module in modules.items():
            tensors = full_tensors(self.modules[name].state_dict(), self.shard_group)
            if self.shard_group.is_main_process:
                module.load_state_dict(tensors, assign=True)
        if self.shard_group.is_main_process:
            self.ema = modules.pop("ema")
            self.networks |= modules


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return an optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Load an optimizer's state as `optimizer_tensors` returns it."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".")
        parameter = parameters[int(index)]
        state.setdefault(int(index), {})[name] = shard_like({name: value}, {name: parameter})[name]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
