"""Everything stateful of a run."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.discriminator import Discriminator
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator, load_exactly
from afm_pipe.objectives.adversarial_flow.normalizer import GradientNormalizer
from afm_pipe.params import Run
from afm_pipe.training.curves import MEANS, Row
from afm_pipe.training.engine import Engine, ema_device
from afm_pipe.training.sharding import placed, shard, unfilled, whole

CLOCKS = ("training", "data_wait", "saving")  # the latter two are parts of the first


class Start(NamedTuple):
    """What a guided run begins from: its base's moving average, its last D, and its number of updates."""

    generator: dict[str, Tensor]
    discriminator: dict[str, Tensor]
    update: int


@dataclass
class TrainingState:
    """Networks, optimizers, moving averages and the clock (in updates) of a run."""

    generator: Generator
    discriminator: Discriminator
    ema: Generator
    optimizer_generator: torch.optim.AdamW
    optimizer_discriminator: torch.optim.AdamW
    normalizer: GradientNormalizer
    best: Generator | None  # the moving average at the best probe, where an auto schedule keeps it
    sums: Tensor  # of the figures in MEANS since the last row, so that a checkpoint may fall between rows
    shares: ProcessGroup = SINGLE_PROCESS  # that networks, optimizers and averages are shared out over
    update: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLOCKS, 0.0))  # over all sittings
    rows: list[Row] = field(default_factory=list)  # of the training curves so far
    extra: dict[str, Any] = field(default_factory=dict)  # what else a resume needs, by owner, as JSON

    @classmethod
    def fresh(
        cls,
        config: ModelConfig,
        run: Run,
        device: torch.device,
        engine: Engine = Engine(),  # noqa: B008  # an immutable value
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> "TrainingState":
        """Return the state before the first update; initial weights depend on run.seed alone.

        Where the engine shards, it is shared out over `ranks`; each has G and D whole in the machine's memory before.
        """
        shares = ranks if engine.shard else SINGLE_PROCESS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            generator, discriminator = build_generator(config), build_discriminator(config)
        if shares.world_size == 1:
            generator, discriminator = generator.to(device), discriminator.to(device)
        ema = copy.deepcopy(generator).requires_grad_(False)
        best = copy.deepcopy(ema) if run.schedule == "auto" else None
        engine.prepare(run, device, generator, discriminator)
        if shares.world_size > 1:
            for network in (generator, discriminator, ema, *(() if best is None else (best,))):
                shard(network, shares)
        else:
            ema.to(ema_device(engine, device))
        return cls(
            generator,
            discriminator,
            ema,
            _adamw(generator, run),
            _adamw(discriminator, run),
            GradientNormalizer(run.gradient_normalization.decay, device),
            best,
            torch.zeros(len(MEANS), device=device),
            shares,
        )

    def begin_from(self, start: Start) -> None:
        """Take over a trained run's weights and clock; the optimizers begin anew (their memory is ten updates long)."""
        for module in (self.generator, self.ema):
            module.load_state_dict(placed(start.generator, module.state_dict()))
        self.discriminator.load_state_dict(placed(start.discriminator, self.discriminator.state_dict()))
        self.update = start.update

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors of the state by part and name."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer_generator": optimizer_tensors(self.optimizer_generator),
            "optimizer_discriminator": optimizer_tensors(self.optimizer_discriminator),
            "normalizer": {"mean_square": self.normalizer.mean_square},
            "curve": {"sums": self.sums},
            **({} if self.best is None else {"best": self.best.state_dict()}),
        }

    def load_tensors(self, tensors: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """Take over tensors as `tensors` returns them. Raises UserError when they are of another model."""
        for part in ("generator", "discriminator", "ema", *(() if self.best is None else ("best",))):
            module = getattr(self, part)
            load_exactly(module, placed(tensors[part], module.state_dict()), folder / f"{part}.safetensors")
        load_optimizer(self.optimizer_generator, tensors["optimizer_generator"])
        load_optimizer(self.optimizer_discriminator, tensors["optimizer_discriminator"])
        self.normalizer.mean_square.copy_(tensors["normalizer"]["mean_square"])
        self.sums.copy_(tensors["curve"]["sums"])

    def targets(self, names: Iterable[tuple[str, str]]) -> dict[str, dict[str, Tensor]]:
        """Return tensors that others of these parts and names can be read into, to be taken over by `load_tensors`."""
        found, names = self.tensors(), list(names)
        for part in ("generator", "discriminator"):
            own = f"optimizer_{part}"
            found[own] = unfilled(getattr(self, part).parameters(), (name for of, name in names if of == own))
        return found

    def gather(self, config: ModelConfig) -> None:
        """Put what a model is saved from, whole and in the machine's memory, in its sharded place on the first rank.

        All ranks must call; the state is for saving then.
        """
        for part, build in (("discriminator", build_discriminator), ("ema", build_generator)):
            tensors = whole(getattr(self, part).state_dict(), self.shares)
            if self.shares.is_main_process:
                with torch.device("meta"):
                    network = build(config)
                network.load_state_dict(tensors, assign=True)
                setattr(self, part, network)


def _adamw(module: nn.Module, run: Run) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(), lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay, fused=True
    )


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return an optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Take over an optimizer's state as `optimizer_tensors` returns it."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".")
        parameter = parameters[int(index)]
        state.setdefault(int(index), {})[name] = placed({name: value}, {name: parameter})[name]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
