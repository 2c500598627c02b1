"""The losses and one whole D and G step, against closed forms and the released implementation's gradients."""

import numpy as np
import pytest
import torch
from afm_pipe.objectives.adversarial_flow.step import Batch, PenaltyNoise, discriminator_step, generator_step

from afm_pipe.models.discriminator import Discriminator
from afm_pipe.models.flow import Flow
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import ModelConfig, build_discriminator
from afm_pipe.objectives.adversarial_flow.batches import draw_times
from afm_pipe.objectives.adversarial_flow.losses import (
    Logits,
    discriminator_terms,
    gradient_penalty,
    interpolate,
    relativistic,
    step_weighting,
    transport_cost,
)
from afm_pipe.objectives.adversarial_flow.normalizer import GradientNormalizer
from afm_pipe.params import Run
from tests.test_models import NETWORKS, golden

LAMBDA_GP, LAMBDA_CP, LAMBDA_OT = 0.25, 0.01, 0.2


@pytest.fixture
def run(smoke_run: Run) -> Run:
    penalty = smoke_run.penalty.model_copy(update={"weight": LAMBDA_GP, "batch_fraction": 0.25, "epsilon": 0.01})
    return smoke_run.model_copy(update={"penalty": penalty, "logit_centering": LAMBDA_CP})


def networks(vectors: dict[str, torch.Tensor], kind: str, dtype: torch.dtype) -> tuple[Generator, Discriminator]:
    pair = NETWORKS[f"generator_{kind}"](), NETWORKS[f"discriminator_{kind}"]()
    for network, prefix in zip(pair, ("weights_gen/", "weights_dis/"), strict=True):
        weights = {key.removeprefix(prefix): value for key, value in vectors.items() if key.startswith(prefix)}
        network.load_state_dict(weights)
        network.to(dtype)
    return pair


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("released_rates")
@pytest.mark.parametrize("nfe", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "penalty_tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-9, 1e-9, 1e-9), (torch.float32, 1e-5, 5e-4, 2e-4)],
)
def test_one_step_equals_the_released_implementation(
    run: Run, nfe: int, dtype: torch.dtype, tolerance: float, penalty_tolerance: float, gradient_tolerance: float
) -> None:
    vectors = golden(f"step_{nfe}nfe")
    generator, discriminator = networks(vectors, "1nfe" if nfe == 1 else "multistep", dtype)
    flow = Flow(generator, "direct" if nfe == 1 else "residual", nfe)
    latents, noise, labels = vectors["in/latents"].to(dtype), vectors["in/noises_src"].to(dtype), vectors["in/labels"]
    batch = Batch(latents, noise, labels)
    if nfe == 2:
        s, t = vectors["in/timesteps_src"].to(dtype), vectors["in/timesteps_tgt"].to(dtype)
        target_noise = vectors["in/noises_tgt"].to(dtype)
        batch = Batch(interpolate(latents, target_noise, t), interpolate(latents, noise, s), labels, s, t)
    directions = PenaltyNoise(vectors["in/noises_r1"][:2].to(dtype), vectors["in/noises_r2"][:2].to(dtype))

    d_step = discriminator_step(flow, discriminator, batch, directions, run)
    assert distance(d_step.total, vectors["dis/loss/total"]) < penalty_tolerance
    assert distance(d_step.terms.adversarial, vectors["dis/loss/dis"]) < tolerance
    assert distance(LAMBDA_GP * d_step.terms.r1, vectors["dis/loss/r1"]) < penalty_tolerance
    assert distance(LAMBDA_GP * d_step.terms.r2, vectors["dis/loss/r2"]) < penalty_tolerance
    assert distance(LAMBDA_CP * d_step.terms.logit_centering, vectors["dis/loss/cp"]) < tolerance
    assert distance(d_step.logits.real.mean(), vectors["dis/logits/real"]) < tolerance
    assert distance(d_step.logits.fake.mean(), vectors["dis/logits/fake"]) < tolerance
    found = {name: parameter.grad for name, parameter in discriminator.named_parameters()}
    expected = {key[9:]: value for key, value in vectors.items() if key.startswith("dis/grad/")}
    assert found.keys() == expected.keys()
    assert max(distance(found[name], expected[name]) for name in expected) < gradient_tolerance

    normalizer = GradientNormalizer(0.9, dtype=dtype)
    discriminator.requires_grad_(False)
    g_step = generator_step(flow, discriminator, batch, LAMBDA_OT, normalizer)
    assert distance(g_step.total, vectors["gen/loss/total"]) < tolerance
    assert distance(g_step.terms.adversarial, vectors["gen/loss/gen"]) < tolerance
    assert distance(LAMBDA_OT * g_step.terms.transport, vectors["gen/loss/ot"]) < tolerance
    assert distance(normalizer.mean_square, vectors["gen/grad_norm_square_avg"]) < gradient_tolerance
    found = {name: parameter.grad for name, parameter in generator.named_parameters()}
    expected = {key[9:]: value for key, value in vectors.items() if key.startswith("gen/grad/")}
    assert found.keys() == expected.keys()
    assert max(distance(found[name], expected[name]) for name in expected) < gradient_tolerance


def test_gradient_normalizer_equals_the_released_operator() -> None:
    vectors = golden("gradient_normalization")
    normalizer = GradientNormalizer(0.9, dtype=torch.float64)
    for incoming, outgoing in zip(vectors["incoming"], vectors["outgoing"], strict=True):
        assert distance(normalizer(incoming), outgoing) < 1e-9


def test_normalised_gradient_does_not_depend_on_its_scale() -> None:
    gradients = torch.randn(20, 4, 2, 3, 3, dtype=torch.float64)
    plain, steep = GradientNormalizer(0.9, dtype=torch.float64), GradientNormalizer(0.9, dtype=torch.float64)
    for gradient in gradients:
        out, out_steep = plain(gradient), steep(1000 * gradient)
    assert distance(out_steep, out) < 1e-6


def test_transport_to_adversarial_gradient_ratio_is_the_papers() -> None:
    """Paper section 1, derived: |OT grad| / |adv grad| = 2 lambda_ot rms(G(z) - z), once the mean has settled."""
    normalizer = GradientNormalizer(0.9, dtype=torch.float64)
    adversarial = torch.randn(6, 4, 2, 2, dtype=torch.float64) * 7
    for _ in range(400):
        normalised = normalizer(adversarial)
    source = torch.randn(6, 4, 2, 2, dtype=torch.float64)
    output = (source + torch.randn_like(source)).requires_grad_()
    (pull,) = torch.autograd.grad(0.3 * transport_cost(output, source), output)
    transport_rms = (output - source).square().mean().sqrt().item()
    assert (pull.norm() / normalised.norm()).item() == pytest.approx(2 * 0.3 * transport_rms, rel=1e-6)


def test_relativistic_loss_is_log_of_one_plus_exp() -> None:
    higher, lower = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    expected = np.mean([np.log(1 + np.exp(-0.5)), np.log(1 + np.exp(5.0))])
    assert relativistic(higher, lower).item() == pytest.approx(expected)


def test_gradient_penalty_of_a_linear_critic_is_its_squared_slope_along_the_noise() -> None:
    slope = torch.tensor([2.0, -1.0], dtype=torch.float64)
    u, noise = torch.randn(8, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    found = gradient_penalty(u @ slope, (u[:3] + 0.01 * noise) @ slope, 0.01, torch.tensor([1.0, 0.5, 0.25]))
    expected = (torch.tensor([1.0, 0.5, 0.25]) * (noise @ slope).square()).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_centring_pulls_the_sum_of_logits_to_zero() -> None:
    logits = Logits(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0]), torch.tensor([1.0]), torch.tensor([3.0]))
    assert discriminator_terms(logits, 0.01).logit_centering.item() == pytest.approx((16 + 0) / 2)


def test_transport_cost_is_per_element_and_divided_by_the_step() -> None:
    source = torch.zeros(2, 1, 2, 2)
    output = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)])
    assert transport_cost(output, source).item() == pytest.approx((1 + 9) / 2)
    weighting = step_weighting(torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5]))
    assert weighting.tolist() == pytest.approx([0.5, 0.001])
    assert transport_cost(output, source, weighting).item() == pytest.approx((1 / 0.5 + 9 / 0.001) / 2)


def test_fixed_times_are_neighbours_on_the_grid_and_any_times_are_ordered() -> None:
    s, t = draw_times(4, 1000, torch.Generator().manual_seed(0))
    assert set(s.tolist()) == {0.25, 0.5, 0.75, 1.0}
    assert torch.equal(s - t, torch.full((1000,), 0.25))
    s, t = draw_times("any", 1000, torch.Generator().manual_seed(0))
    assert ((t >= 0) & (t <= s) & (s <= 1)).all()
    assert s.mean().item() == pytest.approx(0.5, abs=0.05)
    assert t.mean().item() == pytest.approx(0.25, abs=0.05)


def small_step(run: Run) -> tuple[Flow, Discriminator, Batch, PenaltyNoise]:
    vectors = golden("step_1nfe")
    generator, discriminator = networks(vectors, "1nfe", torch.float64)
    latents, noise = vectors["in/latents"].double(), vectors["in/noises_src"].double()
    directions = PenaltyNoise(vectors["in/noises_r1"][:2].double(), vectors["in/noises_r2"][:2].double())
    return Flow(generator, "direct", 1), discriminator, Batch(latents, noise, vectors["in/labels"]), directions


def gradients(module: torch.nn.Module) -> torch.Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])
    module.zero_grad(set_to_none=True)
    return found


def test_lazy_penalties_have_the_penalties_mean_gradient(run: Run) -> None:
    flow, discriminator, batch, directions = small_step(run)
    every = run.model_copy(update={"penalty": run.penalty.model_copy(update={"every": 4})})
    steps = [discriminator_step(flow, discriminator, batch, directions, run)]
    always = gradients(discriminator)
    mean = torch.zeros_like(always)
    for update in range(4):
        noise = None if update % 4 else directions
        steps.append(discriminator_step(flow, discriminator, batch, noise, every))
        mean += gradients(discriminator) / 4
    assert distance(mean, always) < 1e-9
    assert steps[1].terms.r1.item() == pytest.approx(4 * steps[0].terms.r1.item())
    assert [step.terms.r1.item() for step in steps[2:]] == [0, 0, 0]


def test_a_reused_forward_gives_the_same_gradients(run: Run) -> None:
    flow, discriminator, batch, directions = small_step(run)
    runs = []
    for reuse in (False, True):
        fake = flow(batch.source, batch.labels) if reuse else None
        discriminator_step(flow, discriminator, batch, directions, run, fake=fake)
        of_d = gradients(discriminator)
        discriminator.requires_grad_(False)
        generator_step(flow, discriminator, batch, LAMBDA_OT, GradientNormalizer(0.9, dtype=torch.float64), fake=fake)
        discriminator.requires_grad_(True)
        runs.append((of_d, gradients(flow)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_a_discriminator_that_sees_the_source_depends_on_it() -> None:
    config = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=3, condition_on_source=True)
    discriminator = build_discriminator(config)
    for block in discriminator.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.5)
    x, labels, source = torch.randn(2, 4, 8, 8), torch.tensor([0, 2]), torch.randn(2, 4, 8, 8)
    seen, moved = discriminator(x, labels, None, source), discriminator(x, labels, None, source + 1)
    assert not torch.allclose(seen, moved)
    blind = build_discriminator(config.model_copy(update={"condition_on_source": False}))
    assert torch.equal(blind(x, labels, None, source), blind(x, labels))
