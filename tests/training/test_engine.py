"""How trainings compute: precision, what is kept for the backward pass, compilation, and no looks at the device."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from afm_pipe.distributed.launch import load_launch
from afm_pipe.models.discriminator import Discriminator
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.objectives.adversarial_flow.losses import gradient_penalty, moved
from afm_pipe.params import Run
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import ModelSize
from afm_pipe.params.training import BF16_EPSILON
from afm_pipe.planning.budget import budget
from afm_pipe.runtime.errors import NotFiniteError
from afm_pipe.training.engine import Engine
from afm_pipe.training.state import TrainingState
from benchmarks.inputs import CLASS_COUNT, latents_file
from benchmarks.training import CPU, OurTraining

SHAPE = (4, 8, 8)
RUN = (
    load_params(Path(__file__).parents[1] / "params.yaml")
    .runs["t4-short"]
    .model_copy(update={"size": "s4", "batch_size": 8})
)


@pytest.fixture
def training(tmp_path: Path) -> Any:
    latents = latents_file(tmp_path / "latents.h5", 64, SHAPE)

    def make(run: Run = RUN, engine: Engine = Engine()) -> OurTraining:  # noqa: B008  # an immutable value
        config = run_config(run, SHAPE, CLASS_COUNT)
        return OurTraining(run, latents, TrainingState.fresh(config, run, CPU, engine), config)

    return make


def weights(training: OurTraining) -> Tensor:
    networks = (training.state.generator, training.state.discriminator, training.state.ema)
    return torch.cat([value.detach().flatten() for network in networks for value in network.parameters()]).clone()


def kept_bytes(training: OurTraining) -> int:
    """Return the bytes of the largest set of tensors that a backward pass of an update needs."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    parts, setting = training.draw()
    part = parts[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = training.state.discriminator(part.d_batch.real, part.d_batch.labels)
    del logits
    return sum(kept.values()) - sum(p.untyped_storage().nbytes() for p in training.state.discriminator.parameters())


@pytest.mark.parametrize("repeats", [1, 2])
def test_checkpointed_activations_give_the_same_bits_and_keep_less(training, repeats: int) -> None:
    run = RUN.model_copy(update={"repeats": repeats})
    plain, spare = training(run), training(run, Engine(checkpoint_activations=True))
    for _ in range(3):
        plain.update()
        spare.update()
    assert torch.equal(weights(plain), weights(spare))
    assert kept_bytes(spare) < kept_bytes(plain) / 3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bf16_multiplies_in_bf16_and_keeps_weights_tokens_and_logits_in_fp32(training, qk_norm: bool) -> None:
    own = {"qk_norm": qk_norm}
    fp32, bf16 = (training(RUN.model_copy(update=own | {"precision": p})) for p in ("fp32", "bf16"))
    seen: dict[str, set[torch.dtype]] = {"qkv": set(), "block": set(), "logit": set()}
    d = bf16.state.discriminator
    d.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: seen["qkv"].add(output.dtype))
    d.blocks[0].register_forward_hook(lambda module, args, output: seen["block"].add(output.dtype))
    d.register_forward_hook(lambda module, args, output: seen["logit"].add(output.dtype))
    first = weights(fp32)
    for _ in range(3):
        fp32.update()
        bf16.update()
    assert seen == {"qkv": {torch.bfloat16}, "block": {torch.float32}, "logit": {torch.float32}}
    assert {value.dtype for value in bf16.state.discriminator.parameters()} == {torch.float32}
    apart = (weights(bf16) - weights(fp32)).norm() / (weights(fp32) - first).norm()
    assert 0 < apart < 0.5  # Adam's steps are the signs of gradients, of which some are noise


def test_bf16_measures_the_penalty_of_a_discriminator_that_has_a_slope() -> None:
    torch.manual_seed(0)
    network = Discriminator(ModelSize(4, 128, 4, 4), 4, 8, CLASS_COUNT, qk_norm=True)
    for name, value in network.named_parameters():
        if "adaLN" in name or "final_layer" in name:
            torch.nn.init.normal_(value, std=0.05)  # as trained ones are: a new D's blocks do nothing
    x, labels = torch.randn(256, *SHAPE), torch.arange(256) % CLASS_COUNT
    away = moved(x, torch.randn(x.shape), BF16_EPSILON)
    found = {}
    for bf16 in (False, True):
        network.bf16 = bf16
        with torch.no_grad():
            found[bf16] = gradient_penalty(network(x, labels), network(away, labels), BF16_EPSILON).item()
    assert found[True] == pytest.approx(found[False], rel=0.1)
    with pytest.raises(ValidationError, match="penalty.epsilon to be at least 0.05 with precision bf16"):
        Run.model_validate(RUN.model_dump() | {"precision": "bf16"})


def test_what_is_not_finite_stops_all_updates_on_the_device_and_is_told_when_asked(training) -> None:
    run = training()
    run.updates._looks_at_once = False  # as on a GPU
    run.update()
    run.updates.require_finite()
    before = weights(run)
    healthy, setting = run.draw()
    broken = healthy[0]._replace(d_batch=healthy[0].d_batch._replace(real=healthy[0].d_batch.real * float("nan")))
    run.updates.update([broken], setting)
    run.state.update += 1
    run.updates.update(healthy, setting)
    networks = (run.state.generator, run.state.discriminator)
    now = torch.cat([value.detach().flatten() for network in networks for value in network.parameters()])
    assert torch.equal(now, before[: len(now)])
    with pytest.raises(NotFiniteError, match="at update 1") as stopped:
        run.updates.require_finite()
    assert stopped.value.update == 1


def test_an_update_that_does_not_look_has_the_same_bits(training) -> None:
    looking, blind = training(), training()
    blind.updates._looks_at_once = False
    for _ in range(3):
        looking.update()
        blind.update()
    assert torch.equal(weights(looking), weights(blind))


def test_an_update_reads_no_number_off_the_device(training, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing waits; what would is every way to a number of Python's: item, bool, float, int, tolist."""
    run = training()
    run.updates._looks_at_once = False
    parts, setting = run.draw()
    run.updates.update(parts, setting)  # AdamW makes its state

    def refused(self: Tensor, *args: Any) -> Any:
        raise AssertionError("a look at a number")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy"):
        monkeypatch.setattr(Tensor, name, refused)
    run.updates.update(parts, setting)


@pytest.mark.parametrize(("times", "bf16"), [("none", False), ("both", True)])
def test_networks_have_no_graph_break(times: Any, bf16: bool) -> None:
    size = ModelSize(1, 32, 2, 4)
    repeats = 2 if times == "none" else 1
    generator = Generator(size, 4, 8, CLASS_COUNT, times=times, repeats=repeats, qk_norm=bf16)
    discriminator = Discriminator(size, 4, 8, CLASS_COUNT, timed=times != "none")
    generator.bf16 = discriminator.bf16 = bf16
    x, labels, t = torch.randn(2, *SHAPE), torch.zeros(2, dtype=torch.int64), torch.rand(2)
    for call in (lambda: generator(x, labels, t, t / 2), lambda: discriminator(x, labels, t)):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(call)()
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_compiled_updates_agree_with_eager_ones(training, checkpoint_activations: bool) -> None:
    torch._dynamo.reset()
    eager = training()
    compiled = training(engine=Engine(checkpoint_activations, compile=True))
    first = weights(eager)
    for _ in range(3):
        eager.update()
        compiled.update()
    assert (weights(compiled) - weights(eager)).norm() < 0.02 * (weights(eager) - first).norm()
    assert list(compiled.state.generator.state_dict()) == list(eager.state.generator.state_dict())
    torch._dynamo.reset()


def test_launch_settings_reach_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Engine.of(load_launch()) == Engine()
    for name in ("CHECKPOINT_ACTIVATIONS", "COMPILE", "EMA_ON_CPU"):
        monkeypatch.setenv(f"AFM_{name}", "true")
    monkeypatch.setenv("AFM_TF32", "false")
    assert Engine.of(load_launch()) == Engine(True, True, False, True)


def test_models_are_saved_alike_whatever_the_engine(training) -> None:
    config = ModelConfig(size="s4", channels=4, latent_size=8, num_classes=CLASS_COUNT)
    plain = TrainingState.fresh(config, RUN, CPU)
    other = TrainingState.fresh(config, RUN.model_copy(update={"precision": "bf16"}), CPU, Engine(True, True))
    for part, tensors in plain.tensors().items():
        for name, value in tensors.items():
            assert torch.equal(other.tensors()[part][name], value)


def test_memory_that_is_asked_for_shrinks_with_checkpointed_activations() -> None:
    config = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=CLASS_COUNT)
    run = RUN.model_copy(update={"size": "t4", "batch_size": 64})
    whole, spare = budget(run, config), budget(run, config, checkpoint_activations=True)
    assert whole.activation_bytes / 4 < spare.activation_bytes < whole.activation_bytes / 3  # four blocks
    assert spare.state_bytes == whole.state_bytes


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library keeps no freed memory")
def test_what_a_training_frees_is_taken_again_and_not_asked_of_the_kernel() -> None:
    """In a process of its own, since it is for good; 100 tensors of 48 MB, which the kernel would zero page by page."""
    code = """
import resource, torch
from afm_pipe.training.engine import Engine
Engine().prepare(None, torch.device("cpu"))
def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.empty(12 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(1)
print(faults(100))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 120_000, "of at most ten such tensors; left alone, of a hundred"
