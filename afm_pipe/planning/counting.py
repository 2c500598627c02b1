"""What an update computes and what it keeps, counted on the meta device from the very steps that train.

Shapes alone: nothing is computed, nothing allocated, and no data is needed.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.dit import Block
from afm_pipe.models.flow import Flow
from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator
from afm_pipe.objectives.adversarial_flow.step import Batch, PenaltyNoise, discriminator_step, generator_step
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


@cache
def measure(run: Run, config: ModelConfig, batch_size: int, penalised: int | None = None) -> Work:
    """Count one update of a run on a batch, without guidance.

    D's penalties are taken on `penalised` images, by default on the run's share; lazy penalties count by their mean
    over updates. Every count is linear in the number of blocks, so one and two blocks are counted.
    """
    if penalised is None:
        penalised = max(round(batch_size * run.penalty.batch_fraction), 1)
    one, two = (_measure(run, config, batch_size, penalised, blocks) for blocks in (1, 2))
    depth = SIZES[config.size].depth
    forward, *parts, d_kept, g_kept = (a + (depth - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return Work(forward, sum(parts), max(d_kept, g_kept), Parts(*parts))


def _measure(run: Run, config: ModelConfig, batch_size: int, penalised: int, blocks: int) -> tuple[float, ...]:
    """Return a forward pass of G, the four parts of an update, and the bytes kept by the D step and by the G step."""
    with torch.device("meta"):
        generator, discriminator = build_generator(config), build_discriminator(config)
        del generator.blocks[blocks:], discriminator.blocks[blocks:]
        flow, latents = Flow(generator, config.form, config.nfe), torch.empty(batch_size, *config.latent_shape)
        times = (None, None) if config.nfe == 1 else (torch.empty(batch_size), torch.empty(batch_size))
        batch = Batch(latents, torch.empty_like(latents), torch.zeros(batch_size, dtype=torch.int64), *times)
        noise = PenaltyNoise(torch.empty_like(latents[:penalised]), torch.empty_like(latents[:penalised]))
        with _Counter() as alone:
            flow(batch.source, batch.labels, batch.s, batch.t).sum().backward()
        with _Counter() as d_step:
            discriminator_step(flow, discriminator, batch, noise, run)
        with _Counter() as d_step_without:
            discriminator_step(flow, discriminator, batch, None, run)
        discriminator.requires_grad_(False)
        with _Counter() as g_step:
            generator_step(flow, discriminator, batch, 1.0, None)
    weights = [*generator.parameters(), *discriminator.parameters()]

    def mean(direction: str) -> float:  # over updates with penalties and without, both steps
        with_, without, g = (getattr(step, direction) for step in (d_step, d_step_without, g_step))
        return (with_ + (run.penalty.every - 1) * without) / run.penalty.every + g

    return (
        alone.forward_flops,
        alone.forward_flops * (1 if run.reuse_forward else 2),
        alone.backward_flops,
        mean("forward_flops") - 2 * alone.forward_flops,
        mean("backward_flops") - alone.backward_flops,
        d_step.kept_bytes(weights),
        g_step.kept_bytes(weights),
    )


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
        self.forward_flops = self.backward_flops = 0.0
        self._kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no number is given twice
        self._attention: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

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
