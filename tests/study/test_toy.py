"""The 1-D toy experiment: its closed forms, small trainings, files, and section of the report."""

import csv
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.objectives.adversarial_flow.losses import gradient_penalty, logit_centering, perturb, relativistic
from afm_pipe.params import Guidance, Params, Toy
from afm_pipe.params.file import load_params
from afm_pipe.params.toy import StrongDiscriminator
from afm_pipe.reporting import titles
from afm_pipe.reporting.one_dimension import read_one_dimension
from afm_pipe.reporting.printing import csv_text
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import finish
from afm_pipe.study.toy import mixture, training
from afm_pipe.study.toy.experiment import (
    Experiment,
    measure,
    measure_map,
    run_experiment,
    toy_settings,
)
from afm_pipe.study.toy.networks import EMBEDDING, Map, Mlps, transport
from afm_pipe.study.toy.results import StrongResults
from afm_pipe.study.toy.strong import run_strong, strong_claims
from afm_pipe.study.toy.training import Batch, Setting, train_adversarially, train_flow
from afm_pipe.study.toy.writing import write_experiment
from tests.conftest import ROOT, SMOKE

CPU = torch.device("cpu")
FILES = {"results.json", "metrics.json", "maps.csv", "guidance.csv", "maps.png", "sweep.png", "guidance.png"}


@pytest.fixture(scope="module")
def toy(smoke_params: Params) -> Toy:
    return smoke_params.toy


@pytest.fixture(scope="module")
def quick(toy: Toy) -> Toy:
    """Small, but enough to see what a setting does."""
    return toy.model_copy(update={"width": 32, "batch_size": 128, "lr": 2.0e-3})


@pytest.fixture(scope="module")
def experiment(toy: Toy) -> Experiment:
    return finish(run_experiment(toy, 0, CPU))


def mapped(setting: Setting, toy: Toy) -> tuple[Tensor, Tensor]:
    """Train; return the noise (K,) and the maps of it (S, K)."""
    noise = mixture.noise_grid(256)
    start = noise.float().expand(toy.seeds, -1)
    flow = finish(train_adversarially(setting, toy, 0, CPU)).average
    return noise, transport(flow, start, setting.steps, torch.zeros_like(start, dtype=torch.long)).double()


def test_optimal_map_takes_noise_to_the_data_without_crossings() -> None:
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort().values
    x = mixture.optimal_map(z)
    torch.testing.assert_close(mixture.cdf(x), torch.special.ndtr(z), rtol=0, atol=1e-12)
    assert (x.diff() >= 0).all()
    drawn, labels = mixture.draw((20_000,), torch.Generator().manual_seed(1))
    assert (x - drawn.double().sort().values).abs().mean() < 0.03
    assert labels.bincount().tolist() == pytest.approx([5000] * 4, rel=0.05)


def test_wasserstein_distance_of_known_sets() -> None:
    best = mixture.optimal_map(mixture.noise_grid(1000))
    shuffled = best[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    sets = torch.stack([shuffled, shuffled + 0.3, torch.zeros(1000, dtype=torch.float64)])
    torch.testing.assert_close(
        mixture.wasserstein(sets), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_measures_of_known_maps() -> None:
    z = mixture.noise_grid(500)
    best = mixture.optimal_map(z)
    numbers = measure_map(torch.stack([best, best + 0.2, best - 0.2]), z, best)
    assert numbers["rms_mean"] == pytest.approx(0.4 / 3)
    assert numbers["spread_mean"] == pytest.approx((0.2 + 2 * (0.5 * (0.2**2 + 0.4**2)) ** 0.5) / 3)
    assert measure_map(z.expand(3, -1), z, best)["move_mean"] == 0


def test_exact_flow_maps_noise_to_its_class_and_guidance_moves_outer_classes_outward() -> None:
    z, labels = mixture.noise_grid(64).repeat(4), torch.arange(4).repeat_interleave(64)
    means = torch.tensor(mixture.MEANS, dtype=torch.float64)[labels]
    torch.testing.assert_close(mixture.guided_flow(z, labels, 1.0), means + mixture.STD * z, rtol=0, atol=2e-3)
    guided = mixture.guided_flow(z, labels, 3.0, steps=200).view(4, 64)
    assert guided[3].mean() > 1.53
    assert guided[0].mean() < -1.53
    assert guided.std(1).max() < mixture.STD


def test_velocity_of_a_class_at_the_noise_is_the_offset_from_its_mean() -> None:
    z, labels = torch.linspace(-2, 2, 9, dtype=torch.float64), torch.full((9,), 2)
    torch.testing.assert_close(mixture.velocity(z, torch.ones_like(z), labels), z - 0.5)


def test_classifier_is_certain_on_data_and_uniform_on_noise() -> None:
    x = torch.tensor(mixture.MEANS, dtype=torch.float64, requires_grad=True)
    at_data = mixture.log_posterior(x, torch.zeros(4, dtype=torch.float64))
    assert at_data.diagonal().exp().min() > 1 - 1e-12
    (gradient,) = torch.autograd.grad(at_data.diagonal().sum(), x)
    assert gradient.abs().max() < 1e-6  # plain guidance has no effect
    halfway = mixture.log_posterior(x, torch.full((4,), 0.5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(halfway.diagonal().sum(), x)
    assert gradient[3] > 0.1 > -0.1 > gradient[0]
    torch.testing.assert_close(
        mixture.log_posterior(x, torch.ones(4, dtype=torch.float64)).exp(), torch.full((4, 4), 0.25).double()
    )


def test_untrained_residual_form_keeps_what_direct_form_replaces() -> None:
    networks = [Mlps(2, EMBEDDING * numbers, 8, torch.Generator()) for numbers in (1, 3)]
    for network in networks:
        for parameter in network.parameters():
            torch.nn.init.zeros_(parameter)
    z, labels = torch.randn(2, 5), torch.zeros(2, 5, dtype=torch.long)
    assert torch.equal(transport(Map(networks[0], 1, False), z, 1, labels), torch.zeros(2, 5))
    assert torch.equal(transport(Map(networks[1], 4, False), z, 4, labels), z)


def test_loss_of_all_seeds_is_the_sum_of_the_pipelines_losses(toy: Toy) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (toy.seeds, toy.batch_size)
    g = Map(Mlps(toy.seeds, EMBEDDING * 3, 8, generator), 4, False)
    critic = Mlps(toy.seeds, EMBEDDING * 2, 8, generator)
    batch = next(training._batches(4, toy, generator, CPU))
    noise = torch.randn(2, toy.seeds, 16, generator=generator)
    total = training._discriminator_loss(g, critic, batch, noise, toy)
    fake = g(batch.source, batch.s, batch.t, batch.labels)
    epsilon, expected = toy.penalty.epsilon, torch.zeros(())
    judged = {
        "real": training._judge(g, critic, batch.target, batch.t, batch.labels),
        "fake": training._judge(g, critic, fake, batch.t, batch.labels),
        "real_moved": training._judge(
            g, critic, perturb(batch.target[:, :16], noise[0], epsilon), batch.t[:, :16], batch.labels
        ),
        "fake_moved": training._judge(
            g, critic, perturb(fake[:, :16], noise[1], epsilon), batch.t[:, :16], batch.labels
        ),
    }
    for seed in range(toy.seeds):
        real, fake, real_moved, fake_moved = (value[seed] for value in judged.values())
        w = torch.full((16,), 0.25)
        penalty = gradient_penalty(real[:16], real_moved, epsilon, w) + gradient_penalty(
            fake[:16], fake_moved, epsilon, w
        )
        expected = expected + relativistic(real, fake) + toy.penalty.weight * penalty
        expected = expected + toy.logit_centering * logit_centering(real, fake)
    assert batch.source.shape == shape
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=0)


def test_source_and_target_lie_one_step_apart_on_one_line(toy: Toy) -> None:
    batch: Batch = next(training._batches(4, toy, torch.Generator().manual_seed(0), CPU))
    torch.testing.assert_close(batch.s - batch.t, torch.full_like(batch.s, 0.25))
    assert set(batch.s.unique().tolist()) == {0.25, 0.5, 0.75, 1.0}
    arrived = batch.t == 0
    off = batch.target[arrived] - torch.tensor(mixture.MEANS)[batch.labels[arrived]]
    assert off.abs().max() < 6 * mixture.STD


def test_training_moves_samples_to_the_data(quick: Toy) -> None:
    before = mixture.wasserstein(mapped(Setting(1, 0.05, 1), quick)[1])
    after = mixture.wasserstein(mapped(Setting(1, 0.05, 250), quick)[1])
    assert after.max() < 0.35 < 0.5 < before.min()


def test_a_large_transport_weight_gives_the_identity_and_zero_does_not(quick: Toy) -> None:
    z, x = mapped(Setting(1, 5.0, 200), quick)
    assert (x - z).square().mean().sqrt() < 0.2
    z, x = mapped(Setting(1, 0.0, 200), quick)
    assert (x - z).square().mean(1).sqrt().max() > 0.5


def test_flow_matching_needs_its_steps(quick: Toy) -> None:
    flow = finish(train_flow(quick.model_copy(update={"flow_updates": 400}), 0, CPU))
    start = mixture.noise_grid(256).float().expand(quick.seeds, -1)
    one, many = (mixture.wasserstein(transport(flow, start, steps, torch.zeros(0))) for steps in (1, 32))
    assert many.max() < 0.5 * one.min()


class OnTheMeans(Map):
    """A generator whose samples are the class means."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.tensor(mixture.MEANS)[labels] + 0 * super().forward(x, s, t, labels)


def test_plain_guidance_has_no_effect_on_correct_samples_and_flow_based_guidance_does(quick: Toy) -> None:
    generator = torch.Generator().manual_seed(0)
    g, critic = (OnTheMeans(Mlps(2, 2 * EMBEDDING, 8, generator), 1, True), Mlps(2, 2 * EMBEDDING, 8, generator))
    batch = next(training._batches(1, quick, generator, CPU))
    losses = []
    for t in (None, (0.0, 0.0), (0.0, 1.0)):
        setting = Setting(1, 0.0, 1, conditional=True, guidance=t and Guidance(scale=1.0, t=t))
        losses.append(training._generator_loss(g, critic, batch, setting, generator).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] > losses[0] + 0.2


def test_experiment_has_every_setting_once_for_every_seed(experiment: Experiment, toy: Toy) -> None:
    settings = toy_settings(toy)
    unconditional = [
        *("gan", "afm_1", "afm_4", "afm_64"),
        *("afm_1_ot_0.005", "afm_1_ot_0.5", "afm_1_ot_5"),
    ]
    assert list(settings) == [*unconditional, "none", "plain", "flow_based"]
    plain, flow_based = (settings[name].guidance for name in ("plain", "flow_based"))
    assert plain is not None and plain.t == (0.0, 0.0)
    assert flow_based is not None and flow_based.t == toy.guidance.t
    assert settings["none"].guidance is None
    assert set(experiment.maps) == {*unconditional, "flow_1", "flow_4", "flow_64"}
    assert {learned.x.shape for learned in experiment.maps.values()} == {(toy.seeds, toy.points)}
    assert {name: x.shape[0] for name, x in experiment.guided.items()} == {
        **dict.fromkeys(("none", "plain", "flow_based"), toy.seeds),
        "exact_cfg": 1,
    }


def test_a_setting_does_not_depend_on_which_others_there_are(experiment: Experiment, toy: Toy) -> None:
    alone = toy.model_copy(update={"sweep": (5.0,), "steps": (1,)})
    again = finish(run_experiment(alone, 0, CPU))
    assert torch.equal(again.maps["afm_1_ot_5"].x, experiment.maps["afm_1_ot_5"].x)
    other = finish(run_experiment(alone, 1, CPU))
    assert not torch.equal(other.maps["gan"].x, again.maps["gan"].x)


def test_same_seed_gives_the_same_files(experiment: Experiment, toy: Toy, tmp_path: Path) -> None:
    write_experiment(experiment, None, toy, tmp_path / "first")
    again = finish(run_experiment(toy, 0, CPU))
    write_experiment(again, None, toy, tmp_path / "second")
    assert {path.name for path in (tmp_path / "first").iterdir()} == FILES
    headline = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert headline["spread_ratio"] == pytest.approx(headline["gan"]["spread"] / headline["afm_1"]["spread"])
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_a_diverged_setting_is_named(experiment: Experiment, toy: Toy) -> None:
    broken = experiment.maps["gan"]._replace(x=experiment.maps["gan"].x * float("nan"))
    with pytest.raises(UserError, match="non-finite samples of gan"):
        measure(experiment._replace(maps=experiment.maps | {"gan": broken}), toy)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: Experiment, toy: Toy) -> Path:
    monkeypatch.chdir(tmp_path)
    write_experiment(experiment, None, toy, paths.TOY)
    return tmp_path


def test_report_shows_three_figures_and_the_numbers_of_the_file(project: Path) -> None:
    section = read_one_dimension()
    assert section is not None
    results: dict[str, Any] = json.loads((paths.TOY / "results.json").read_text())
    assert [drawing.image.source for drawing in section.pictures] == [
        "results/toy/maps.png",
        "results/toy/sweep.png",
        "results/toy/guidance.png",
    ]
    assert all(len(drawing.image.alt) > 100 for drawing in section.pictures)
    rows = list(csv.DictReader(csv_text(section.table).splitlines()))
    assert len(rows) == len(results["maps"])
    assert (rows[0]["method"], float(rows[0]["spread"])) == ("GAN", results["maps"]["gan"]["spread_mean"])
    assert titles.number(results["maps"]["afm_1"]["spread_mean"]) in section.finding
    assert "width 16 (the paper: 1024)" in section.scale


def test_report_shows_the_strong_discriminators_of_the_study(project: Path, toy: Toy) -> None:
    section = read_one_dimension()
    assert section is not None and section.strong is None
    path = paths.STUDY / "strong_discriminator_1d.json"
    result = CliRunner().invoke(app, ["toy", "--params", str(SMOKE), "--strong", str(path)])
    assert result.exit_code == 0, result.output
    section = read_one_dimension()
    assert section is not None and section.strong is not None
    rows = list(csv.DictReader(csv_text(section.strong).splitlines()))
    stored = json.loads(path.read_text())
    assert [float(row["rms"]) for row in rows] == [pytest.approx(sum(s["rms"]) / 2) for s in stored["settings"]]
    assert all(f"{claim['claim']}: {claim['outcome']}" in section.strong.caption for claim in stored["claims"])
    refused = CliRunner().invoke(app, ["toy", "--params", str(ROOT / "params.yaml"), "--strong", str(path)])
    assert refused.exit_code != 0 and "toy.strong_discriminator: null" in refused.output


def test_report_without_the_experiment_has_no_section_and_a_damaged_file_is_an_error(project: Path) -> None:
    path = paths.TOY / "results.json"
    path.write_text('{"maps": {}}')
    with pytest.raises(UserError, match=r"results/toy/results.json with a wrong guidance.*dvc repro --force toy"):
        read_one_dimension()
    path.unlink()
    assert read_one_dimension() is None


def test_command_writes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--set", "toy.pairs=2", "--set", "toy.flow_updates=2", "--set", "toy.guidance.pairs=2"]
    result = CliRunner().invoke(app, ["toy", "--params", str(SMOKE), *few])
    assert result.exit_code == 0, result.output
    assert {path.name for path in paths.TOY.iterdir()} == FILES


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("toy.steps=[4, 64]", "expected steps to hold 1"),
        ("toy.penalty.batch_fraction=0.001", "at least one of 64 samples"),
        ("toy.seeds=1", "toy.seeds: found 1"),
    ],
)
def test_impossible_params_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_params(SMOKE, [override])


def test_a_strong_discriminator_is_trained_closer_to_its_optimum(quick: Toy) -> None:
    strong = StrongDiscriminator(updates=(1, 6), pairs=30)
    results = finish(run_strong(quick.model_copy(update={"strong_discriminator": strong}), 0, CPU))
    assert results is not None
    places = [(each.discriminator_updates, each.transport, each.normalized) for each in results.settings]
    assert places == list(product((1, 6), (True, False), (True, False)))
    gaps = {place: each.discriminator_gap for place, each in zip(places, results.settings, strict=True)}
    assert gaps[6, True, True] < gaps[1, True, True]
    assert [len(each.rms) for each in results.settings] == [quick.seeds] * 8
    assert finish(run_strong(quick.model_copy(update={"strong_discriminator": None}), 0, CPU)) is None


def test_one_discriminator_update_is_the_experiments_own_training(quick: Toy) -> None:
    noise, x = mapped(Setting(1, quick.transport, 20), quick)
    strong = StrongDiscriminator(updates=(1, 2), pairs=20)
    with_strong = quick.model_copy(update={"strong_discriminator": strong, "points": 256})
    results = finish(run_strong(with_strong, 0, CPU))
    assert results is not None
    (same,) = [s for s in results.settings if (s.discriminator_updates, s.transport, s.normalized) == (1, True, False)]
    rms = (x - mixture.optimal_map(noise)).square().mean(1).sqrt()
    assert same.rms == pytest.approx(rms.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("many", "few", "outcome"),
    [
        ([0.1, 0.11, 0.1], [0.5, 0.5, 0.6], "supported"),
        ([0.5, 0.5, 0.6], [0.1, 0.11, 0.1], "not supported"),
        ([0.1, 0.9, 0.1], [0.2, 0.2, 0.2], "undecided"),
        ([0.1, None, 0.1], [0.5, 0.5, 0.6], "undecided"),
    ],
)
def test_a_claim_on_the_optimal_map_is_decided_over_seeds(
    many: list[float | None], few: list[float | None], outcome: str
) -> None:
    def result(updates: int, rms: list[float | None], **settings: bool) -> StrongResults:
        return StrongResults(discriminator_updates=updates, rms=rms, w1=rms, discriminator_gap=0.0, **settings)

    sides = [(updates, t, n) for updates in (1, 16) for t in (True, False) for n in (True, False)]
    results = [result(u, many if u == 16 else few, transport=t, normalized=n) for u, t, n in sides]
    assert strong_claims(results)[0].outcome == outcome


def test_normalization_makes_a_stationary_gradient_one_over_the_batch() -> None:
    gradient, mean_square = torch.full((2, 10), 3.0), torch.zeros(2)
    for _ in range(200):
        normalized = training._normalized(gradient, mean_square)
    torch.testing.assert_close(normalized, torch.full((2, 10), 0.1))
