"""Count FLOPs and activation memory of an update by running the objective's own update on the meta device.

The meta device computes only shapes: it allocates nothing and needs no data.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
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
WAYS = "forward", "backward"


class Work(NamedTuple):
    """One update on a batch; a multiplication and an addition are two FLOPs."""

    forward_flops: float  # of the sampled network on the batch: the unit of paper Table 12
    flops: float
    activation_bytes: float  # kept for the backward pass, at the largest step; float32
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
    kept_bytes: int  # for the backward pass


@cache
def measure(
    run: Run, config: ModelConfig, batch_size: int, penalized: int | None = None, checkpoint_activations: bool = False
) -> Work:
    """Count one update of a run on a batch, without guidance.

    `penalized` is the number of penalized images, by default the run's fraction; updates of several kinds, such as lazy
    penalties, count by their mean. All counts are linear in the number of blocks: networks with one and two suffice.
    """
    objective, depth = build_objective(run, config), SIZES[config.size].depth

    def count(blocks: int) -> list[float]:
        networks = _shallow(objective, depth, blocks)
        calls: list[bool] = []  # forward passes of the sampled network: whether with gradients
        totals, kept = [0.0] * 4, list[int]()
        with torch.device("meta"):
            with _Counter() as alone:
                objective.example_forward(networks, batch_size).sum().backward()
            for network in networks.values():
                network.checkpointing = checkpoint_activations  # type: ignore[assignment]
            networks[objective.sampled].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
            for batch, weight in objective.example_updates(batch_size, penalized):
                calls.clear()
                steps = count_update(objective, batch, networks)
                forward, backward = (sum(getattr(step, f"{way}_flops") for step in steps) for way in WAYS)
                own = len(calls) * alone.forward_flops, sum(calls) * alone.backward_flops
                work = *own, forward - own[0], backward - own[1]
                totals = [total + weight * each for total, each in zip(totals, work, strict=True)]
                kept += [step.kept_bytes for step in steps]
        return [alone.forward_flops, *totals, *kept]

    forward, *parts = (one + (depth - 1) * (two - one) for one, two in zip(count(1), count(2), strict=True))
    return Work(forward, sum(parts[:4]), max(parts[4:]), Parts(*parts[:4]))


def count_update(objective: Objective, batch: Any, networks: Mapping[str, nn.Module] | None = None) -> list[Step]:
    """Return the steps of one update on `objective.example_batch`."""
    with torch.device("meta"):
        networks = networks or objective.build_networks()
        learner = _CountingLearner(networks, objective.build_buffers(torch.device("meta")))
        with learner.counter:
            objective.update(learner, batch, objective.hyperparameters(0, 1))
    # With activation checkpointing the backward pass holds what one block keeps, besides the inputs of all blocks.
    return [
        step._replace(kept_bytes=step.kept_bytes + max((n * block_bytes(*block) for n, *block in blocks), default=0))
        for step, blocks in learner.steps
    ]


def _shallow(objective: Objective, depth: int, blocks: int) -> dict[str, nn.Module]:
    """Return networks that keep the first `blocks` of `depth` blocks; networks of another depth stay as they are."""
    with torch.device("meta"):
        networks = objective.build_networks()
    for network in networks.values():
        if len(getattr(network, "blocks", ())) == depth:
            del network.blocks[blocks:]  # type: ignore[union-attr, operator]
    return networks


class _CountingLearner:
    """Counts the steps of an objective's update, on the meta device."""

    def __init__(self, networks: Mapping[str, nn.Module], buffers: Mapping[str, Tensor]) -> None:
        self.networks, self.buffers, self.counter = networks, buffers, _Counter()
        self.weights = [weight for network in networks.values() for weight in network.parameters()]
        self.recomputed: set[tuple[int, ModelSize, int]] = set()  # images, size and tokens of checkpointed blocks
        self.steps: list[tuple[Step, set[tuple[int, ModelSize, int]]]] = []
        for network in networks.values():
            if getattr(network, "checkpointing", False):
                for block in network.blocks:  # type: ignore[union-attr]
                    block.register_forward_pre_hook(lambda _, inputs, size=network.size: self._recompute(size, *inputs))

    def _recompute(self, size: ModelSize, tokens: Tensor, *others: Tensor) -> None:
        if torch.is_grad_enabled():
            tangents = others[1:2]  # of a block with derivatives, which keeps as much for each
            images = len(tokens) + sum(len(each) * len(tokens) for each in tangents)
            self.recomputed.add((images, size, tokens.shape[1]))

    def module(self, name: str) -> nn.Module:
        return self.networks[name]

    def accumulate(self, name: str, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, figures: Sequence[Tensor]) -> Tensor:
        return torch.stack([*figures]).sum(0)

    def step(self, name: str, loss: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        counter = self.counter
        kept = counter.kept_bytes(self.weights)
        self.steps.append((Step(name, counter.forward_flops, counter.backward_flops, kept), self.recomputed))
        self.recomputed = set()
        counter.reset()
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


@cache
def block_bytes(size: ModelSize, tokens: int, frozen: bool = False) -> int:
    """Count the bytes that one block keeps per image for its backward pass.

    A `frozen` block, whose weights need no gradient, keeps less.
    """
    with torch.device("meta"):
        block = Block(size, qk_norm=False).requires_grad_(not frozen)
        x = torch.empty(
            2, tokens, size.width, requires_grad=True
        )  # with one image, v would be a view instead of a copy
        condition = torch.empty(2, size.width, requires_grad=not frozen)
        return kept_by(lambda: block(x, condition), list(block.parameters())) // 2


def kept_by(work: Callable[[], object], weights: list[torch.nn.Parameter]) -> int:
    """Return the bytes that `work` keeps for its backward pass, except `weights`."""
    with _Counter() as counter:
        work()
    return counter.kept_bytes(weights)


class _Counter(TorchDispatchMode):
    """Count the FLOPs of matrix products and convolutions, and the bytes kept for backward passes.

    torch's FlopCounterMode uses the same formulas, but it also tracks modules, which fails on gradients of leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def reset(self) -> None:
        """Reset all counts."""
        self.forward_flops = self.backward_flops = 0.0
        self._kept: dict[int, torch.UntypedStorage] = {}  # by address; kept alive so that no address is reused
        self._attention: dict[int, torch.UntypedStorage] = {}

    def kept_bytes(self, weights: list[torch.nn.Parameter]) -> int:
        """Return the bytes kept, except weights and attention maps, which fused attention does not keep."""
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
            if torch._C._current_graph_task_id() == -1:  # not in a backward pass
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
    """Return the cost of an update of a run, in forward passes of G."""
    work = measure(base if base.objective == run.objective else run, config, run.batch_size)
    flops = work.flops
    if run.phases[-1].guidance is not None and params.classifier is not None:
        flops += guidance_flops(params.classifier.size, config, run.batch_size)
    return flops / work.forward_flops
