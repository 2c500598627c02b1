"""How a run computes: precision, activation checkpointing, compilation, and no waiting for the device."""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_leaves

from afm_pipe.distributed.launch import load_launch
from afm_pipe.models.discriminator import Discriminator
from afm_pipe.models.dit import Block
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import ModelConfig
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.adversarial_flow.batches import Draw
from afm_pipe.objectives.adversarial_flow.losses import gradient_penalty, perturb
from afm_pipe.params import Run
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES, ModelSize
from afm_pipe.params.training import BF16_EPSILON
from afm_pipe.planning.budget import budget
from afm_pipe.runtime.errors import NotFiniteError
from afm_pipe.training.engine import Engine
from afm_pipe.training.state import TrainingState
from afm_pipe.training.trainer import Trainer
from benchmarks.inputs import CLASS_COUNT, latents_file
from benchmarks.training import CPU, trainer_of
from tests.conftest import ROOT
from tests.training.running import weights

SHAPE = (4, 8, 8)
RUN = load_params(ROOT / "params.yaml").runs["s4"].model_copy(update={"size": "s4", "batch_size": 8})


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Trainer]:
    """Return a function that returns a trainer at its first update."""
    latents = latents_file(tmp_path / "latents.h5", 64, SHAPE)
    return lambda run=RUN, **engine: trainer_of(run, latents, **engine)


def update(*trainers: Trainer) -> None:
    for trainer in trainers:
        trainer.update(trainer.draw())


def vector(trainer: Trainer) -> Tensor:
    """Return all weights as one vector."""
    return torch.cat([tensor.flatten() for tensor in weights(trainer.state).values()])


def without_numbers(draw: Draw) -> Draw:
    """Return a draw whose real latents are not finite."""
    ((part,),) = draw.discriminator
    batch = part.batch._replace(real=part.batch.real * float("nan"))
    return draw._replace(discriminator=[[part._replace(batch=batch)]])


def kept_bytes(trainer: Trainer) -> int:
    """Return the bytes that D's backward pass needs, besides its weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    ((part,),), discriminator = trainer.draw().discriminator, trainer.state.networks["discriminator"]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = discriminator(part.batch.real, part.batch.labels)
    del logits
    return sum(kept.values()) - sum(p.untyped_storage().nbytes() for p in discriminator.parameters())


@pytest.mark.parametrize("repeats", [1, 2])
def test_checkpointed_activations_give_the_same_bits_and_keep_less(make: Callable[..., Trainer], repeats: int) -> None:
    run = RUN.model_copy(update={"repeats": repeats})
    plain, spare = make(run), make(run, engine=Engine(checkpoint_activations=True))
    for _ in range(3):
        update(plain, spare)
    assert torch.equal(vector(plain), vector(spare))
    assert kept_bytes(spare) < kept_bytes(plain) / 3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bf16_multiplies_in_bf16_and_keeps_weights_tokens_and_logits_in_fp32(
    make: Callable[..., Trainer], qk_norm: bool
) -> None:
    fp32, bf16 = (make(RUN.model_copy(update={"qk_norm": qk_norm, "precision": p})) for p in ("fp32", "bf16"))
    seen: dict[str, set[torch.dtype]] = {"qkv": set(), "block": set(), "logit": set()}
    d = bf16.state.networks["discriminator"]
    d.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: seen["qkv"].add(output.dtype))
    d.blocks[0].register_forward_hook(lambda module, args, output: seen["block"].add(output.dtype))
    d.register_forward_hook(lambda module, args, output: seen["logit"].add(output.dtype))
    first = vector(fp32)
    for _ in range(3):
        update(fp32, bf16)
    # The float32 products are those of the penalties.
    assert seen == {"qkv": {torch.bfloat16, torch.float32}, "block": {torch.float32}, "logit": {torch.float32}}
    assert {value.dtype for value in d.parameters()} == {torch.float32}
    apart = (vector(bf16) - vector(fp32)).norm() / (vector(fp32) - first).norm()
    assert 0 < apart < 0.5  # Adam's steps are the signs of gradients, of which some are noise


def test_bf16_measures_the_penalty_of_a_discriminator_that_has_a_slope() -> None:
    torch.manual_seed(0)
    network = Discriminator(ModelSize(4, 128, 4, 4), 4, 8, CLASS_COUNT, qk_norm=True)
    for name, value in network.named_parameters():
        if "adaLN" in name or "final_layer" in name:
            torch.nn.init.normal_(value, std=0.05)  # as trained ones are: a new D's blocks do nothing
    x, labels = torch.randn(256, *SHAPE), torch.arange(256) % CLASS_COUNT
    away = perturb(x, torch.randn(x.shape), BF16_EPSILON)
    found = {}
    for bf16 in (False, True):
        network.bf16 = bf16
        with torch.no_grad():
            found[bf16] = gradient_penalty(network(x, labels), network(away, labels), BF16_EPSILON).item()
    assert found[True] == pytest.approx(found[False], rel=0.1)
    penalty = RUN.penalty.model_dump() | {"precision": "bf16"}
    with pytest.raises(ValidationError, match="penalty.epsilon of at least 0.05 with penalties in bf16"):
        Run.model_validate(RUN.model_dump() | {"precision": "bf16", "penalty": penalty})
    Run.model_validate(RUN.model_dump() | {"precision": "bf16"})


def test_a_non_finite_loss_stops_all_updates_on_the_device_and_is_raised_when_it_is_read(
    make: Callable[..., Trainer],
) -> None:
    trainer = make()
    trainer.learner.checks_immediately = False  # as on a GPU
    update(trainer)
    trainer.learner.require_finite()
    before = {name: tensor.clone() for name, tensor in weights(trainer.state).items() if not name.startswith("ema")}
    healthy = trainer.draw()
    broken = without_numbers(healthy)
    trainer.update(broken)
    trainer.update(healthy)
    assert all(torch.equal(weights(trainer.state)[name], tensor) for name, tensor in before.items())
    with pytest.raises(NotFiniteError, match="at update 1") as stopped:
        trainer.learner.require_finite()
    assert stopped.value.update == 1


def test_a_non_finite_loss_is_raised_before_the_update_on_a_cpu(make: Callable[..., Trainer]) -> None:
    trainer = make()
    update(trainer)
    before = vector(trainer)
    healthy = trainer.draw()
    with pytest.raises(NotFiniteError, match="at update 1"):
        trainer.update(without_numbers(healthy))
    assert torch.equal(vector(trainer), before)
    assert trainer.state.update == 1


def test_an_update_that_reads_nothing_has_the_same_bits(make: Callable[..., Trainer]) -> None:
    reading, blind = make(), make()
    blind.learner.checks_immediately = False
    for _ in range(3):
        update(reading, blind)
    assert torch.equal(vector(reading), vector(blind))


def test_an_update_reads_no_number_off_the_device(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing waits; what would wait is every conversion to a Python number."""
    trainer = make()
    trainer.learner.checks_immediately = False
    batch = trainer.draw()
    trainer.update(batch)  # AdamW makes its state

    def refused(self: Tensor, *args: Any) -> Any:
        raise AssertionError("a number is read")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy"):
        monkeypatch.setattr(Tensor, name, refused)
    trainer.update(batch)


@pytest.mark.parametrize(("times", "bf16"), [("none", False), ("both", True)])
def test_networks_have_no_graph_break(times: Any, bf16: bool) -> None:
    size = ModelSize(1, 32, 2, 4)
    repeats = 2 if times == "none" else 1
    generator = Generator(size, 4, 8, CLASS_COUNT, times=times, repeats=repeats, qk_norm=bf16)
    discriminator = Discriminator(size, 4, 8, CLASS_COUNT, time_conditioned=times != "none")
    generator.bf16 = discriminator.bf16 = bf16
    x, labels, t = torch.randn(2, *SHAPE), torch.zeros(2, dtype=torch.int64), torch.rand(2)
    for call in (lambda: generator(x, labels, t, t / 2), lambda: discriminator(x, labels, t)):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(call)()
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    torch._dynamo.reset()


def test_learning_rates_and_weights_may_be_tensors(make: Callable[..., Trainer]) -> None:
    """As a captured update needs them: in float64 the same bits; a GPU's AdamW takes float32, which rounds the rate."""
    numbers, tensors, rounded = make(), make(), make()
    for _ in range(3):
        update(numbers)
        for trainer, dtype in ((tensors, torch.float64), (rounded, torch.float32)):
            now = trainer.hyperparameters()
            rates = {name: torch.tensor(rate, dtype=dtype) for name, rate in now.lr.items()}
            scheduled = {name: torch.tensor(weight, dtype=dtype) for name, weight in now.weights.items()}
            held = replace(now, lr=rates, weights=scheduled)  # type: ignore[arg-type]
            trainer.objective.update(trainer.learner, trainer.draw(), held)
            trainer.learner.update_ema()
            trainer.state.update += 1
    assert torch.equal(vector(tensors), vector(numbers))
    assert (vector(rounded) - vector(numbers)).norm() < 1e-6 * vector(numbers).norm()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_compiled_updates_agree_with_eager_ones(make: Callable[..., Trainer], checkpoint_activations: bool) -> None:
    torch._dynamo.reset()
    eager = make()
    compiled = make(engine=Engine(checkpoint_activations, compile=True))
    first = vector(eager)
    for _ in range(3):
        update(eager, compiled)
    assert (vector(compiled) - vector(eager)).norm() < 0.02 * (vector(eager) - first).norm()
    assert list(weights(compiled.state)) == list(weights(eager.state))
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_block_normalizes_and_modulates_in_one_kernel() -> None:
    torch._dynamo.reset()
    size = SIZES["s4"]
    block = Block(size, qk_norm=False)
    block.compile(fullgraph=True, dynamic=False)
    x, condition = torch.randn(2, 16, size.width, requires_grad=True), torch.randn(2, size.width, requires_grad=True)
    _, (forward, backward) = run_and_get_code(lambda: block(x, condition).sum().backward())
    kernels = [re.findall(r"^ +cpp_fused_(\w+)\(", code, re.MULTILINE) for code in (forward, backward)]
    norms = [name for name in kernels[0] if "layer_norm" in name]
    assert len(norms) == 2 and all("addcmul" in name for name in norms)
    assert len(kernels[0]) == 5  # SiLU, norm with modulation twice, GELU, gate; residuals are in them
    assert len(kernels[1]) == 7
    torch._dynamo.reset()


@pytest.mark.parametrize("micro_batch", [6, 3])
def test_compiled_blocks_take_micro_batches_of_any_size(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    """16 images as 6, 5, 5 and as 3, 3, 3, 3, 2, 2; the graphs alone, since code for a CPU takes a minute."""
    torch._dynamo.reset()
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: whole(self, backend="eager", **how))
    run = RUN.model_copy(update={"batch_size": 16})
    eager, compiled = (make(run, micro_batch=micro_batch, engine=Engine(compile=c)) for c in (False, True))
    update(eager, compiled)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    update(eager, compiled)
    assert torch.equal(vector(eager), vector(compiled))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0, "all graphs come in the first update"
    torch._dynamo.reset()


def test_batches_drawn_ahead_are_those_drawn_in_place(make: Callable[..., Trainer]) -> None:
    phases = [phase.model_copy(update={"until_epoch": 0.4}) for phase in RUN.phases[:1]]
    run = RUN.model_copy(update={"phases": [*phases, RUN.phases[-1].model_copy(update={"gradient_clip": 1.0})]})
    here, ahead = make(run), make(run, draw_ahead=True)
    for at in (0, 1, 2, 3, 4, 9, 10, 2, 3):  # across phases, and back as after a rollback
        here.state.update = ahead.state.update = at
        one, other = (tree_leaves(trainer.draw()) for trainer in (here, ahead))
        assert len(one) == len(other)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))
    assert ahead.batches._next is not None and ahead.batches._next[0] == 4  # type: ignore[attr-defined]


def test_launch_settings_reach_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Engine.of(load_launch()) == Engine()
    for name in ("CHECKPOINT_ACTIVATIONS", "COMPILE", "EMA_ON_CPU"):
        monkeypatch.setenv(f"AFM_{name}", "true")
    monkeypatch.setenv("AFM_TF32", "false")
    assert Engine.of(load_launch()) == Engine(True, True, False, True)


def test_models_are_saved_alike_whatever_the_engine() -> None:
    config = ModelConfig(size="s4", channels=4, latent_size=8, num_classes=CLASS_COUNT)
    plain = TrainingState.fresh(build_objective(RUN, config), CPU)
    bf16 = RUN.model_copy(update={"precision": "bf16"})
    other = TrainingState.fresh(build_objective(bf16, config), CPU, Engine(True, True))
    found = other.tensors()
    assert list(found) == list(plain.tensors())
    for part, tensors in plain.tensors().items():
        assert list(found[part]) == list(tensors)
        for name, value in tensors.items():
            assert torch.equal(found[part][name], value)


def test_counted_memory_shrinks_with_checkpointed_activations() -> None:
    config = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=CLASS_COUNT)
    run = RUN.model_copy(update={"size": "t4", "batch_size": 64})
    whole, spare = budget(run, config), budget(run, config, checkpoint_activations=True)
    assert whole.activation_bytes / 4 < spare.activation_bytes < whole.activation_bytes / 2.5  # four blocks
    assert spare.state_bytes == whole.state_bytes


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library keeps no freed memory")
def test_freed_memory_is_reused_and_not_returned_to_the_kernel() -> None:
    """In a child process, since the setting lasts; 100 tensors of 48 MB, which the kernel would zero page by page."""
    code = """
import resource, torch
from afm_pipe.training.engine import Engine
Engine().prepare("fp32", torch.device("cpu"))
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
