"""An objective defined here alone is trained, resumed, monitored, counted and shown by what production runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.flow import Flow
from afm_pipe.models.model_files import ModelConfig, build_generator, run_config
from afm_pipe.objectives import _registered, build_objective, register
from afm_pipe.objectives.base import Hyperparameters, Learner, Objective, Term, num_micro_batches
from afm_pipe.objectives.schedules import num_updates
from afm_pipe.params import Params, Run
from afm_pipe.params.objectives import OBJECTIVES
from afm_pipe.planning.counting import count_update
from afm_pipe.reporting.curves import draw_panels
from afm_pipe.reporting.inputs import RunRecord, columns_of
from afm_pipe.runtime.signals import Stopped
from afm_pipe.training.curves import scan_curves
from afm_pipe.training.trainer import Runtime, Task, Trainer


class Pairs(NamedTuple):
    """Noise, data and labels of a micro-batch."""

    z: Tensor
    x: Tensor
    labels: Tensor
    share: float


class PairBatches:
    """Draws pairs of noise and data."""

    def __init__(self, latents: Latents, run: Run, group: ProcessGroup, micro_batch: int | None) -> None:
        self.latents, self.run, self.shard = latents, run, group.shard
        self.parts = num_micro_batches(run.batch_size, group.world_size, micro_batch)
        self.order = Order(latents.num_images, run.seed, "pairs")

    def draw(self, update: int, hyperparameters: Hyperparameters) -> list[Pairs]:
        count, generator = self.run.batch_size, stream_generator(self.run.seed, "pairs", update)
        indices = self.order.indices(update * count, count)
        x = self.latents.draw(indices, generator, self.shard)
        z = torch.randn(count, *self.latents.latent_shape, generator=generator)[self.shard]
        labels = torch.as_tensor(self.latents.labels)[indices][self.shard]
        parts = [slice(part, None, self.parts) for part in range(self.parts)]
        return [Pairs(z[at], x[at], labels[at], len(labels[at]) / count) for at in parts]


class SquaredError(Objective):
    """Squared error of G's output to data: one network, one term."""

    name = "squared_error"
    terms = (Term("squared_error", "Squared error", "To the data, log scale", log=True),)
    sampled = "generator"

    def __init__(self, run: Run, config: ModelConfig, classifier: nn.Module | None = None) -> None:
        self.run, self.settings, self.config = run, run, config

    def build_networks(self) -> dict[str, nn.Module]:
        return {"generator": build_generator(self.config)}

    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(network.parameters(), lr=self.run.lr)

    def num_updates(self, num_images: int) -> int:
        return num_updates(self.run, num_images)

    def hyperparameters(self, update: int, num_images: int, clock: float | None = None) -> Hyperparameters:
        return Hyperparameters({"generator": self.run.lr}, {})

    def batches(
        self,
        latents: Latents,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> PairBatches:
        return PairBatches(latents, self.run, group, micro_batch)

    def update(self, learner: Learner, batch: Sequence[Pairs], hyperparameters: Hyperparameters) -> Tensor:
        losses = []
        for index, part in enumerate(batch):
            with learner.accumulate("generator", index == len(batch) - 1):
                loss = part.share * (learner.module("generator")(part.z, part.labels) - part.x).square().mean()
                loss.backward()
            losses.append(loss.detach()[None])
        figures = learner.sum(losses)
        learner.step("generator", figures[0], hyperparameters)
        return figures

    def sampler(self, network: nn.Module) -> Flow:
        return Flow(network, "direct", 1)  # type: ignore[arg-type]

    def example_batch(self, count: int, penalized: int | None = None) -> list[Pairs]:
        latents = torch.empty(count, *self.config.latent_shape)
        return [Pairs(latents, torch.empty_like(latents), torch.zeros(count, dtype=torch.int64), 1.0)]

    def example_forward(self, networks: Mapping[str, nn.Module], count: int) -> Tensor:
        (batch,) = self.example_batch(count)
        return networks["generator"](batch.z, batch.labels)

    def describe(self) -> dict[str, Any]:
        return self.config.model_dump()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(OBJECTIVES, SquaredError.name, __name__)
    register(SquaredError)
    yield
    del _registered[SquaredError.name]


@pytest.fixture
def latents(discs: Path) -> Latents:
    return Latents.open(discs / "data" / "latents.h5")


@pytest.fixture
def objective(discs_params: Params, latents: Latents) -> Objective:
    run = discs_params.runs["t4"].model_copy(update={"objective": SquaredError.name})
    return build_objective(run, run_config(run, latents.latent_shape, len(latents.classes)))


def trained(trainer: Trainer, stop_at: int | None = None) -> Any:
    ticks = trainer.train()
    while True:
        try:
            tick = next(ticks)
        except StopIteration as end:
            return end.value
        if stop_at is not None and tick.done >= stop_at:
            ticks.throw(Stopped(15))


def test_toy_objective_trains_and_its_term_falls(objective: Objective, latents: Latents, tmp_path: Path) -> None:
    state = trained(Trainer(Task(objective, latents, "toy"), Runtime(tmp_path))).state
    assert state.update == objective.num_updates(latents.num_images)
    losses = [row["squared_error"] for row in state.rows]
    assert losses[-1] < losses[0]
    assert list(state.networks) == ["generator"]


def test_toy_objective_resumes_to_the_same_bits(objective: Objective, latents: Latents, tmp_path: Path) -> None:
    whole = trained(Trainer(Task(objective, latents, "toy"), Runtime(tmp_path / "whole"))).state
    runtime = Runtime(tmp_path / "killed", checkpoint_seconds=0.0)
    with pytest.raises(Stopped):
        trained(Trainer(Task(objective, latents, "toy"), runtime), stop_at=20)
    resumed = Trainer(Task(objective, latents, "toy"), runtime)
    assert 0 < resumed.state.update < whole.update
    state = trained(resumed).state
    for name, tensor in whole.ema.state_dict().items():
        assert torch.equal(tensor, state.ema.state_dict()[name])


def test_terms_of_the_toy_are_columns_of_the_curves_and_panels_of_the_report(
    objective: Objective, latents: Latents, tmp_path: Path
) -> None:
    trained(Trainer(Task(objective, latents, "toy"), Runtime(tmp_path)))
    rows, _ = scan_curves(tmp_path / "curves.csv")
    assert tuple(rows[0]) == ("update", "images", "epoch", "lr", "squared_error")
    run = RunRecord("toy", objective.settings, columns_of(rows))  # type: ignore[arg-type]
    (panel,) = (each for each in draw_panels([run], latents.num_images) if each.caption == "To the data, log scale")
    assert "Squared error over images seen by the generator: toy ends at" in panel.svg


def test_monitor_probes_the_toy_and_rules_without_their_terms_are_silent(
    discs_params: Params, latents: Latents, tmp_path: Path
) -> None:
    base = discs_params.runs["t4"]
    monitor = base.monitor.model_copy(update={"settle_epochs": 0.0})
    run = base.model_copy(update={"objective": SquaredError.name, "monitor": monitor})
    toy = build_objective(run, run_config(run, latents.latent_shape, len(latents.classes)))
    state = trained(Trainer(Task(toy, latents, "toy"), Runtime(tmp_path))).state
    memory = state.extra["monitor"]
    assert len(memory["probes"]) > 0
    assert not {event["kind"] for event in memory["events"]} & {"identity", "stagnation"}


def test_micro_batches_add_up_to_the_whole_batch(objective: Objective, latents: Latents, tmp_path: Path) -> None:
    whole = trained(Trainer(Task(objective, latents, "toy"), Runtime(tmp_path / "whole"))).state
    parts = trained(Trainer(Task(objective, latents, "toy"), Runtime(tmp_path / "parts", micro_batch=3))).state
    assert parts.rows[0]["squared_error"] == pytest.approx(whole.rows[0]["squared_error"], rel=1e-4)


def test_counting_runs_the_toys_own_update(objective: Objective) -> None:
    with torch.device("meta"):
        (step,) = count_update(objective, objective.example_batch(4))
    assert step.network == "generator"
    assert step.backward_flops == pytest.approx(2 * step.forward_flops, rel=0.1)
