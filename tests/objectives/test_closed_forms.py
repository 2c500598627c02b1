"""Losses, the gradient normalization and D's view of its input, against closed forms."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from afm_pipe.distributed.process_group import SINGLE_PROCESS
from afm_pipe.models.model_files import ModelConfig, build_discriminator, run_config
from afm_pipe.objectives.adversarial_flow.batches import Batch, DiscriminatorPart, Draw, GeneratorPart, PenaltyNoise
from afm_pipe.objectives.adversarial_flow.losses import (
    gradient_penalty,
    logit_centering,
    relativistic,
    step_weighting,
    transport_cost,
)
from afm_pipe.objectives.adversarial_flow.normalizer import divisor
from afm_pipe.objectives.adversarial_flow.objective import AdversarialFlow
from afm_pipe.objectives.base import Hyperparameters
from afm_pipe.params import Run
from afm_pipe.training.learner import Learner
from afm_pipe.training.state import TrainingState
from tests.models.test_models import golden

SHAPE, CLASSES = (4, 8, 8), 3


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def normalized(gradients: Tensor, mean_square: Tensor) -> Tensor:
    return gradients / divisor(mean_square, gradients.square().sum(), gradients.numel(), 0.9)


def test_normalized_gradients_equal_the_released_operators() -> None:
    vectors, mean_square = golden("gradient_normalization"), torch.zeros((), dtype=torch.float64)
    for incoming, outgoing in zip(vectors["incoming"], vectors["outgoing"], strict=True):
        assert distance(normalized(incoming, mean_square), outgoing) < 1e-9


def test_normalized_gradient_does_not_depend_on_its_scale() -> None:
    plain, steep = torch.zeros(2, dtype=torch.float64)
    for gradient in torch.randn(20, 4, 2, 3, 3, dtype=torch.float64):
        out, out_steep = normalized(gradient, plain), normalized(1000 * gradient, steep)
    assert distance(out_steep, out) < 1e-6


def test_transport_to_adversarial_gradient_ratio_is_the_papers() -> None:
    """Paper section 1, derived: |OT grad| / |adv grad| = 2 lambda_ot rms(G(z) - z), once the mean has settled."""
    mean_square = torch.zeros((), dtype=torch.float64)
    adversarial = torch.randn(6, 4, 2, 2, dtype=torch.float64) * 7
    for _ in range(400):
        push = normalized(adversarial, mean_square)
    source = torch.randn(6, 4, 2, 2, dtype=torch.float64)
    output = (source + torch.randn_like(source)).requires_grad_()
    (pull,) = torch.autograd.grad(0.3 * transport_cost(output, source), output)
    transport_rms = (output - source).square().mean().sqrt().item()
    assert (pull.norm() / push.norm()).item() == pytest.approx(2 * 0.3 * transport_rms, rel=1e-6)


def test_relativistic_loss_is_log_of_one_plus_exp() -> None:
    higher, lower = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    expected = np.mean([np.log(1 + np.exp(-0.5)), np.log(1 + np.exp(5.0))])
    assert relativistic(higher, lower).item() == pytest.approx(expected)


def test_gradient_penalty_of_a_linear_critic_is_its_squared_slope_along_the_noise() -> None:
    slope = torch.tensor([2.0, -1.0], dtype=torch.float64)
    u, noise = torch.randn(8, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    weighting = torch.tensor([1.0, 0.5, 0.25])
    found = gradient_penalty(u[:3] @ slope, (u[:3] + 0.01 * noise) @ slope, 0.01, weighting)
    expected = (torch.tensor([1.0, 0.5, 0.25]) * (noise @ slope).square()).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_centering_pulls_the_sum_of_logits_to_zero() -> None:
    assert logit_centering(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])).item() == pytest.approx((16 + 0) / 2)


def test_transport_cost_is_per_element_and_divided_by_the_step() -> None:
    source = torch.zeros(2, 1, 2, 2)
    output = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)])
    assert transport_cost(output, source).item() == pytest.approx((1 + 9) / 2)
    weighting = step_weighting(torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5]))
    assert weighting.tolist() == pytest.approx([0.5, 0.001])
    assert transport_cost(output, source, weighting).item() == pytest.approx((1 / 0.5 + 9 / 0.001) / 2)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Recorder(Learner):
    """The trainer's learner, which notes gradients before each step."""

    gradients: dict[str, Tensor]

    def step(self, name: str, loss: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        self.gradients[name] = torch.cat(
            [p.grad.flatten() for p in self.networks[name].parameters() if p.grad is not None]
        )
        return super().step(name, loss, hyperparameters)


def gradients_of(run: Run, *draws: Draw) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """Update from each draw, at the same weights; return gradients by network, and figures."""
    objective = AdversarialFlow(run, run_config(run, SHAPE, CLASSES))
    state = TrainingState.fresh(objective, torch.device("cpu"))
    torch.manual_seed(0)
    for network in state.networks.values():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    learner = Recorder(state, run.ema, SINGLE_PROCESS)
    gradients, figures = [], []
    still = Hyperparameters({"generator": 0.0, "discriminator": 0.0}, {"transport": 0.2})
    for draw in draws:
        learner.gradients = {}
        values = objective.update(learner, draw, still)
        gradients.append(learner.gradients)
        figures.append(dict(zip((term.name for term in objective.terms), values.tolist(), strict=True)))
    return gradients, figures


@pytest.fixture
def draw(float64: None) -> Draw:
    torch.manual_seed(1)
    batch = Batch(torch.randn(8, *SHAPE), torch.randn(8, *SHAPE), torch.arange(8) % CLASSES)
    return Draw([[DiscriminatorPart(batch, PenaltyNoise(*torch.randn(2, 2, *SHAPE)))]], [GeneratorPart(batch)])


@pytest.fixture
def run(smoke_run: Run) -> Run:
    return smoke_run.model_copy(update={"size": "s4", "batch_size": 8, "weight_decay": 0.0})


def test_lazy_penalties_have_the_penalties_mean_gradient(run: Run, draw: Draw) -> None:
    lazy = run.model_copy(update={"penalty": run.penalty.model_copy(update={"every": 4})})
    (always,), (whole,) = gradients_of(run, draw)
    ((part,),) = draw.discriminator
    without = draw._replace(discriminator=[[part._replace(noise=None)]])
    of_four, figures = gradients_of(lazy, draw, *[without] * 3)
    mean = torch.stack([gradients["discriminator"] for gradients in of_four]).mean(0)
    assert distance(mean, always["discriminator"]) < 1e-9
    assert [each["r1"] for each in figures] == pytest.approx([4 * whole["r1"], 0, 0, 0])
    assert whole["r1"] > 1e-6


def test_a_reused_forward_gives_the_same_gradients(run: Run, draw: Draw) -> None:
    (drawn_twice,), _ = gradients_of(run, draw)
    (reused,), _ = gradients_of(run.model_copy(update={"reuse_forward": True}), draw)
    assert not run.reuse_forward
    for network, gradients in drawn_twice.items():
        assert torch.equal(reused[network], gradients), network


def test_a_discriminator_that_sees_the_source_depends_on_it() -> None:
    config = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=3, condition_on_source=True)
    discriminator = build_discriminator(config)
    for block in discriminator.blocks:
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.5)
    x, labels, source = torch.randn(2, 4, 8, 8), torch.tensor([0, 2]), torch.randn(2, 4, 8, 8)
    seen, moved = discriminator(x, labels, None, source), discriminator(x, labels, None, source + 1)
    assert not torch.allclose(seen, moved)
    blind = build_discriminator(config.model_copy(update={"condition_on_source": False}))
    assert torch.equal(blind(x, labels, None, source), blind(x, labels))
