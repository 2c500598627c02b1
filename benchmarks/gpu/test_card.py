"""Twelve checks of one card, in about ten minutes:  make test-gpu

Each is skipped by name where something is missing. Thresholds are first guesses: set them from the first run.
"""

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives.adversarial_flow.objective import AdversarialFlow
from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.budget import budget, largest_part
from afm_pipe.planning.counting import measure
from afm_pipe.training import learner as learning
from afm_pipe.training.checkpoints import load_latest, save_checkpoint
from afm_pipe.training.engine import Engine
from afm_pipe.training.state import TrainingState
from afm_pipe.training.trainer import Trainer
from benchmarks.gpu import rates
from benchmarks.gpu.conftest import Check
from benchmarks.gpu.inputs import CARD, CLASSES, FORMS, IMAGES, ON_CPU, SHAPE, XL, run_of, trainer_of
from tests import parity
from tests.training.running import Halved, same_weights, train, weights

pytestmark = pytest.mark.gpu
CUDA_ONLY = "a CUDA device"
BATCH = 16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def card(request: pytest.FixtureRequest) -> None:
    """Skip where there is no card; a few checks run on a CPU too, to test themselves."""
    if CARD.type != "cuda" and not (ON_CPU and "on_cpu" in request.keywords):
        pytest.skip(f"needs {CUDA_ONLY}, found none")


@pytest.fixture
def group() -> Iterator[ProcessGroup]:
    """A group of this process alone that communicates, with NCCL on a card."""
    if not dist.is_available() or (CARD.type == "cuda" and not dist.is_nccl_available()):
        pytest.skip("needs torch built with NCCL")
    backend = "cpu:gloo,cuda:nccl" if CARD.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    yield ProcessGroup(0, 1, CARD, forced=True)
    dist.destroy_process_group()


def updated(trainer: Trainer, updates: int) -> Trainer:
    for _ in range(updates):
        trainer.update(trainer.draw())
    return trainer


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the norm of the difference of tensors by name over that of the second."""
    apart = parity.norm({name: one[name].double().cpu() - other[name].double().cpu() for name in other})
    return apart / parity.norm(other)


@pytest.mark.on_cpu
@pytest.mark.parametrize("tf32", [False, True])
def test_01_gradients_equal_the_released(check: Check, tf32: bool) -> None:
    vectors = parity.read(Path(parity.__file__).parent / "golden" / "step_1nfe.npz")
    parity.base_run = run_of
    released = parity.Released("step_1nfe", vectors, "weights_gen/", "weights_dis/")
    run = released.run(lr=0.0, weight_decay=0.0, batch_size=len(vectors["in/labels"]))
    objective = AdversarialFlow(run, released.config, None)
    state = TrainingState.fresh(objective, CARD, Engine(tf32=tf32))
    for name, network in state.networks.items():
        network.load_state_dict(released.weights[name])
    recorder = parity.Recorder(state, run)

    def placed(values: Any) -> Any:
        kept = (each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in values)
        return type(values)(*(each.to(CARD) if isinstance(each, Tensor) else each for each in kept))

    batch, noise = placed(released.batch("in/")), placed(released.noise("in/"))
    draw = parity.Draw([[parity.DiscriminatorPart(batch, noise)]], [parity.GeneratorPart(batch)])
    rates_ = {"generator": 0.0, "discriminator": 0.0}
    terms = objective.update(recorder, draw, parity.Hyperparameters(rates_, {"transport": 0.2})).cpu()
    r1 = 0.25 * float(terms[1]) / float(vectors["dis/loss/r1"]) - 1
    apart = max(
        distance(recorder.gradients[name], parity.under(vectors, f"{prefix}/grad/"))
        for prefix, name in (("dis", "discriminator"), ("gen", "generator"))
    )
    limit, r1_limit = (2e-2, 0.05) if tf32 else (1e-3, 5e-3)
    found = f"gradients {apart:.1e}, R1 {r1:+.1e}"
    check(found, f"gradients within {limit:.0e}, R1 within {r1_limit:g}", apart < limit and abs(r1) < r1_limit)


@pytest.mark.on_cpu
@pytest.mark.parametrize("form", FORMS)
def test_02_updates_never_wait_for_the_card(check: Check, tmp_path: Path, form: str) -> None:
    trainer = updated(trainer_of(tmp_path, run_of(form=form, batch_size=BATCH)), 3)
    if CARD.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        updated(trainer, 5)
        found = "5 updates"
    except RuntimeError as error:
        found = str(error).splitlines()[0]
    finally:
        if CARD.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    check(found, "5 updates without a wait", found == "5 updates")


@pytest.mark.on_cpu
@pytest.mark.parametrize("form", ["one step", "several steps"])
def test_03_blocks_compile_once(check: Check, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_CPU:
        whole = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: whole(self, backend="eager", **how))
    counters = torch._dynamo.utils.counters
    counters.clear()
    run = run_of(form=form, batch_size=BATCH)
    trainer = updated(trainer_of(tmp_path, run, Engine(compile=True), micro_batch=6), 1)  # 6, 5, 5
    first = counters["stats"]["unique_graphs"]
    updated(trainer, 3)
    later, breaks = counters["stats"]["unique_graphs"] - first, sum(counters["graph_break"].values())
    found = f"{first} graphs, {later} later, {breaks} graph breaks"
    check(found, "no graph after the first update, no graph break", first > 0 and later == breaks == 0)


@pytest.mark.on_cpu
def test_04_bf16_is_near_fp32(check: Check, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        trainer = trainer_of(tmp_path, run_of(batch_size=BATCH, qk_norm=True, precision=precision), Engine(tf32=False))
        gradients: dict[str, Tensor] = {}
        step = trainer.learner.step

        def kept(name: str, *rest: Any, trainer: Trainer = trainer, step: Any = step, into: Any = gradients) -> Any:
            named = trainer.state.networks[name].named_parameters()
            into |= {f"{name}.{key}": weight.grad.clone() for key, weight in named if weight.grad is not None}
            return step(name, *rest)

        trainer.learner.step = kept  # type: ignore[method-assign]
        updated(trainer, 1)
        found[precision] = gradients
    apart = {
        name: distance(
            *({k: v for k, v in each.items() if k.startswith(name)} for each in (found["bf16"], found["fp32"]))
        )
        for name in ("generator", "discriminator")
    }
    text = ", ".join(f"{name} {value:.3f}" for name, value in apart.items())
    check(text, "gradients within 0.1 of float32's norm", max(apart.values()) < 0.1)


@pytest.mark.parametrize("images", [16, 32])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "checkpointed", "micro-batches"])
def test_05_memory_is_the_plans(check: Check, tmp_path: Path, kind: str, images: int) -> None:
    precision = {"precision": "bf16", "qk_norm": True} if kind == "bf16" else {}
    micro, checkpointed = (images // 2 if kind == "micro-batches" else None), kind == "checkpointed"
    run = run_of(XL, batch_size=images, **precision)
    planned = budget(run, run_config(run, SHAPE, CLASSES), 1, micro, checkpointed).peak_bytes  # without margins
    free = torch.cuda.mem_get_info()[0]
    if planned > 0.95 * free:
        pytest.skip(f"needs {planned / 1e9:.0f} GB of free memory, found {free / 1e9:.0f}")
    engine = Engine(checkpoint_activations=checkpointed)
    updated(trainer_of(tmp_path, run, engine, micro_batch=micro), 3)
    peak = torch.cuda.max_memory_allocated()
    found = f"{peak / 1e9:.1f} GB, planned {planned / 1e9:.1f}"
    check(found, "within 5 %", abs(peak / planned - 1) < 0.05)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_06_speed_is_that_of_the_cards_parts(check: Check, tmp_path: Path, precision: str, compiled: bool) -> None:
    bf16 = precision == "bf16"
    for images in (32, 16, 8, 4):
        changes = {"precision": "bf16", "qk_norm": True} if bf16 else {}
        run = run_of(XL, batch_size=images, **changes)
        config = run_config(run, SHAPE, CLASSES)
        needs = budget(run, config)
        if needs.memory_bytes < 0.95 * torch.cuda.mem_get_info()[0]:
            break
    else:
        pytest.skip("needs memory for 4 images of XL/2")
    trainer = updated(trainer_of(tmp_path, run, Engine(compile=compiled)), 3)
    rates.wait()
    started = time.perf_counter()
    updated(trainer, 10)
    rates.wait()
    seconds, work = (time.perf_counter() - started) / 10, measure(run, config, *largest_part(run, 1))
    bound = rates.bound_seconds(work, XL, images, bf16, sum(needs.parameters.values()))
    share = bound / seconds
    found = (
        f"{1 / seconds:.2f} updates/s of {images}, {work.flops / seconds / 1e12:.0f} TFLOP/s, {share:.0%} of its parts"
    )
    check(found, "at least 60 % of the card's own rates", share >= 0.6)


@pytest.mark.parametrize("form", ["one step", "several steps", "guided"])
def test_07_captured_updates_equal_eager_ones(check: Check, tmp_path: Path, form: str) -> None:
    """Updates as CUDA graphs, across a change of phase, the learning rate halved within each by a callback."""
    exact = form != "guided"  # the backward pass of its translations copies from the host if it is deterministic
    torch.use_deterministic_algorithms(exact, warn_only=True)
    run = run_of(form=form, batch_size=BATCH)
    ends, transport = (8 * BATCH / IMAGES, 1.0), run.transport.model_copy(update={"decay_epochs": 16 * BATCH / IMAGES})
    phases = [run.phases[0].model_copy(update={"until_epoch": end, "lr": 2.0**-13}) for end in ends]  # exact in float32
    run = run.model_copy(update={"phases": phases, "transport": transport})
    eager, captured = (trainer_of(tmp_path / str(each), run, Engine(capture=each)) for each in (False, True))
    for trainer in (eager, captured):
        trainer.callbacks.append(Halved(trainer))
    rows = [sum(trainer.update(trainer.draw()) for _ in range(16)) for trainer in (eager, captured)]
    captured.learner.require_finite()
    torch.use_deterministic_algorithms(False)
    apart = distance(weights(captured.state), weights(eager.state))
    terms = float(((rows[1] - rows[0]).abs() / rows[0].abs().clamp(min=1e-3)).max())
    limit = 1e-5 if exact else 1e-3
    found = f"weights {apart:.1e} apart after 16 updates, terms {terms:.1e}"
    check(found, f"weights within {limit:.0e}, terms within 1e-2", apart < limit and terms < 1e-2)


@pytest.mark.on_cpu
def test_08_a_group_of_one_has_the_same_bits_and_sends_early(
    check: Check, tmp_path: Path, group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    run, events = run_of(batch_size=BATCH), list[str]()
    send = learning._sum_gradients

    @functools.wraps(send)
    def noted(state: object, bucket: Any) -> Any:
        events.append("send")
        return send(state, bucket)

    monkeypatch.setattr(learning, "_sum_gradients", noted)
    alone, forced = trainer_of(tmp_path / "alone", run), trainer_of(tmp_path / "forced", run, group=group)
    parameters = [p for p in forced.state.networks["discriminator"].parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    updated(alone, 1), updated(forced, 1)
    events.clear()
    updated(alone, 1), updated(forced, 1)
    torch.use_deterministic_algorithms(False)
    before, equal = events.index("send"), same_weights(alone.state, forced.state)
    found = f"{'the same' if equal else 'other'} bits, {before} of {len(parameters)} gradients before the first send"
    small = SIZES["wide"].depth < 4 or ON_CPU  # two blocks fit one bucket on a CPU
    check(found, "the same bits, first send in the first quarter", equal and (small or before <= len(parameters) / 4))


@pytest.mark.on_cpu
@pytest.mark.parametrize("deterministic", [True, False])
def test_09_a_killed_run_resumes(check: Check, tmp_path: Path, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    phase = run_of().phases[0].model_copy(update={"until_epoch": 40 * BATCH / 4096 if not ON_CPU else 40 * BATCH / 512})
    run = run_of(batch_size=BATCH).model_copy(update={"phases": [phase], "keep_discriminators": (), "selection": None})
    whole = train(trainer_of(tmp_path / "whole", run, checkpoint_seconds=1e9))
    killed = trainer_of(tmp_path / "killed", run, checkpoint_seconds=0.0)
    with pytest.raises(InterruptedError):
        train(killed, stop_at=20)
    resumed = trainer_of(tmp_path / "killed", run, checkpoint_seconds=1e9)
    load_latest(resumed.store.checkpoints, resumed.state, "check")  # over the weights that inputs changed
    at = resumed.state.update
    state = train(resumed)
    torch.use_deterministic_algorithms(False)
    drift = distance(weights(state), weights(whole))
    rule = "equal bits with deterministic algorithms" if deterministic else "none: drift without them is reported"
    passed = at > 0 and (same_weights(state, whole) or not deterministic)
    check(f"resumed at update {at} of 40, weights {drift:.1e} apart", rule, passed)


@pytest.mark.on_cpu
def test_10_samples_do_not_depend_on_the_others(check: Check, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, run_of(batch_size=BATCH))
    sampler = trainer.objective.sampler(trainer.state.networks["generator"])
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(12, *SHAPE, generator=generator).to(CARD), torch.arange(12, device=CARD) % CLASSES
    with torch.no_grad():
        one = sampler.sample(z[:8], labels[:8])
        other = sampler.sample(torch.cat([z[:4], z[8:]]), torch.cat([labels[:4], labels[8:]]))
    apart = float((one[:4] - other[:4]).abs().max())
    check(f"largest difference {apart:.1e}", "0", apart == 0 and float(one.abs().max()) > 0)


def test_11_an_autoencoder_of_sd_vaes_shape(check: Check) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    shape = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    vae = diffusers.AutoencoderKL(**kinds, **shape).to(CARD).eval()
    images = torch.rand(16, 3, 256, 256, device=CARD) * 2 - 1

    @torch.no_grad()
    def encode(bf16: bool = True) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            return vae.encode(images).latent_dist.mean

    @torch.no_grad()
    def decode() -> Tensor:
        return vae.decode(latents).sample

    latents = encode(False)
    apart = float((encode().float() - latents).norm() / latents.norm())
    encoded, decoded = (len(images) / rates.seconds_of(work, 3) for work in (encode, decode))
    found = f"bf16 {apart:.3f} from fp32, {encoded:.0f} images/s encoded in bf16, {decoded:.0f} decoded in fp32"
    check(found, "bf16 within 0.05, finite", apart < 0.05 and bool(decode().isfinite().all()))


@pytest.mark.on_cpu
def test_12_a_sharded_checkpoint_reloads(check: Check, tmp_path: Path, group: ProcessGroup) -> None:
    run = run_of(batch_size=BATCH)
    sharded = updated(trainer_of(tmp_path, run, Engine(shard=True), group), 2)
    assert sharded.state.is_sharded
    save_checkpoint(sharded.store.checkpoints, sharded.state, "check")
    whole = trainer_of(tmp_path / "other", run)
    load_latest(sharded.store.checkpoints, whole.state, "check")
    sharded.state.gather(sharded.objective)
    expected = {name: tensor.cpu() for name, tensor in sharded.state.ema.state_dict().items()}
    found = {name: tensor.cpu() for name, tensor in whole.state.ema.state_dict().items()}
    equal = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    check(f"update {whole.state.update}, {'equal' if equal else 'other'} weights", "update 2, equal weights", equal)
