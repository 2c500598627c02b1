"""The one model of work and memory, and docs/scaling.md that is written from it: counts against closed formulas."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from afm_pipe.models.dit import FREQUENCIES, Block
from afm_pipe.models.model_files import build_discriminator, build_generator, run_config
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES, ModelSize
from afm_pipe.planning.budget import budget
from afm_pipe.planning.counting import guidance_flops, measure
from afm_pipe.planning.scaling import CLASSES, PAGE, PROFILE, page_with_tables, tables
from afm_pipe.planning.storage import Storages, count_peak
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / PROFILE)


@pytest.mark.slow
def test_page_is_up_to_date(params: Params) -> None:
    page = (ROOT / PAGE).read_text()
    assert page_with_tables(page, params) == page, "run `python -m afm_pipe.planning.scaling`"


def test_smallest_runs_of_the_page_are_up_to_date(params: Params) -> None:
    smallest = {"runs": {"b2": params.runs["b2"]}, "guided": {"b2-guided": params.guided["b2-guided"]}}
    rows = [row for row in tables(params.model_copy(update=smallest)).splitlines() if not row.startswith("| all |")]
    assert sum(row.startswith("| `b2") for row in rows) == 5
    missing = set(rows) - set((ROOT / PAGE).read_text().splitlines())
    assert not missing, "run `python -m afm_pipe.planning.scaling`"


# The terms of docs/scaling.md, per image: T tokens, W width, L blocks.


def block_flops(size: ModelSize, tokens: int) -> float:
    w = size.width
    return 2 * 12 * tokens * w**2 + 2 * 6 * w**2 + attention_flops(size, tokens)  # linear layers, modulation, attention


def attention_flops(size: ModelSize, tokens: int) -> float:
    return 2 * 2 * tokens**2 * size.width  # scores and mixing


def forward_flops(size: ModelSize, tokens: int, embedders: int, outputs: int, passes: int = 1) -> float:
    patches = 2 * tokens * 4 * size.patch**2 * size.width
    times = embedders * 2 * (FREQUENCIES * size.width + size.width**2)
    return passes * size.depth * block_flops(size, tokens) + patches + times + 2 * outputs * size.width


@pytest.mark.parametrize(
    ("name", "size"),
    [("b2", "b2"), ("xl2-2nfe", "s4"), ("xl2-112l", "s4")],
)
def test_work_and_activations_follow_the_formulas_of_the_page(params: Params, name: str, size: str) -> None:
    run, batch, shape = params.runs[name].model_copy(update={"size": size}), 4, SIZES[size]
    config = run_config(run, params.latent_shape, CLASSES)
    counted = measure(run, config, batch)
    tokens, times = (32 // shape.patch) ** 2, int(run.nfe != 1)
    last_layer = tokens * 4 * shape.patch**2 + 2 * shape.width
    g = forward_flops(shape, tokens, times + (run.repeats if run.repeats > 1 else 0), last_layer, run.repeats)
    d = forward_flops(shape, tokens + 1, times, 1)
    # 4 G + 10.5 D, and attention once more where D's backward pass goes to its input: both factors are activations.
    flops = 4 * g + 10.5 * d + shape.depth * attention_flops(shape, tokens + 1)
    near = 0.003 if size == "b2" else 0.01  # what is outside the blocks weighs more beside two blocks
    assert counted.flops == pytest.approx(batch * flops, rel=near)
    assert counted.units == pytest.approx(flops / g, rel=near)
    g_step = run.repeats * shape.depth * block_bytes(shape, tokens)
    g_step += shape.depth * block_bytes(shape, tokens + 1, frozen=True)
    d_step = 2.5 * shape.depth * block_bytes(shape, tokens + 1)
    kept = count_peak(run, config, batch, batch // 4).kept_bytes
    assert kept == pytest.approx(batch * max(g_step, d_step), rel=0.02 if size == "b2" else 0.07)  # and all inputs


def test_guidance_is_two_passes_of_the_classifier(params: Params) -> None:
    run, shape = params.runs["b2"].model_copy(update={"size": "s4"}), SIZES["b2"]
    config, tokens = run_config(run, params.latent_shape, CLASSES), 257
    expected = 2 * forward_flops(shape, tokens, 1, CLASSES) + shape.depth * attention_flops(shape, tokens)
    assert guidance_flops("b2", config, 2) == pytest.approx(2 * expected, rel=0.01)


def block_bytes(size: ModelSize, tokens: int, frozen: bool = False) -> float:
    """Count the bytes that a block keeps per image for its backward pass; less if its weights need no gradient."""
    images = 2
    with FakeTensorMode():
        block = Block(size, qk_norm=False).requires_grad_(not frozen)
        x, condition = torch.empty(images, tokens, size.width, requires_grad=True), torch.empty(images, size.width)
        with Storages({"block": block}) as storages:
            kept = block(x, condition.requires_grad_(not frozen))  # as large as x, which was there before
            assert kept.shape == x.shape
            return storages.bytes / images


def test_a_block_keeps_20_floats_per_token_and_channel_and_10_when_frozen() -> None:
    for name in ("b2", "xl2"):
        size = SIZES[name]
        assert block_bytes(size, 256) / (4 * 256 * size.width) == pytest.approx(20, abs=0.1)
        assert block_bytes(size, 256, frozen=True) / (4 * 256 * size.width) == pytest.approx(10, abs=0.1)


def test_activation_checkpointing_keeps_the_inputs_of_blocks(params: Params) -> None:
    run, size = params.runs["b2"], SIZES["b2"]
    config, one_block = run_config(run, params.latent_shape, CLASSES), 2.5 * block_bytes(size, 257)
    inputs = 2.5 * size.depth * 4 * 257 * size.width
    peak = count_peak(run, config, 4, 1, checkpoint_activations=True)
    assert peak.kept_bytes / 4 == pytest.approx(inputs, rel=0.1)
    assert peak.kept_bytes / 4 + one_block < peak.activation_bytes / 4 < 1.15 * (peak.kept_bytes / 4 + one_block)


def test_state_is_what_adamw_and_the_ema_hold(params: Params) -> None:
    run = params.runs["b2"].model_copy(update={"size": "s4"})
    config = run_config(run, params.latent_shape, CLASSES)
    needs = budget(run, config, 64)
    held = on_disk = summed = 0
    for build in (build_generator, build_discriminator):
        weights = list(build(config).parameters())
        optimizer = torch.optim.AdamW(weights)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        moments = [m for state in optimizer.state.values() for key, m in state.items() if key.startswith("exp_avg")]
        ema = weights if build is build_generator else []
        summed += sum(weight.nbytes for weight in weights)
        on_disk += sum(each.nbytes for each in (*weights, *moments, *ema))
        held += sum(each.nbytes for each in (*weights, *weights, *moments, *ema))  # weights and gradients
    assert needs.state_bytes == pytest.approx(held, rel=0.03)  # position embeddings count as parameters
    assert needs.checkpoint_bytes == pytest.approx(on_disk, rel=0.03)
    assert needs.gradient_bytes == pytest.approx(summed, rel=0.03)
