"""What an update computes and what it keeps, counted on the meta device from the very steps that train.

Shapes alone: nothing is computed, nothing allocated, and no data is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.dit import Block
from afm_pipe.models.model_files import ModelConfig
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import Hyperparameters, Objective
from afm_pipe.params import Params, Run
from afm_pipe.params.sizes import SIZES, ModelSize

FLOAT = 4  # bytes


class Work(NamedTuple):
    """One update of D and one of G on a batch; a multiplication and an addition are two FLOPs."""

    forward_flops: float  # of G on the batch: the unit of paper Table 12
    flops: float
    activation_bytes: float  # kept for the backward pass, at the larger of the two steps; float32
    parts: "Parts"  # of flops

    @property
    def units(self) -> float:
        """The work in forward passes of G."""
        return self.flops / self.forward_flops


class Parts(NamedTuple):
    """FLOPs of an update by network and direction, the steps of D and G together."""

    generator_forward: float
    generator_backward: float
    discriminator_forward: float
    discriminator_backward: float


class Step(NamedTuple):
    """What one optimizer step of an update takes, from the step before it."""

    network: str  # that is stepped
    forward_flops: float
    backward_flops: float
    kept_bytes: int  # for the backward pass, at the most


class _CountingLearner:
    """Counts the steps of an objective's update, on the meta device."""

    def __init__(self, networks: Mapping[str, torch.nn.Module], buffers: Mapping[str, Tensor]) -> None:
        self.networks, self.buffers, self.steps = networks, buffers, list[Step]()
        self.weights = [weight for network in networks.values() for weight in network.parameters()]
        self.counter = _Counter()

    def module(self, name: str) -> torch.nn.Module:
        return self.networks[name]

    def accumulate(self, name: str, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, figures: Sequence[Tensor]) -> Tensor:
        return torch.stack([*figures]).sum(0)

    def step(self, name: str, loss: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        counter = self.counter
        kept = counter.kept_bytes(self.weights)
        self.steps.append(Step(name, counter.forward_flops, counter.backward_flops, kept))
        counter.reset()
        self.networks[name].zero_grad(set_to_none=True)
        return torch.zeros(())


def count_update(objective: Objective, batch: Any) -> list[Step]:
    """Return what each step of one update takes on a micro-batch of `objective.example_batch`."""
    with torch.device("meta"):
        networks = objective.build_networks()
        learner = _CountingLearner(networks, objective.build_buffers(torch.device("meta")))
        with learner.counter:
            objective.update(learner, batch, objective.hyperparameters(0, 1))
    return learner.steps


@cache
def measure(run: Run, config: ModelConfig, batch_size: int, penalized: int | None = None) -> Work:
    """Count one update of a run on a batch of `batch_size`, without guidance; shapes alone, nothing is computed.

    D's penalties are taken on `penalized` images, left out on the run's share; lazy ones are counted by their mean
    over updates.
    """
    objective = build_objective(run, config)
    with torch.device("meta"):
        networks = objective.build_networks()
        with _Counter() as alone:
            objective.example_forward(networks, batch_size).sum().backward()
        batch = objective.example_batch(batch_size, penalized)
        steps = count_update(objective, batch)
        without_penalties = count_update(objective, objective.example_batch(batch_size, 0))

    def mean(direction: str) -> float:  # over updates with penalties and without, all steps
        penalized_, others = (sum(getattr(step, direction) for step in of) for of in (steps, without_penalties))
        return (penalized_ + (run.penalty.every - 1) * others) / run.penalty.every

    forwards = 1 if run.reuse_forward else run.discriminator_updates + 1
    parts = Parts(
        generator_forward=alone.forward_flops * forwards,
        generator_backward=alone.backward_flops,
        discriminator_forward=mean("forward_flops") - forwards * alone.forward_flops,
        discriminator_backward=mean("backward_flops") - alone.backward_flops,
    )
    return Work(alone.forward_flops, sum(parts), max(step.kept_bytes for step in steps), parts)


@cache
def guidance_flops(size: str, config: ModelConfig, batch_size: int) -> float:
    """Count what the guiding classifier adds to an update: its forward pass, and the one back to its input."""
    with torch.device("meta"):
        classifier = LatentClassifier(SIZES[size], config.channels, config.latent_size, config.num_classes)
        latents = torch.empty(batch_size, *config.latent_shape, requires_grad=True)
        with _Counter() as counter:
            logits = classifier.requires_grad_(False)(latents, torch.empty(batch_size))
            logits.sum().backward()
    return counter.forward_flops + counter.backward_flops


@cache
def block_bytes(size: ModelSize, tokens: int, frozen: bool = False) -> int:
    """Return the bytes that one block keeps of one image for its backward pass, counted of the block itself.

    One whose weights need no gradient (`frozen`) keeps less.
    """
    with torch.device("meta"):
        block = Block(size, qk_norm=False).requires_grad_(not frozen)
        x = torch.empty(2, tokens, size.width, requires_grad=True)  # of one, a view would stand for v's copy
        condition = torch.empty(2, size.width, requires_grad=not frozen)
        return kept_by(lambda: block(x, condition), list(block.parameters())) // 2


def checkpointed_bytes(config: ModelConfig, judged: float, made: float) -> float:
    """Return the bytes kept for the backward pass when of every block only its input is, and the inside of one block.

    `judged` images go through D in its own step, `made` through G in the other.
    """
    size = SIZES[config.size]
    tokens = (config.latent_size // size.patch) ** 2
    g_block, d_block = block_bytes(size, tokens), block_bytes(size, tokens + 1)
    g_in, d_in = FLOAT * tokens * size.width, FLOAT * (tokens + 1) * size.width
    of_d = judged * (size.depth * d_in + d_block)
    of_g = made * (config.repeats * size.depth * g_in + size.depth * d_in + max(g_block, d_block))
    return max(of_d, of_g)


def kept_by(work: Callable[[], object], weights: list[torch.nn.Parameter]) -> int:
    """Return the bytes that some work keeps for its backward pass, besides `weights`."""
    with _Counter() as counter:
        work()
    return counter.kept_bytes(weights)


class _Counter(TorchDispatchMode):
    """Count the FLOPs of matrix products and convolutions, and the bytes that are kept for backward passes.

    torch's FlopCounterMode has the same formulas, but follows modules too, which fails on gradients by a leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def reset(self) -> None:
        """Count from nothing."""
        self.forward_flops = self.backward_flops = 0.0
        self._kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no number is given twice
        self._attention: dict[int, torch.UntypedStorage] = {}

    def kept_bytes(self, weights: list[torch.nn.Parameter]) -> int:
        """Return the bytes kept besides the weights and attention maps, which fused attention does not keep."""
        others = self._attention.keys() | {weight.untyped_storage()._cdata for weight in weights}
        return sum(storage.nbytes() for number, storage in self._kept.items() if number not in others)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            if torch._C._current_graph_task_id() == -1:  # no backward pass is under way
                self.forward_flops += flops
            else:
                self.backward_flops += flops
        if func._overloadpacket in (torch.ops.aten._softmax, torch.ops.aten._safe_softmax):
            self._attention[result.untyped_storage()._cdata] = result.untyped_storage()
        return result

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage
        return tensor


def update_units(params: Params, base: Run, run: Run, config: ModelConfig) -> float:
    """Return what an update of a run costs, in forward passes of G."""
    work = measure(base, config, run.batch_size)
    flops = work.flops
    if run.phases[-1].guidance is not None and params.classifier is not None:
        flops += guidance_flops(params.classifier.size, config, run.batch_size)
    return flops / work.forward_flops
