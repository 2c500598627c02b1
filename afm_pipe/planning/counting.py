"""Count FLOPs of an update by running the objective's own update on the meta device.

The meta device computes only shapes: it allocates nothing and needs no data.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import ModelConfig
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import Hyperparameters, Objective
from afm_pipe.params import Params, Run
from afm_pipe.params.sizes import SIZES

FLOAT = 4  # bytes
WAYS = "forward", "backward"


class Work(NamedTuple):
    """One update on a batch; a multiplication and an addition are two FLOPs."""

    forward_flops: float  # of the sampled network on the batch: the unit of paper Table 12
    flops: float
    parts: "Parts"  # of flops

    @property
    def units(self) -> float:
        """Work in forward passes of the sampled network."""
        return self.flops / self.forward_flops


class Parts(NamedTuple):
    """FLOPs of an update by network and direction: of the sampled network, and of all others."""

    generator_forward: float
    generator_backward: float
    discriminator_forward: float
    discriminator_backward: float


class Step(NamedTuple):
    """One optimizer step of an update, with everything since the step before."""

    network: str
    forward_flops: float
    backward_flops: float


@cache
def measure(run: Run, config: ModelConfig, batch_size: int, penalized: int | None = None) -> Work:
    """Count one update of a run on a batch, without guidance.

    `penalized` is the number of penalized images, by default the run's fraction; updates of several kinds, such as lazy
    penalties, count by their mean. All counts are linear in the number of blocks: networks with one and two suffice.
    """
    objective, depth = build_objective(run, config), SIZES[config.size].depth

    def count(blocks: int) -> list[float]:
        networks = shallow(objective, depth, blocks)
        calls: list[bool] = []  # forward passes of the sampled network: whether with gradients
        totals = [0.0] * 4
        with torch.device("meta"):
            with _Counter() as alone:
                objective.example_forward(networks, batch_size).sum().backward()
            networks[objective.sampled].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
            for batch, weight in objective.example_updates(batch_size, penalized):
                calls.clear()
                steps = count_update(objective, batch, networks)
                forward, backward = (sum(getattr(step, f"{way}_flops") for step in steps) for way in WAYS)
                own = len(calls) * alone.forward_flops, sum(calls) * alone.backward_flops
                work = *own, forward - own[0], backward - own[1]
                totals = [total + weight * each for total, each in zip(totals, work, strict=True)]
        return [alone.forward_flops, *totals]

    forward, *parts = (one + (depth - 1) * (two - one) for one, two in zip(count(1), count(2), strict=True))
    return Work(forward, sum(parts), Parts(*parts))


def count_update(objective: Objective, batch: Any, networks: Mapping[str, nn.Module] | None = None) -> list[Step]:
    """Return the steps of one update on `objective.example_batch`."""
    with torch.device("meta"):
        networks = networks or objective.build_networks()
        learner = CountingLearner(networks, objective.build_buffers(torch.device("meta")))
        with learner.counter:
            objective.update(learner, batch, objective.hyperparameters(0, 1))
    return learner.steps


def shallow(objective: Objective, depth: int, blocks: int, device: str = "meta") -> dict[str, nn.Module]:
    """Return networks that keep the first `blocks` of `depth` blocks; networks of another depth stay as they are."""
    with torch.device(device):
        networks = objective.build_networks()
    for network in networks.values():
        if len(getattr(network, "blocks", ())) == depth:
            del network.blocks[blocks:]  # type: ignore[union-attr, operator]
    return networks


class CountingLearner:
    """Counts the steps of an objective's update, on the meta device."""

    def __init__(self, networks: Mapping[str, nn.Module], buffers: Mapping[str, Tensor]) -> None:
        self.networks, self.buffers, self.counter = networks, buffers, _Counter()
        self.steps: list[Step] = []

    def module(self, name: str) -> nn.Module:
        return self.networks[name]

    def accumulate(self, name: str, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, figures: Sequence[Tensor]) -> Tensor:
        return torch.stack([*figures]).sum(0)

    def step(self, name: str, loss: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        self.steps.append(Step(name, self.counter.forward_flops, self.counter.backward_flops))
        self.counter.reset()
        self.networks[name].zero_grad(set_to_none=True)
        return torch.zeros(())


@cache
def guidance_flops(size: str, config: ModelConfig, batch_size: int) -> float:
    """Count what the guiding classifier adds to an update: a forward pass, and a backward pass to its input."""
    with torch.device("meta"):
        classifier = LatentClassifier(SIZES[size], config.channels, config.latent_size, config.num_classes)
        latents = torch.empty(batch_size, *config.latent_shape, requires_grad=True)
        with _Counter() as counter:
            logits = classifier.requires_grad_(False)(latents, torch.empty(batch_size))
            logits.sum().backward()
    return counter.forward_flops + counter.backward_flops


class _Counter(TorchDispatchMode):
    """Count the FLOPs of matrix products and convolutions.

    torch's FlopCounterMode uses the same formulas, but it also tracks modules, which fails on gradients of leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Reset all counts."""
        self.forward_flops = self.backward_flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            if torch._C._current_graph_task_id() == -1:  # not in a backward pass
                self.forward_flops += flops
            else:
                self.backward_flops += flops
        return result


def update_units(params: Params, base: Run, run: Run, config: ModelConfig) -> float:
    """Return the cost of an update of a run, in forward passes of G."""
    work = measure(base if base.objective == run.objective else run, config, run.batch_size)
    flops = work.flops
    if run.phases[-1].guidance is not None and params.classifier is not None:
        flops += guidance_flops(params.classifier.size, config, run.batch_size)
    return flops / work.forward_flops
