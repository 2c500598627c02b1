"""The model of memory, which is extrapolated from two and three blocks, against a count of all storages at full depth.

The count shares no code with the model but the update itself and the rule of autocast on a GPU, which is checked below.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afm_pipe.models.dit import Block, time_rates
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.budget import budget
from afm_pipe.planning.counting import CountingLearner
from afm_pipe.planning.storage import BLOCKS, count_peak, fuse_norms, gpu_autocast
from tests.conftest import ROOT
from tests.objectives.test_flows import CONTINUOUS, MATCHING, run_of

WAYS = {"plain": (32, 1, False), "checkpointed": (32, 1, True), "micro-batches": (8, 3, False)}


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
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def counted(run: Run, config: ModelConfig, images: int, parts: int, checkpointed: bool) -> int:
    """Count the peak of the largest update on micro-batches of `images`, in the run's precision."""
    objective = build_objective(run, config)
    time_rates.cache_clear()  # a tensor of another mode
    with FakeTensorMode(), gpu_autocast():
        networks = objective.build_networks()
        for network in networks.values():
            network.bf16, network.checkpointing = run.precision == "bf16", checkpointed  # type: ignore[assignment]
            fuse_norms(network)
        peaks = []
        for draw, _ in objective.example_updates(images):
            if run.objective == "adversarial_flow":
                draw = draw._replace(discriminator=[draw.discriminator[0] * parts], generator=draw.generator * parts)
            else:
                draw = draw._replace(parts=draw.parts * parts) if isinstance(draw, tuple) else draw * parts
            learner = CountingLearner(networks, objective.build_buffers(torch.device("cpu")))
            with Storages(*networks.values()) as storages:
                objective.update(learner, draw, objective.hyperparameters(0, 1))
            peaks.append(storages.peak)
    time_rates.cache_clear()
    return max(peaks)


@pytest.mark.parametrize(
    ("name", "precision", "way"),
    [
        pytest.param(name, precision, way, marks=() if (name, way) == ("b2", "plain") else pytest.mark.slow)
        for name in ("b2", "xl2", "xl2-112l")
        for precision in ("fp32", "bf16")
        for way in WAYS
    ],
)
def test_memory_is_that_of_all_storages(params: Params, name: str, precision: str, way: str) -> None:
    images, parts, checkpointed = WAYS[way]
    settings = {"batch_size": images * parts, "precision": precision, "qk_norm": precision == "bf16"}
    run = params.runs[name].model_copy(update=settings)
    config = run_config(run, params.latent_shape, 1000)
    needs = budget(run, config, 1, images, checkpointed)
    state = needs.state_bytes - needs.gradient_bytes
    found = state + counted(run, config, images, parts, checkpointed)
    print(f"{name} {precision} {way}: planned {needs.peak_bytes / 1e9:.2f} GB, counted {found / 1e9:.2f}")
    assert needs.peak_bytes == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "precision", "way"),
    [
        pytest.param({}, "fp32", "micro-batches", id="adversarial flow"),
        pytest.param(MATCHING, "bf16", "checkpointed", id="flow matching"),
        pytest.param(CONTINUOUS, "bf16", "micro-batches", id="continuous"),
    ],
)
def test_every_objective_is_counted(settings: dict[str, Any], precision: str, way: str) -> None:
    images, parts, checkpointed = WAYS[way]
    run = run_of(settings).model_copy(update={"size": "t4", "batch_size": images * parts})
    run = run.model_copy(update={"precision": precision, "qk_norm": precision == "bf16"})
    config = run_config(run, (4, 16, 16), 10)
    assert SIZES["t4"].depth > max(BLOCKS)
    penalized = round(images * run.penalty.batch_fraction)
    peak = count_peak(run, config, images, penalized, min(parts, 2), checkpointed).peak_bytes
    assert peak == pytest.approx(counted(run, config, images, parts, checkpointed), rel=0.01)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch built with CUDA, but no GPU")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_block_keeps_as_much_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """A fake GPU runs forward passes only, and without a card it has no fused attention, which a product replaces."""
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v: q * k * v)
    found = {}
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), gpu_autocast():
            with torch.device(device):
                block, size = Block(SIZES["s4"], qk_norm=bf16), SIZES["s4"]
                x, condition = torch.empty(2, 64, size.width, requires_grad=True), torch.empty(2, size.width)
            if device == "cpu":
                fuse_norms(block)
            torch.set_autocast_enabled(device, bf16)
            torch.set_autocast_dtype(device, torch.bfloat16)
            try:
                with Storages(block) as storages:
                    kept = block(x, condition)
                    found[device] = storages.bytes
            finally:
                torch.set_autocast_enabled(device, False)
                torch.clear_autocast_cache()
            assert kept.dtype == torch.float32
    assert found["cpu"] == found["cuda"] > 0
