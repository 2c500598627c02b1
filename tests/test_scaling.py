"""The model behind docs/scaling.md, held against counts of the real modules on the meta device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from afm_pipe.training.gradients import SharedGradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.models.dit import DiT
from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator, run_config
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.budget import D_COPIES, G_COPIES
from afm_pipe.planning.counting import guidance_flops, kept_by, measure
from afm_pipe.planning.scaling import CLASSES, PAGE, PROFILE, block_bytes, needs, written
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / PROFILE)


def test_the_tables_of_the_page_are_those_of_the_profile(params: Params) -> None:
    page = (ROOT / PAGE).read_text()
    assert written(page, params) == page, "run `python -m afm_pipe.planning.scaling`"


@pytest.fixture(scope="module")
def small() -> Params:
    """The profile with two blocks in place of 28, which are counted in no time."""
    names = ("b2", "xl2-2nfe", "xl2-56l", "xl2-112l")
    return load_params(ROOT / PROFILE, [f"runs.{name}.size=s4" for name in names])


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param("b2", "b2", marks=pytest.mark.slow), ("xl2-2nfe", "s4"), ("xl2-112l", "s4")],
)
def test_work_and_activations_are_those_counted_on_the_steps(
    params: Params, small: Params, name: str, size: str
) -> None:
    chosen, batch = params if size == "b2" else small, 4
    run = chosen.runs[name]
    assert run.size == size
    counted, derived = measure(run, run_config(run, params.latent_shape, CLASSES), batch), needs(chosen, name)
    outside = 0.003 if size == "b2" else 0.01  # what two blocks are more easily outweighed by
    assert derived.flops * batch / run.batch_size == pytest.approx(counted.flops, rel=outside)
    assert derived.units == pytest.approx(counted.units, rel=outside)
    assert derived.activations * batch == pytest.approx(counted.activation_bytes, rel=0.02 if size == "b2" else 0.05)


def test_guidance_adds_what_is_counted_of_the_classifier(small: Params) -> None:
    config = run_config(small.runs["b2"], small.latent_shape, CLASSES)
    added = needs(small, "b2-guided").flops - needs(small, "b2").flops
    assert small.classifier is not None
    assert added / 256 * 2 == pytest.approx(guidance_flops(small.classifier.size, config, 2), rel=0.01)


def test_a_block_keeps_20_floats_a_token_and_channel_and_9_when_frozen() -> None:
    for name in ("b2", "xl2"):
        size = SIZES[name]
        assert block_bytes(size, 256) / (4 * 256 * size.width) == pytest.approx(20, abs=0.1)
        assert block_bytes(size, 256, frozen=True) / (4 * 256 * size.width) == pytest.approx(9, abs=0.1)


def test_a_checkpoint_at_every_block_keeps_its_input_alone(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    run, inputs = params.runs["b2"], []
    config = run_config(run, params.latent_shape, CLASSES)

    def run_blocks(self: DiT, tokens: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            inputs.append(tokens)
            tokens = checkpoint(block, tokens, condition, use_reentrant=False)
        return tokens

    with torch.device("meta"):
        discriminator = build_discriminator(config)
        x, labels = torch.empty(4, 4, 32, 32), torch.zeros(4, dtype=torch.int64)
        plain = kept_by(lambda: discriminator(x, labels), list(discriminator.parameters()))
        monkeypatch.setattr(DiT, "run_blocks", run_blocks)
        kept = kept_by(lambda: discriminator(x, labels), list(discriminator.parameters()))
    size, derived, one_block = SIZES["b2"], needs(params, "b2"), block_bytes(SIZES["b2"], 257)
    assert sum(each.nbytes for each in inputs) == 4 * size.depth * 4 * 257 * size.width
    assert kept / 4 + one_block == pytest.approx(derived.checkpointed / 2.5, rel=0.05)
    assert plain / 4 == pytest.approx(derived.activations / 2.5, rel=0.03)


def test_state_is_what_adamw_and_the_average_hold() -> None:
    model = build_generator(ModelConfig(size="s4", channels=4, latent_size=8, num_classes=10))
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key.startswith("exp_avg")]
    count = sum(weight.numel() for weight in weights)
    assert sum(moment.numel() for moment in moments) + 2 * count == D_COPIES * count  # and weights and gradients
    assert G_COPIES == D_COPIES + 1  # the moving average


class Sums(TorchDispatchMode):
    """Counts the bytes of all-reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allreduce_" in str(func):
            self.sizes += [tensor.nbytes for tensor in args[0]]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def of_64() -> Iterator[ProcessGroup]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    yield ProcessGroup(0, 64, torch.device("meta"))
    dist.destroy_process_group()


def test_64_ranks_sum_each_gradient_once_in_buckets(params: Params, of_64: ProcessGroup) -> None:
    run = params.runs["b2"]
    config = run_config(run, params.latent_shape, CLASSES)
    derived = needs(params, "b2")
    with torch.device("meta"):
        x, labels = torch.empty(4, 4, 32, 32), torch.zeros(4, dtype=torch.int64)
        total = 0
        for build, parameters in ((build_generator, derived.generator), (build_discriminator, derived.discriminator)):
            model: nn.Module = build(config)
            shared = SharedGradients(model, of_64)
            with Sums() as sums:
                with shared.last_part(False):
                    model(x, labels).sum().backward()
                assert not sums.sizes  # parts of a batch add up first
                with shared.last_part(True):
                    model(x, labels).sum().backward()
            assert sum(sums.sizes) == 4 * parameters
            assert 1 < len(sums.sizes) <= 4 * parameters / (64 << 20) + 1
            total += sum(sums.sizes)
    assert total == derived.gradients
