"""The plan of a study."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.planning.budget import RUNTIME, budget, what_fits
from afm_pipe.planning.counting import measure
from afm_pipe.planning.plan import GPUS, Machine, latents_bytes, plan_run, plan_text
from afm_pipe.planning.storage import count_peak
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.conftest import ROOT, SMOKE

IMAGENET = ROOT / "profiles" / "imagenet256.yaml"
EIGHT = Machine("h100", 8, 0.4, "tf32")
PUBLISHED = yaml.safe_load((ROOT / "afm_pipe" / "reporting" / "published.yaml").read_text())


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(IMAGENET)


def test_an_update_of_xl2_is_the_papers_number_of_forward_passes(params: Params) -> None:
    config = ModelConfig(size="xl2", channels=4, latent_size=32, num_classes=1000)
    work = measure(params.runs["xl2"], config, 4)
    published = next(row["units"] for row in PUBLISHED["compute_units"] if row["method"] == "AFM")
    assert work.units == pytest.approx(published, rel=0.03)
    tokens, width = 256, 1152
    linear = 2 * tokens * 12 * width**2 + 2 * 6 * width**2  # attention and MLP on tokens, modulation once
    attention = 2 * 2 * tokens**2 * width
    assert work.forward_flops / 4 == pytest.approx(28 * (linear + attention), rel=0.01)


def test_work_and_activations_grow_with_the_batch_and_the_repeats() -> None:
    run = load_params(SMOKE).runs["t4"]
    config = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=10)
    small, large = measure(run, config, 8), measure(run, config, 16)
    assert large.flops == pytest.approx(2 * small.flops, rel=0.01)
    deep = measure(run, config.model_copy(update={"repeats": 4}), 8)
    assert deep.forward_flops == pytest.approx(4 * small.forward_flops, rel=0.15)
    once, twice = (count_peak(run, config, images, 2).activation_bytes for images in (8, 16))
    assert twice == pytest.approx(2 * once, rel=0.15)  # as many are penalized
    assert count_peak(run, config.model_copy(update={"repeats": 4}), 8, 2).activation_bytes > 1.4 * once


@pytest.mark.slow
def test_the_settings_that_would_fit_do_and_larger_ones_would_not() -> None:
    run = load_params(SMOKE).runs["t4"]
    config = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=10)
    whole = budget(run, config)
    free = whole.memory_bytes - whole.activation_bytes * 2 // 3
    lines = what_fits(run, config, 1, free)
    micro_batch = int(lines[0].removeprefix("AFM_MICRO_BATCH=").split(":")[0])
    assert budget(run, config, 1, micro_batch).memory_bytes - free < 0.02 * whole.activation_bytes
    assert budget(run, config, 1, 2 * micro_batch).memory_bytes > free
    assert lines[1].startswith("AFM_CHECKPOINT_ACTIVATIONS=true") and lines[2].startswith("precision: bf16")
    free = RUNTIME + whole.state_bytes // 2
    alone, shared = what_fits(run, config, 1, free)
    assert alone.startswith("on one device alone, nothing: weights and optimizers take 0.0 GiB")
    devices = int(shared.split(" on ")[1].split()[0])
    fits = [budget(run, config, n, 4, True, shard=True).memory_bytes <= free for n in (devices // 2, devices)]
    assert fits == [False, True]
    assert what_fits(run, config, 1, RUNTIME)[1:] == []


def test_flops_of_a_linear_layer() -> None:
    from afm_pipe.planning.counting import _Counter

    with torch.device("meta"):
        layer = torch.nn.Linear(32, 64)
        with _Counter() as counter:
            layer(torch.empty(16, 32, requires_grad=True)).sum().backward()
    assert counter.forward_flops == 2 * 16 * 32 * 64
    assert counter.backward_flops == 2 * counter.forward_flops


def test_a_plan_follows_from_images_peak_and_utilization(params: Params) -> None:
    plan = plan_run(params, "b2", 1_281_167, 1000, EIGHT)
    assert plan.updates == -(-170 * 1_281_167 // 256)
    assert plan.compute_seconds == pytest.approx(plan.work.flops / (8 * 0.4 * 494.5e12))
    gradients = 4 * sum(plan.budget.parameters.values())
    assert plan.reduce_seconds == pytest.approx(2 * 7 / 8 * gradients / (0.8 * 450e9))
    assert plan.days == pytest.approx(plan.updates * (plan.compute_seconds + plan.reduce_seconds) / 86400)
    millions = {name: round(count / 1e6) for name, count in plan.budget.parameters.items()}
    assert millions == {"generator": 130, "discriminator": 129}
    half = plan._replace(machine=EIGHT._replace(utilization=0.2))
    assert half.compute_seconds == pytest.approx(2 * plan.compute_seconds)
    bf16 = plan._replace(machine=EIGHT._replace(precision="bf16"))
    assert bf16.compute_seconds == pytest.approx(plan.compute_seconds * 494.5 / 989.5)
    bf16_budget = plan_run(params, "b2", 1_281_167, 1000, EIGHT._replace(precision="bf16")).budget
    run = params.runs["b2"].model_copy(update={"precision": "bf16"})
    assert bf16_budget == budget(run, run_config(run, params.latent_shape, 1000), 8)  # as training requires
    assert 0.8 < bf16_budget.activation_bytes / plan.budget.activation_bytes < 1.2  # penalties are apart, in float32
    alone, two_machines = plan._replace(machine=EIGHT._replace(gpus=1)), plan._replace(machine=EIGHT._replace(gpus=16))
    assert alone.reduce_seconds == 0
    assert two_machines.reduce_seconds == pytest.approx(2 * 15 / 16 * gradients / (0.8 * 400e9))  # network cards
    guided = plan_run(params, "b2-guided", 1_281_167, 1000, EIGHT)
    assert guided.images == pytest.approx(30 * 1_281_167, abs=256)  # its own phase
    assert guided.work.units - plan.work.units == pytest.approx(2, rel=0.1)  # B/2 forward, and back to its input


def test_a_plan_counts_what_the_engine_saves(params: Params) -> None:
    run = params.runs["xl2-112l"].model_copy(update={"size": "b2", "repeats": 2})  # counted sooner
    deep = params.model_copy(update={"runs": params.runs | {"deep": run}})

    def memory(**engine: Any) -> float:
        return plan_run(deep, "deep", 1_281_167, 1000, EIGHT._replace(**engine)).budget.memory_bytes

    whole, spare = memory(), memory(micro_batch=8)
    assert spare < whole / 2
    assert memory(micro_batch=8, checkpoint_activations=True) < 0.7 * spare
    once, twice = (plan_run(deep, "deep", 1_281_167, 1000, EIGHT._replace(micro_batch=size)) for size in (None, 8))
    assert twice.work.units == pytest.approx(once.work.units + 1)  # another forward pass of G
    state = 4 * (5 * 130e6 + 4 * 129e6)  # bytes of G and D, roughly
    assert spare - memory(micro_batch=8, shard=True) == pytest.approx(state * 7 / 8, rel=0.1)


def test_a_plan_is_what_the_training_itself_requires(params: Params) -> None:
    run = params.runs["xl2-112l"].model_copy(update={"size": "b2"})
    config = run_config(run, params.latent_shape, 1000)
    deep = params.model_copy(update={"runs": params.runs | {"deep": run}})
    plan = plan_run(deep, "deep", 1_281_167, 1000, EIGHT)
    assert plan.budget.memory_bytes == budget(run, config, 8).memory_bytes
    plain = run_config(params.runs["b2"], params.latent_shape, 1000)
    # Four passes of G over its blocks keep more than the D step, the larger one otherwise.
    assert budget(run, config, 8).activation_bytes > 1.5 * budget(run, plain, 8).activation_bytes


def test_latents_of_imagenet_are_42_gb(params: Params) -> None:
    assert latents_bytes(params, 1_281_167) == 1_281_167 * 2 * 8 * 32 * 32 * 2


def test_the_table_names_every_run_and_says_that_it_estimates() -> None:
    smoke = load_params(SMOKE)
    text = track("plan", plan_text(smoke, [], EIGHT, 5000, 10))
    assert all(f"  {name} " in text for name in smoke.models)
    assert "is an estimate" in text
    assert "--utilization" in text
    assert "More than" not in text
    one = track("plan", plan_text(load_params(IMAGENET), ["b2"], EIGHT._replace(gpus=1), 1_281_167, 1000))
    assert "! More than the 80 GB of one h100: b2" in one
    assert "xl2" not in one


def test_what_cannot_be_planned_is_said(params: Params) -> None:
    for words, wrong in (
        ("--gpu v1, expected one of a100", ("v1", 1, 0.4, "tf32")),
        ("--gpus 0", ("h100", 0, 0.4, "tf32")),
        ("--utilization 1.5", ("h100", 1, 1.5, "tf32")),
        ("--precision fp8", ("h100", 1, 0.4, "fp8")),
    ):
        with pytest.raises(UserError, match=words):
            track("plan", plan_text(params, [], Machine(*wrong), 100, 10))
    with pytest.raises(UserError, match="7 GPUs for the batch of 256 of b2"):
        plan_run(params, "b2", 100, 10, EIGHT._replace(gpus=7))
    with pytest.raises(UserError, match="no run 'b3'"):
        track("plan", plan_text(params, ["b3"], EIGHT, 100, 10))


def test_peaks_are_dense_and_rise_with_lower_precision() -> None:
    assert all(gpu.fp32 < gpu.tf32 < gpu.bf16 < 2.1 * gpu.tf32 for gpu in GPUS.values())


def test_the_command_prints_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["plan", "t4", "--gpus", "2", "--gpu", "a100", "--images", "5000", "--params", str(SMOKE)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "On 2 x a100 in tf32: 156 TFLOP/s each" in result.stdout
    assert "5,000 images" in result.stdout
    assert "10% to 25% is assumed" in result.stdout and " to " in result.stdout.split("t4 ")[1].splitlines()[0]
    measured = CliRunner().invoke(app, [*words, "--measure", "--micro-batch", "4"], env={"AFM_DEVICE": "cpu"})
    assert measured.exit_code == 0, measured.output
    assert "Measured on cpu: t4 with 4 images at" in measured.stdout
    spare = CliRunner().invoke(app, [*words, "--micro-batch", "4", "--checkpoint-activations", "--shard"])
    assert spare.exit_code == 0, spare.output
    assert spare.stdout != result.stdout


@pytest.mark.parametrize("wrong", ["--gpu v100", "--gpus 0", "--precision fp16"])
def test_a_wrong_machine_is_refused_before_anything_is_measured(project: Path, wrong: str) -> None:
    words = ["plan", "t4", "--measure", "--images", "5000", "--params", str(SMOKE), *wrong.split()]
    result = CliRunner().invoke(app, words, env={"AFM_DEVICE": "cpu"})
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: Found {wrong}, expected ")
