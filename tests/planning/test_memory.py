"""The model of memory against a count of all storages alive during the objective's own update, on fake tensors."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afm_pipe.models.dit import time_rates
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.budget import budget
from afm_pipe.planning.counting import _CountingLearner
from tests.conftest import ROOT

WAYS = {"plain": (32, 1, False), "checkpointed": (32, 1, True), "micro-batches": (8, 4, False)}


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "profiles" / "imagenet256.yaml")


class Storages(TorchDispatchMode):
    """Adds up the bytes of the storages that operators allocate, as long as they are alive."""

    def __init__(self, *networks: nn.Module) -> None:
        """Count none of the weights and buffers of `networks`."""
        super().__init__()
        weights = (each for network in networks for each in (*network.parameters(), *network.buffers()))
        self.sizes = {weight.untyped_storage()._cdata: 0 for weight in weights}
        self.bytes = self.peak = self.kept = 0  # now, at most, and at most where a backward pass begins
        self.backward = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        task = torch._C._current_graph_task_id()
        if task not in (self.backward, -1):
            self.kept = max(self.kept, self.bytes)
        self.backward = task
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)


def counted(run: Run, config: ModelConfig, images: int, parts: int, checkpointed: bool, blocks: int) -> Storages:
    """Count an update of networks with some of their blocks, in the run's precision."""
    objective = build_objective(run, config)
    time_rates.cache_clear()  # a tensor of another mode
    with FakeTensorMode():
        networks = objective.build_networks()
        for network in networks.values():
            del network.blocks[blocks:]  # type: ignore[union-attr, operator]
            network.bf16, network.checkpointing = run.precision == "bf16", checkpointed  # type: ignore[assignment]
        draw = objective.example_batch(images)
        draw = draw._replace(discriminator=[draw.discriminator[0] * parts], generator=draw.generator * parts)
        learner = _CountingLearner(networks, objective.build_buffers(torch.device("cpu")))
        with Storages(*networks.values()) as storages:
            objective.update(learner, draw, objective.hyperparameters(0, 1))
    time_rates.cache_clear()
    return storages


@pytest.mark.parametrize(
    ("name", "precision", "way"),
    [
        pytest.param(name, precision, way, marks=() if (name, way) == ("b2", "plain") else pytest.mark.slow)
        for name in ("b2", "xl2", "xl2-112l")
        for precision in ("fp32", "bf16")
        for way in WAYS
    ],
)
def test_memory_is_within_3_percent_of_all_storages(params: Params, name: str, precision: str, way: str) -> None:
    images, parts, checkpointed = WAYS[way]
    settings = {"batch_size": images * parts, "precision": precision, "qk_norm": precision == "bf16"}
    run = params.runs[name].model_copy(update=settings)
    config = run_config(run, params.latent_shape, 1000)
    needs = budget(run, config, 1, images, checkpointed)
    one, two = (counted(run, config, images, min(parts, 2), checkpointed, blocks) for blocks in (1, 2))
    more = SIZES[run.size].depth - 1
    block = SIZES[run.size].width ** 2 * 18 * 4  # bytes of the gradients of a block
    # At the start of a backward pass all activations are alive; at its end, those of one block and all gradients.
    peak = one.peak + more * max(two.kept - one.kept, block)
    state = needs.state_bytes - needs.gradient_bytes
    assert needs.peak_bytes == pytest.approx(state + peak, rel=0.03)
