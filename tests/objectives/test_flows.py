"""Flow matching and continuous adversarial flows: paths, order of updates, derivatives, samples, and what they cost."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS
from afm_pipe.models.dit import PatchEmbed
from afm_pipe.models.exports import export
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import load_generator, run_config
from afm_pipe.models.path_discriminator import PathDiscriminator
from afm_pipe.models.released import import_generator
from afm_pipe.models.sit import to_sit
from afm_pipe.models.velocity import VelocityFlow, VelocityNetwork
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import Hyperparameters, Objective
from afm_pipe.objectives.continuous_adversarial_flow import is_discriminator_turn
from afm_pipe.objectives.flow_matching import PathBatches
from afm_pipe.params import Imported, Run, deep_merge
from afm_pipe.params.file import load_params
from afm_pipe.params.flow import OdeSampling
from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.counting import measure
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.signals import Stopped
from afm_pipe.training.checkpoints import RetentionPolicy
from afm_pipe.training.engine import Engine
from afm_pipe.training.state import Start, TrainingState
from afm_pipe.training.trainer import Runtime, Task, Trainer
from tests.conftest import SMOKE
from tests.objectives.pinned import ADVERSARIAL, FLOW, RUN, MemoryLatents

CPU = torch.device("cpu")
MATCHING: dict[str, Any] = {"objective": "flow_matching", "flow": FLOW}
CONTINUOUS: dict[str, Any] = ADVERSARIAL | {"flow": FLOW, "transport": 0.1}
BOTH = pytest.mark.parametrize("settings", [MATCHING, CONTINUOUS], ids=["flow_matching", "continuous"])


def run_of(settings: dict[str, Any]) -> Run:
    complete = load_params(SMOKE).train.model_dump(mode="json")
    return Run.model_validate(deep_merge(deep_merge(complete, RUN), settings))


def objective_of(settings: dict[str, Any]) -> Objective:
    run = run_of(settings)
    return build_objective(run, run_config(run, MemoryLatents.latent_shape, MemoryLatents.num_classes))


def train(objective: Objective, folder: Path, start: Start | None = None, **runtime: Any) -> TrainingState:
    task = Task(objective, cast(Latents, MemoryLatents()), "flows", start)
    training = Trainer(task, Runtime(folder, **{"checkpoint_seconds": 1e9, **runtime})).train()
    while True:
        try:
            next(training)
        except StopIteration as end:
            return end.value.state


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_points_lie_on_paths_and_labels_are_dropped() -> None:
    run = run_of(MATCHING | {"batch_size": 60, "flow": FLOW | {"times": "logit_normal"}})
    (path,) = PathBatches(cast(Latents, MemoryLatents()), run, CPU, SINGLE_PROCESS, None).draw(
        0, Hyperparameters({}, {})
    )
    data = path.x - path.t[:, None, None, None] * path.velocity  # x_t - t (z - x)
    assert data.square().mean().item() == pytest.approx(MemoryLatents().x.square().mean().item() + 0.01, rel=0.1)
    assert 0.1 < (path.labels == MemoryLatents.num_classes).float().mean() < 0.4  # of 0.25
    assert path.t.logit().std().item() == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 2), (5, 2), (10, 16)])
def test_turns_are_those_of_the_released_trainer(warmup: int, steps: int) -> None:
    turns = [is_discriminator_turn(k, warmup, steps) for k in range(60)]
    assert all(turns[: warmup + 1])
    assert [k for k, turn in enumerate(turns) if not turn] == [
        k for k in range(60) if k > warmup and k % (1 + steps) == steps
    ]


def test_derivatives_along_velocities_are_those_of_finite_differences(float64: None) -> None:
    torch.manual_seed(0)
    network = PathDiscriminator(SIZES["s4"], 4, 8, 6, qk_norm=True)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x, velocities, t = torch.randn(3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8), torch.rand(3)
    labels, step = torch.tensor([0, 3, 5]), 1e-5
    with torch.no_grad():
        potential, slopes = network(x, labels, t, velocities)
        for velocity, slope in zip(velocities, slopes, strict=True):
            after, before = (
                network(x + sign * step * velocity, labels, t + sign * step, velocities)[0] for sign in (1, -1)
            )
            assert torch.allclose((after - before) / (2 * step), slope, rtol=1e-6, atol=1e-9)
    assert potential.shape == (3,)
    assert slopes.std() > 0.01


class Growth(torch.nn.Module):
    """v(x, t, label) = x, or x + 1 without a label, which counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.y_embedder = torch.nn.Module()
        self.y_embedder.embedding_table = torch.nn.Embedding(6, 1)

    def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        self.passes += 1
        return x + (labels == 5).double()[:, None, None, None]


def ode(**changes: Any) -> OdeSampling:
    plain = {"solver": "euler", "steps": 8, "guidance_scale": 1.0, "guidance_interval": (0.0, 1.0)}
    return OdeSampling.model_validate(plain | changes)


@pytest.mark.parametrize(
    ("sampling", "passes"),
    [
        (ode(), 8),
        (ode(solver="heun"), 16),
        (ode(guidance_scale=1.5), 16),
        (ode(solver="heun", guidance_scale=0.0), 32),
        (ode(guidance_scale=1.5, guidance_interval=(0.2, 0.6)), 8 + 3),  # at 0.5, 0.375 and 0.25
        (ode(solver="heun", steps=2, guidance_scale=1.5, guidance_interval=(0.0, 0.5)), 4 + 3),  # at 0.5, 0.5 and 0
    ],
)
def test_nfe_is_the_number_of_passes(sampling: OdeSampling, passes: int) -> None:
    network = Growth()
    flow = VelocityFlow(cast(VelocityNetwork, network), sampling)
    flow.sample(torch.ones(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64))
    assert network.passes == passes == flow.nfe


def test_solvers_converge_to_the_solution_in_their_orders() -> None:
    z, labels = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    solution = torch.tensor(-1.0, dtype=torch.float64).exp()  # dx/dt = x from x(1) = 1 to t = 0
    for solver, order in (("euler", 1), ("heun", 2)):
        flow = VelocityFlow(cast(VelocityNetwork, Growth()), ode(solver=solver))
        errors = [(flow.sample(z, labels, steps) - solution).abs().item() for steps in (16, 32)]
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_guidance_moves_away_from_the_velocity_without_a_label() -> None:
    z, labels = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    flow = VelocityFlow(cast(VelocityNetwork, Growth()), ode(steps=1, guidance_scale=3.0))
    assert flow.sample(z, labels).item() == pytest.approx(2.0)  # 0 - (1 + 3 (0 - 1))


@BOTH
def test_micro_batches_and_checkpointing_add_up_to_the_whole(
    settings: dict[str, Any], tmp_path: Path, float64: None
) -> None:
    whole = train(objective_of(settings), tmp_path / "whole")
    engine = Engine(checkpoint_activations=True)
    parts = train(objective_of(settings), tmp_path / "parts", micro_batch=3, engine=engine)
    assert parts.rows[-1] == pytest.approx(whole.rows[-1], rel=1e-8)
    for name, tensor in whole.ema.state_dict().items():
        assert torch.allclose(tensor, parts.ema.state_dict()[name], rtol=1e-8, atol=1e-12), name


@BOTH
def test_killed_runs_resume_to_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings | {"phases": [{"until_epoch": 1.5}]}  # 12 updates
    whole = train(objective_of(settings), tmp_path / "whole")
    task = Task(objective_of(settings), cast(Latents, MemoryLatents()), "flows")
    here = RetentionPolicy(in_background=False)  # an interrupt cancels a checkpoint that a thread writes
    runtime = Runtime(tmp_path / "killed", checkpoint_seconds=0.0, retention=here)
    ticks = Trainer(task, runtime).train()
    while next(ticks).done < 10:
        pass
    with pytest.raises(Stopped):
        ticks.throw(Stopped(15))
    resumed = Trainer(task, runtime)
    assert 0 < resumed.state.update < whole.update
    state = train(objective_of(settings), tmp_path / "killed")
    for part, module in whole.modules.items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state.modules[part].state_dict()[name]), name


@BOTH
def test_bf16_trains_near_float32(settings: dict[str, Any], tmp_path: Path) -> None:
    exact = train(objective_of(settings), tmp_path / "fp32").rows[-1]
    low = train(objective_of(settings | {"precision": "bf16"}), tmp_path / "bf16").rows[-1]
    terms = [name for name in exact if name in ("velocity_error", "d_adversarial")]
    assert {name: low[name] for name in terms} == pytest.approx({name: exact[name] for name in terms}, rel=0.05)
    assert low != exact


def test_moving_average_follows_steps_of_g_only(tmp_path: Path) -> None:
    # Updates 0 to 2 are of D, 3 of G.
    states = {}
    for end in (3, 4):
        states[end] = train(objective_of(CONTINUOUS | {"phases": [{"until_epoch": end / 8}]}), tmp_path / str(end))
    before, after = (states[end].ema.state_dict()["final_layer.linear.bias"] for end in (3, 4))
    assert before.count_nonzero() == 0  # initial weights
    assert after.count_nonzero() > 0
    assert states[3].rows[-1]["g_adversarial"] == 0 < states[4].rows[-1]["g_adversarial"]


def test_a_continued_run_begins_with_the_weights_of_flow_matching() -> None:
    base = objective_of(MATCHING).build_networks()["generator"].state_dict()
    weights = objective_of(CONTINUOUS).continued({"generator": base})
    d = weights["discriminator"]
    shared = [name for name in d if name in base]
    assert len(shared) == len(d) - 2  # the token and the head
    assert all(torch.equal(d[name], base[name]) for name in shared)
    known = {"generator": base, "discriminator": {"x": torch.zeros(1)}}
    assert objective_of(CONTINUOUS).continued(known) is known


def test_units_are_three_for_flow_matching_and_more_for_an_adversary() -> None:
    costs = {}
    for settings in (MATCHING, CONTINUOUS, CONTINUOUS | {"discriminator_updates": 16}):
        objective = objective_of(settings)
        run = cast(Run, objective.settings)
        costs[str(settings)] = measure(run, objective.config, 8).units  # type: ignore[attr-defined]
    matching, equal, more = costs.values()
    assert matching == pytest.approx(3, rel=0.05)
    # A step of D: G once; D and its two derivatives forward (3) and backward (6). A step of G: 1 + 2, and 2 + 2 of D.
    # D has one token more than G's four.
    assert equal == pytest.approx((1 + 9 * 5 / 4 + 3 + 4 * 5 / 4) / 2, rel=0.1)
    assert equal < more


def test_settings_that_an_objective_would_ignore_are_refused() -> None:
    for change, match in (
        ({"flow": None}, "expected a section `flow`"),
        ({"label_noise": 0.5}, "expected label_noise 0.0"),
        ({"phases": [{"until_epoch": 1, "guidance": {"scale": 1.0, "t": [0.0, 0.1]}}]}, "guidance_scale"),
        ({"flow": FLOW | {"label_dropout": 0.0}}, "expected label_dropout above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            run_of(MATCHING | change)


@pytest.fixture
def sit() -> dict[str, Tensor]:
    """Weights with SiT's tensors at a small size: 11 labels, twice the outputs."""
    random = torch.Generator().manual_seed(0)
    fresh = to_sit(VelocityNetwork(SIZES["t4"], 4, 8, 11).state_dict())
    return {
        name: tensor if name == "pos_embed" else 0.1 * torch.randn(tensor.shape, generator=random)
        for name, tensor in fresh.items()
    }


def sit_velocity(weights: dict[str, Tensor], x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    """Return SiT's output with SiT's conventions, by this package's blocks: the first half of channels, time as is."""
    network = Generator(SIZES["t4"], 8, 8, 11, times="source")
    network.x_embedder = PatchEmbed(4, SIZES["t4"])
    network.t_embedder.forward = lambda t: network.t_embedder.mlp(official_code(t))  # type: ignore[method-assign]
    network.load_state_dict(weights)
    with torch.no_grad():
        return network(x, labels, t)[:, :4]


def official_code(t: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def test_sit_weights_are_recognized_and_sampled_as_sit_does(sit: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"ema": sit}, tmp_path / "sit.pt")
    config = import_generator(Imported(file=str(tmp_path / "sit.pt")), tmp_path / "model")
    assert (config.num_classes, config.nfe, config.size) == (10, 250, "t4")
    flow = load_generator(tmp_path / "model", CPU)
    x, labels, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 9, 10]), torch.tensor([0.1, 0.5, 0.9])
    # SiT's time runs from noise to data, and its output is the velocity in that direction.
    expected = -sit_velocity(sit, x, labels, 1 - t)
    assert expected.std() > 0.1
    with torch.no_grad():
        assert torch.allclose(flow.network(x, labels, t), expected, atol=1e-5)


def test_sit_weights_are_exported_as_they_came(sit: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(sit, tmp_path / "sit.pt")
    sampling = ode(solver="heun", steps=3, guidance_scale=1.5)
    import_generator(Imported(file=str(tmp_path / "sit.pt"), sampling=sampling), tmp_path / "model")
    export(tmp_path / "model", tmp_path, "released", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == sit.keys()
    for name, tensor in sit.items():
        half = tensor.unflatten(0, (4, 4, 2, 4))[:, :, 0] if name.startswith("final_layer.linear") else tensor
        found = back[name].unflatten(0, (4, 4, 2, 4)) if name.startswith("final_layer.linear") else back[name]
        if name.startswith("final_layer.linear"):
            assert not found[:, :, 1].any()
            found = found[:, :, 0]
        assert torch.equal(found, half), name
    export(tmp_path / "model", tmp_path, "safetensors", tmp_path / "back.safetensors")
    again = import_generator(Imported(file=str(tmp_path / "back.safetensors")), tmp_path / "again")
    assert again.nfe == 12
    with pytest.raises(UserError, match="velocity of an ODE"):
        export(tmp_path / "model", tmp_path, "diffusers", tmp_path / "folder")
