"""Updates captured as CUDA graphs: the device runs all kernels of an update at one call of the host.

A graph repeats the kernels of one update on the same memory, and freezes every number of Python in it. So the batch is
copied into tensors of the graph; learning rates, scheduled loss weights, the number of the update and the weight of the
EMA are tensors that are filled before each replay. All else that Python decides (phase, clipping, lazy penalties, whose
step it is) is the form of an update: each form has a graph of its own, captured after `WARM_UP` updates.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from afm_pipe.objectives.base import Hyperparameters, Objective
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.engine import Engine
from afm_pipe.training.learner import Cells, Learner

WARM_UP = 3  # updates of a form before its capture: libraries set themselves up in the first ones

Computation = Callable[[], Tensor]


class Recorder(Protocol):
    """Records computations for replay."""

    def warm_up(self, computation: Computation) -> Tensor:
        """Run a computation as `record` will."""

    def record(self, computation: Computation) -> tuple[Callable[[], object], Tensor]:
        """Record a computation; return a function that replays it, and the tensor in which its result then is."""

    def forget(self) -> None:
        """Release what the recordings so far share; they are replayed no more."""


class CudaGraphs:
    """Records CUDA graphs. They share memory: one runs at a time, and its result is used before the next."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.forget()

    def warm_up(self, computation: Computation) -> Tensor:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = computation()
        current.wait_stream(self.stream)
        return result

    def record(self, computation: Computation) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others meanwhile pin memory for the next batch, and copy checkpoints.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = computation()
        return graph.replay, result

    def forget(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()  # that of dropped graphs takes no others


class Inputs:
    """Tensors that hold the inputs of a graph."""

    def __init__(self, batch: Any, hyperparameters: Hyperparameters, device: torch.device) -> None:
        """Allocate the inputs of updates with a batch of this form."""
        leaves, structure = tree_flatten(batch)
        leaves = [each.clone() if isinstance(each, Tensor) else each for each in leaves]
        self.batch = tree_unflatten(leaves, structure)
        self.cells = Cells(torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), device=device))
        self._lr, self._weights = (
            {name: torch.zeros((), device=device) for name in numbers}
            for numbers in (hyperparameters.lr, hyperparameters.weights)
        )
        self.hyperparameters = replace(hyperparameters, lr=self._lr, weights=self._weights)  # type: ignore[arg-type]
        self._tensors = _tensors(self.batch)

    def fill(self, batch: Any, hyperparameters: Hyperparameters, update: int, ema_weight: float) -> None:
        """Copy the inputs of an update."""
        torch._foreach_copy_(self._tensors, _tensors(batch))
        for cells, numbers in ((self._lr, hyperparameters.lr), (self._weights, hyperparameters.weights)):
            for name, number in numbers.items():
                cells[name].fill_(number)
        self.cells.update.fill_(update)
        self.cells.ema_weight.fill_(ema_weight)


class Captured(NamedTuple):
    """A graph with its inputs and its result, the terms of the update."""

    inputs: Inputs
    replay: Callable[[], object]
    terms: Tensor


class CapturedUpdates:
    """Runs the updates of an objective, EMA included, replaying graphs of the forms that repeat."""

    def __init__(self, objective: Objective, learner: Learner, recorder: Recorder) -> None:
        self.objective, self.learner, self.recorder = objective, learner, recorder
        learner.checks_immediately = False  # a graph cannot wait for a loss
        self._seen = Counter[Hashable]()
        self._graphs: dict[Hashable, Captured] = {}
        self._moments: list[Tensor] = []  # of the optimizers, when graphs were captured

    def run(self, batch: Any, hyperparameters: Hyperparameters) -> Tensor:
        """Run one update; return its terms, to be read before the next one."""
        learner, form = self.learner, _form(batch, hyperparameters)
        self._drop_outdated()
        graph = self._graphs.get(form)
        if graph is None and self._seen[form] < WARM_UP:
            self._seen[form] += 1
            return self.recorder.warm_up(lambda: learner.update(self.objective, batch, hyperparameters))
        inputs = Inputs(batch, hyperparameters, learner.state.sums.device) if graph is None else graph.inputs
        inputs.fill(batch, hyperparameters, learner.state.update, learner.ema_weight())
        if graph is None:
            graph = self._graphs[form] = self._capture(inputs)
        graph.replay()
        return graph.terms

    def _capture(self, inputs: Inputs) -> Captured:
        learner, self._moments = self.learner, self._optimizer_tensors()
        optimizers = learner.state.optimizers.values()
        learner.cells = inputs.cells
        _set_capturable(optimizers, True)  # otherwise a step refuses to be captured
        try:
            update = partial(learner.update, self.objective, inputs.batch, inputs.hyperparameters)
            return Captured(inputs, *self.recorder.record(update))
        finally:
            learner.cells = None
            _set_capturable(optimizers, False)  # it warns of other steps
            for optimizer in optimizers:
                optimizer.found_inf = None  # type: ignore[attr-defined]  # in the memory of the graph

    def _drop_outdated(self) -> None:
        """Drop all graphs if a reload has replaced the optimizers' tensors, in whose memory they compute."""
        if self._graphs and [*map(id, self._moments)] != [*map(id, self._optimizer_tensors())]:
            self._graphs.clear()
            self._seen.clear()  # an optimizer without moments makes them in its next update
            self._moments.clear()
            self.recorder.forget()

    def _optimizer_tensors(self) -> list[Tensor]:
        states = [state for each in self.learner.state.optimizers.values() for state in each.state.values()]
        return [tensor for state in states for tensor in state.values()]


def updates_on(
    device: torch.device, engine: Engine, objective: Objective, learner: Learner
) -> Callable[[Any, Hyperparameters], Tensor]:
    """Return the function that runs one update, EMA included, and returns its terms; captured if the engine says so.

    Raises UserError if the engine captures updates and the device or the processes do not allow it.
    """
    if not engine.capture:
        return partial(learner.update, objective)
    if device.type != "cuda":
        raise UserError(
            f"Found the launch setting capture with the device {device}, expected an NVIDIA GPU, since updates are "
            "captured as CUDA graphs: unset AFM_CAPTURE, or set AFM_DEVICE."
        )
    if learner.group.communicates:
        raise UserError(
            f"Found the launch setting capture with {learner.group.world_size} processes, expected one, since their "
            "communication is not captured: unset AFM_CAPTURE."
        )
    assert not engine.ema_on_cpu, "launch settings refuse it: its copies cross the bus outside of the graph"
    return CapturedUpdates(objective, learner, CudaGraphs(device)).run


def _set_capturable(optimizers: Iterable[torch.optim.Optimizer], capturable: bool) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["capturable"] = capturable


def _form(batch: Any, hyperparameters: Hyperparameters) -> Hashable:
    """Return all that a graph freezes of an update."""
    leaves, structure = tree_flatten(batch)
    frozen = [(each.shape, each.dtype) if isinstance(each, Tensor) else each for each in leaves]
    return structure, *frozen, hyperparameters.gradient_clip, hyperparameters.phase


def _tensors(batch: Any) -> list[Tensor]:
    return [each for each in tree_leaves(batch) if isinstance(each, Tensor)]
