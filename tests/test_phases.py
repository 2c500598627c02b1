"""What phases do: EMA reload, D reload, guidance, augmentation, and the classifier they are guided by."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from afm_pipe.training.classifier import accuracy_by_level, train_latent_classifier

from afm_pipe import pipeline
from afm_pipe.data.order import ALL
from afm_pipe.distributed.launch import Launch
from afm_pipe.models.classifier import LatentClassifier, load_latent_classifier
from afm_pipe.models.model_files import ModelConfig
from afm_pipe.objectives.adversarial_flow.augment import affine_view, discriminator_view
from afm_pipe.objectives.adversarial_flow.guidance import guide_at_times, guide_to_data
from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Affine, Augmentation, Guidance, Params, Phase, Run
from afm_pipe.params.sizes import ModelSize
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from afm_pipe.training.interventions import intervene
from afm_pipe.training.state import TrainingState
from tests.test_models import golden

LAUNCH = Launch(device="cpu", checkpoint_seconds=1e9)
GUIDED = (
    "guided={g: {from: t4, until_epoch: 10, transport: 0.01, guidance: {scale: 0.003, t: [0, 0.1]}, "
    "augment: {probability: 0.4, translate: 0.3, erasings: 3, area: [0.1, 0.5]}}}"
)


@pytest.mark.usefixtures("released_rates")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_classifier_forward_equals_the_released_implementation(dtype: torch.dtype, tolerance: float) -> None:
    vectors = golden("classifier")
    classifier = LatentClassifier(ModelSize(depth=2, width=32, heads=4, patch=2), 4, 8, 10)
    classifier.load_state_dict({key[8:]: value for key, value in vectors.items() if key.startswith("weights/")})
    out = classifier.to(dtype)(vectors["x"].to(dtype), vectors["t"].to(dtype))
    assert (out - vectors["out"]).norm() / vectors["out"].norm() < tolerance


def linear_classifier(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A classifier whose logits say what it was shown: sums of the latent's first two channels, and the time."""
    return torch.stack([x[:, 0].sum((1, 2)), x[:, 1].sum((1, 2)), 10 * t], dim=1)


def test_guidance_is_the_papers_formula_at_the_interpolated_output() -> None:
    output, labels = torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 2, 0, 1])
    guidance = Guidance(scale=0.003, t=(0.2, 0.6))
    found = guide_to_data(linear_classifier, guidance, labels, (5, 2, 3, 3), torch.Generator().manual_seed(3))(output)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 2, 3, 3, generator=generator)
    t = 0.2 + 0.4 * torch.rand(5, generator=generator)
    assert ((t >= 0.2) & (t <= 0.6)).all()
    noisy = (1 - t[:, None, None, None]) * output + t[:, None, None, None] * z
    log_likelihood = F.log_softmax(linear_classifier(noisy, t), dim=1)[torch.arange(5), labels]
    assert found.item() == pytest.approx(-0.003 * log_likelihood.mean().item(), rel=1e-5)


def test_multi_step_guidance_looks_at_the_chosen_target_times_alone() -> None:
    output, labels = torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 0, 1])
    t = torch.tensor([0.0, 0.25, 0.5, 0.75])
    guide = guide_at_times(linear_classifier, Guidance(scale=2.0, at=(0.0, 0.25)), labels, t)
    losses = F.cross_entropy(linear_classifier(output, t), labels, reduction="none")
    assert guide(output).item() == pytest.approx(2 * (losses[0] + losses[1]).item() / 4, rel=1e-5)


def test_augmentation_is_the_same_for_real_and_fake_and_passes_gradients() -> None:
    augment = Augmentation(probability=1.0, translate=0.3, erasings=1, area=(0.1, 0.5))
    view = discriminator_view(augment, 50, 8, torch.Generator().manual_seed(0))
    real = torch.rand(50, 4, 8, 8) + 1
    fake = real.clone().requires_grad_()
    assert torch.equal(view(real), view(fake).detach())
    view(fake).sum().backward()
    assert fake.grad is not None
    assert set(fake.grad.unique().tolist()) == {0.0, 1.0}


def test_translation_moves_whole_pixels_and_lets_zeros_in() -> None:
    augment = Augmentation(probability=1.0, translate=0.3, erasings=0, area=(0.1, 0.5))
    x = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(200, 1, 8, 8)
    moved = discriminator_view(augment, 200, 8, torch.Generator().manual_seed(0))(x)
    seen = set()
    for one in moved[:, 0]:
        dy, dx = next(
            (dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if torch.equal(one, shifted(x[0, 0], dy, dx))
        )
        seen.add((dy, dx))
    assert len(seen) == 25


def shifted(x: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[max(dy, 0) : 8 + min(dy, 0), max(dx, 0) : 8 + min(dx, 0)] = x[
        max(-dy, 0) : 8 + min(-dy, 0), max(-dx, 0) : 8 + min(-dx, 0)
    ]
    return out


def test_erasing_covers_the_share_asked_for_with_a_rectangle() -> None:
    augment = Augmentation(probability=1.0, translate=0.0, erasings=1, area=(0.25, 0.25))
    erased = discriminator_view(augment, 300, 16, torch.Generator().manual_seed(0))(torch.ones(300, 1, 16, 16)) == 0
    shares = erased.float().mean((1, 2, 3))
    assert shares.mean().item() == pytest.approx(0.25, abs=0.01)
    for mask in erased[:, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()


def test_augmentation_touches_the_share_asked_for() -> None:
    augment = Augmentation(probability=0.4, translate=0.0, erasings=1, area=(0.1, 0.5))
    seen = discriminator_view(augment, 2000, 8, torch.Generator().manual_seed(0))(torch.ones(2000, 1, 8, 8))
    assert (seen != 1).flatten(1).any(1).float().mean().item() == pytest.approx(0.4, abs=0.03)


def test_affine_view_magnifies_rotates_and_reflects() -> None:
    still = Affine(probability=1.0, degrees=0.0, translate=0.0, scale=(1.0, 1.0))
    x = torch.randn(4, 2, 8, 8)
    assert torch.allclose(affine_view(still, 4, torch.Generator())(x), x, atol=1e-5)
    never = Affine(probability=0.0, degrees=90.0, translate=0.5, scale=(2.0, 2.0))
    assert torch.allclose(affine_view(never, 4, torch.Generator())(x), x, atol=1e-5)
    larger = Affine(probability=1.0, degrees=0.0, translate=0.0, scale=(2.0, 2.0))
    ramp = torch.linspace(-1, 1, 9)[None, None, None].expand(1, 1, 9, 9)
    middle = affine_view(larger, 1, torch.Generator())(ramp)
    assert middle[0, 0, 4, 8].item() == pytest.approx(0.5, abs=0.01)
    ones = torch.ones(3, 1, 8, 8)
    moving = Affine(probability=1.0, degrees=30.0, translate=0.4, scale=(0.5, 1.5))
    assert torch.allclose(affine_view(moving, 3, torch.Generator())(ones), ones, atol=1e-5)  # no zeros come in


def test_reloads_happen_at_the_start_of_a_phase_and_of_each_epoch(smoke_run: Run, tmp_path: Path) -> None:
    phases = (
        Phase(until_epoch=2.0),
        Phase(until_epoch=4.0, reload_ema="epoch"),
        Phase(until_epoch=5.0, reload_discriminator=1.0),
    )
    run = smoke_run.model_copy(update={"phases": phases, "batch_size": 10})
    config = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=3)
    state = TrainingState.fresh(config, run, torch.device("cpu"))
    happened = {}
    for state.update in range(update_at(run, 5.0, 45)):
        with torch.no_grad():
            state.generator.final_layer.linear.bias.fill_(state.update)
            state.discriminator.dis_embed.fill_(state.update)
        done = intervene(run, state, 45, tmp_path)
        if done:
            happened[state.update] = done
        assert (state.generator.final_layer.linear.bias[0].item() == state.update) == (state.update not in (9, 14))
    assert happened == {
        9: ["G replaced by its moving average"],
        14: ["G replaced by its moving average"],
        18: ["D put back to epoch 1"],
    }
    assert state.discriminator.dis_embed[0].item() == state.update  # filled after the reload at 18


def test_discriminator_goes_back_to_what_it_was(smoke_run: Run, tmp_path: Path) -> None:
    phases = (Phase(until_epoch=2.0), Phase(until_epoch=3.0, reload_discriminator=1.0))
    run = smoke_run.model_copy(update={"phases": phases, "batch_size": 10})
    config = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=3)
    state = TrainingState.fresh(config, run, torch.device("cpu"))
    for state.update in range(9):
        with torch.no_grad():
            state.discriminator.dis_embed.fill_(state.update)
        intervene(run, state, 40, tmp_path)
    assert state.discriminator.dis_embed[0].item() == 4
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="which a phase puts D back to"):
        intervene(run, state, 40, tmp_path)


@pytest.fixture(scope="module")
def guided(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the run t4, a classifier and the guided run g that continues t4, all trained."""
    import os

    from afm_pipe.params.file import load_params

    project = tmp_path_factory.mktemp("guided") / "project"
    shutil.copytree(discs, project)
    before = Path.cwd()
    os.chdir(project)
    try:
        params = load_params(overrides=[GUIDED, "classifier.epochs=2", "classifier.batch_size=8"])
        pipeline.train(params, "t4", LAUNCH)
        pipeline.classifier(params, LAUNCH)
        pipeline.train(params, "g", LAUNCH)
    finally:
        os.chdir(before)
    return project


def test_guided_run_continues_its_base(guided: Path) -> None:
    base, config = (json.loads((guided / f"models/{name}/config.json").read_text()) for name in ("t4", "g"))
    assert (base["updates"], config["updates"]) == (60, 75)
    assert config["provenance"]["generator"] and config["provenance"]["classifier"]
    rows = (guided / "curves/g.csv").read_text().splitlines()
    header = rows[0].split(",")
    values = [dict(zip(header, map(float, row.split(",")), strict=True)) for row in rows[1:]]
    assert [row["update"] for row in values] == [70, 75]
    assert all(row["g_guidance"] > 0 for row in values)
    assert json.loads((guided / "costs/g.json").read_text())["updates"] == 15


class Blobs:
    """Latents of three classes that differ in the mean of their channels."""

    num_images, num_mirrors, latent_shape, classes = 90, 1, (4, 8, 8), ("a", "b", "c")
    labels = np.arange(90) % 3

    def draw(self, indices: torch.Tensor, generator: torch.Generator, own: slice = ALL) -> torch.Tensor:
        means = torch.eye(4)[:3][torch.as_tensor(self.labels)[indices]]
        noise = torch.randn(len(indices), *self.latent_shape, generator=generator)
        return (means[:, :, None, None] + 0.5 * noise)[own]


def test_classifier_learns_and_knows_more_with_less_noise(discs_params: Params, tmp_path: Path) -> None:
    settings = discs_params.classifier.model_copy(update={"batch_size": 30, "epochs": 20.0})
    training = train_latent_classifier(settings, Blobs(), 0, tmp_path, "f", torch.device("cpu"), 0.0)
    model = track("classifier", training).ema
    accuracy = accuracy_by_level(model, Blobs(), 0, torch.device("cpu"))
    assert accuracy["accuracy_t0"] > 0.95
    assert accuracy["accuracy_t0"] >= accuracy["accuracy_t0.25"] >= accuracy["accuracy_t0.5"] > 1 / 3


def test_a_classifier_killed_and_resumed_ends_with_the_same_weights(discs_params: Params, tmp_path: Path) -> None:
    settings = discs_params.classifier.model_copy(update={"batch_size": 10, "epochs": 12.0})
    cpu = torch.device("cpu")
    whole = track("classifier", train_latent_classifier(settings, Blobs(), 0, tmp_path / "a", "f", cpu, 0.0))
    next(train_latent_classifier(settings, Blobs(), 0, tmp_path / "b", "f", cpu, 0.0))  # up to its first checkpoint
    resumed = track("classifier", train_latent_classifier(settings, Blobs(), 0, tmp_path / "b", "f", cpu, 0.0))
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(resumed.ema.state_dict()[name], value)
    assert whole.rows == resumed.rows


def test_a_classifier_folder_gives_back_its_classifier(guided: Path) -> None:
    classifier = load_latent_classifier(guided / "models/classifier", torch.device("cpu"))
    assert classifier(torch.zeros(2, 4, 8, 8), torch.zeros(2)).shape == (2, 3)
    assert "accuracy_t0" in json.loads((guided / "models/classifier/config.json").read_text())


def test_guidance_without_a_classifier_is_refused_before_training(change: Callable[..., Params]) -> None:
    with pytest.raises(UserError, match="expected a `classifier` section, since a phase has guidance"):
        change(GUIDED, "classifier=null")


def test_a_folder_without_a_classifier_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"classifier": null}')
    with pytest.raises(UserError, match="dvc repro classifier"):
        load_latent_classifier(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "nfe"),
    [
        (["runs.t4.nfe=2", "runs.t4.form=residual"], 2),
        (["runs.t4.nfe=4", "runs.t4.form=direct", "runs.t4.qk_norm=true"], 4),
        (["runs.t4.nfe=any", "runs.t4.form=residual"], "any"),
        (["runs.t4.repeats=2"], 1),
    ],
    ids=["2NFE residual", "4NFE direct with QK-norm", "any-step", "2x deep"],
)
def test_every_form_trains_and_samples_with_the_same_code(
    discs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., Params],
    overrides: list[str],
    nfe: object,
) -> None:
    shutil.copytree(discs, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    params = change(*overrides, "runs.t4.phases=[{until_epoch: 2}]")
    pipeline.train(params, "t4", LAUNCH)
    assert json.loads((paths.model("t4") / "config.json").read_text())["model"]["nfe"] == nfe
    pipeline.sample(params, "t4", LAUNCH)
    assert (paths.samples("t4") / "grid.png").exists()
