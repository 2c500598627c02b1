"""Count the memory of an update: the bytes of all live storages while the objective's own update runs.

The update runs on fake tensors, which have shapes but no data, so nothing is allocated. It is counted with networks of
two and three blocks and split into stretches at the boundaries of blocks. The peak of a stretch is linear in the number
of blocks; the peak at any depth is the largest of the extrapolated stretches.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afm_pipe.models.dit import Block, time_rates
from afm_pipe.models.model_files import ModelConfig
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import Objective
from afm_pipe.params import Run
from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.counting import CountingLearner, shallow

Place = tuple[str, str, str]  # network; first, middle or last block; direction
BLOCKS = 2, 3  # of the counted networks


class Peak(NamedTuple):
    """Memory of one update besides weights, optimizers and EMA."""

    kept_bytes: float  # at the start of the largest backward pass, besides gradients
    activation_bytes: float  # at any time, besides gradients: what is kept, and temporaries
    peak_bytes: float  # at any time, with gradients


class Stretch(NamedTuple):
    """What is computed between two boundaries of blocks."""

    place: Place
    kept_bytes: int  # 0 if no backward pass begins in it
    activation_bytes: int
    peak_bytes: int


@cache
def count_peak(
    run: Run,
    config: ModelConfig,
    images: int,
    penalized: int,
    micro_batches: int = 1,
    checkpoint_activations: bool = False,
) -> Peak:
    """Count an update on micro-batches of `images`, of which `penalized` are penalized; the largest of every kind."""
    objective, depth = build_objective(run, config), SIZES[config.size].depth
    few, more = (
        _stretches(objective, depth, blocks, (images, penalized, micro_batches), checkpoint_activations)
        for blocks in (min(depth, each) for each in BLOCKS)
    )
    assert [each.place for each in few] == [each.place for each in more], "an update's steps depend on its depth"

    def largest(name: str) -> float:
        pairs = ((getattr(one, name), getattr(two, name)) for one, two in zip(few, more, strict=True))
        return max(one + (depth - BLOCKS[0]) * (two - one) for one, two in pairs)

    return Peak(*map(largest, Peak._fields))


def _stretches(
    objective: Objective, depth: int, blocks: int, batch: tuple[int, int, int], checkpoint_activations: bool
) -> list[Stretch]:
    """Return the stretches of updates, without those of middle blocks, which are between the others in size.

    `batch`: images and penalized images of a micro-batch, and the number of micro-batches.
    """
    images, penalized, micro_batches = batch
    stretches: list[Stretch] = []
    time_rates.cache_clear()  # it must not hand real tensors to fake ones, nor fake tensors to later calls
    try:
        with FakeTensorMode(), gpu_autocast():
            networks = shallow(objective, depth, blocks, "cpu")
            for network in networks.values():
                network.bf16 = objective.settings.precision == "bf16"  # type: ignore[assignment]
                network.checkpointing = checkpoint_activations  # type: ignore[assignment]
                fuse_norms(network)
            for example, _ in objective.example_updates(images, penalized):
                learner = CountingLearner(networks, objective.build_buffers(torch.device("cpu")))
                with Storages(networks) as storages:
                    objective.update(learner, in_parts(example, micro_batches), objective.hyperparameters(0, 1))
                stretches += (each for each in storages.finished() if each.place[1] != "middle")
    finally:
        time_rates.cache_clear()
    return stretches


def in_parts(batch: Any, micro_batches: int) -> Any:
    """Return a batch of several equal micro-batches, given one with one: its innermost lists hold micro-batches."""
    if isinstance(batch, list) and not isinstance(batch[0], list):
        return batch * micro_batches
    if isinstance(batch, list):
        return [in_parts(each, micro_batches) for each in batch]
    return type(batch)(*(in_parts(each, micro_batches) for each in batch)) if isinstance(batch, tuple) else batch


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Let autocast on a CPU treat addcmul as on a GPU: operands become float32 if one is, and are kept as such."""

    def addcmul(x: Tensor, one: Tensor, two: Tensor, *, value: float = 1) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, one.dtype), two.dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return torch.addcmul(x.to(dtype), one.to(dtype), two.to(dtype), value=value)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("addcmul", addcmul, "AutocastCPU")
        yield


class _FusedRMSNorm(torch.autograd.Function):
    """RMSNorm that saves what the GPU's fused kernel does: the input and one value per row, no normalized input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def fuse_norms(network: nn.Module) -> None:
    """Make the RMSNorms of a network of fake tensors save what they save on a GPU, except those with tangents."""
    if getattr(network, "block", Block) is not Block:
        return
    for module in network.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = partial(_fused_norm, module)  # type: ignore[method-assign]


def _fused_norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    return _FusedRMSNorm.apply(x, module.weight)


class Storages(TorchDispatchMode):
    """Tracks the bytes of live storages that operators allocate, by stretches between blocks."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        """Count none of the weights and buffers of `networks`."""
        super().__init__()
        weights = [weight for network in networks.values() for weight in network.parameters()]
        uncounted = *weights, *(buffer for network in networks.values() for buffer in network.buffers())
        self.sizes = {each.untyped_storage()._cdata: 0 for each in uncounted}
        self.gradients: set[int] = set()
        self.bytes = self.gradient_bytes = 0  # now
        self.task = -1  # the backward pass
        self.place: Place = ("", "outside", "")
        self.kept = self.activations = self.peak = 0  # of this stretch
        self.stretches: list[Stretch] = []
        self.handles: list[Any] = []
        for weight in weights:
            if weight.requires_grad:
                self.handles.append(weight.register_post_accumulate_grad_hook(self._accumulated))
        for name, network in networks.items():
            blocks = list(getattr(network, "blocks", ()))
            for index, block in enumerate(blocks):
                which = "first" if index == 0 else "last" if index == len(blocks) - 1 else "middle"
                self._follow(block, (name, which))

    def _follow(self, block: nn.Module, place: tuple[str, str]) -> None:
        def entered(*_: Any) -> None:
            self.enter((*place, "forward"))

        def left(_: Any, __: Any, output: Any) -> None:
            self.enter((*place, "after"))
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad and torch._C._current_graph_task_id() == -1:
                    tensor.register_hook(lambda _: self.enter((*place, "backward")))

        self.handles += [block.register_forward_pre_hook(entered), block.register_forward_hook(left)]

    def enter(self, place: Place) -> None:
        """Begin a new stretch."""
        self.stretches.append(Stretch(self.place, self.kept, self.activations, self.peak))
        self.place, self.kept, self.activations, self.peak = place, 0, self.bytes - self.gradient_bytes, self.bytes

    def finished(self) -> list[Stretch]:
        """Return all stretches."""
        self.enter(self.place)
        return self.stretches

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        task = torch._C._current_graph_task_id()
        if task not in (self.task, -1):
            self.kept = max(self.kept, self.bytes - self.gradient_bytes)
        self.task = task
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            self.activations = max(self.activations, self.bytes - self.gradient_bytes)
            weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        size = self.sizes.pop(key)
        self.bytes -= size
        if key in self.gradients:
            self.gradients.remove(key)
            self.gradient_bytes -= size

    def _accumulated(self, weight: Tensor) -> None:
        assert weight.grad is not None
        key = weight.grad.untyped_storage()._cdata
        if key not in self.gradients:
            self.gradients.add(key)
            self.gradient_bytes += self.sizes[key]
