"""Training of the toy experiment: the pipeline's losses, and flow matching for comparison, for all seeds at once.

Shapes: S seeds, N batch, n its penalized part. Seeds share neither weights nor random draws. A seed draws the same
numbers in every setting, so that runs differ only by their settings.
"""

import copy
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from afm_pipe.objectives.adversarial_flow.guidance import one_step_guidance
from afm_pipe.objectives.adversarial_flow.losses import (
    gradient_penalty,
    interpolate,
    logit_centering,
    perturb,
    relativistic,
    step_weighting,
    transport_cost,
)
from afm_pipe.objectives.adversarial_flow.normalizer import divisor
from afm_pipe.objectives.schedules import ema_decay_at
from afm_pipe.params import Ema, Guidance, Toy
from afm_pipe.runtime.progress import Progress
from afm_pipe.study.toy import mixture
from afm_pipe.study.toy.networks import EMBEDDING, Map, Mlps, Posterior, Velocity, embed

NORMALIZATION_DECAY = 0.9  # as `train.gradient_normalization.decay`


class Setting(NamedTuple):
    """The settings of one adversarial training; `guidance` requires `conditional`."""

    steps: int
    transport: float
    updates: int
    conditional: bool = False
    guidance: Guidance | None = None
    discriminator_updates: int = 1
    normalized: bool = False
    """Divide the adversarial gradient at G's output by a running mean of its norm, seed by seed."""


class Batch(NamedTuple):
    """One batch per seed: source x_s, target x_t, their times, and classes; (S, N) each."""

    source: Tensor
    target: Tensor
    s: Tensor
    t: Tensor
    labels: Tensor


class Trained(NamedTuple):
    """The moving average of the generators, and the generators and discriminators at the end."""

    average: Map
    generator: Map
    discriminator: Mlps


def train_adversarially(
    setting: Setting, toy: Toy, seed: int, device: torch.device
) -> Generator[Progress, None, Trained]:
    """Train a generator per seed against a discriminator per seed."""
    generator = torch.Generator().manual_seed(seed)
    times = 0 if setting.steps == 1 else 1  # of D; G has source and target time
    networks = [
        Mlps(toy.seeds, EMBEDDING * (numbers + setting.conditional), toy.width, generator).to(device)
        for numbers in (1 + 2 * times, 1 + times)
    ]
    online, d = networks
    g, average = (Map(network, setting.steps, setting.conditional) for network in (online, _frozen_copy(online)))
    g_optimizer, d_optimizer = (
        torch.optim.Adam(network.parameters(), lr=toy.lr, betas=toy.betas) for network in networks
    )
    batches = _batches(setting.steps, toy, generator, device)
    mean_square = torch.zeros(toy.seeds, device=device) if setting.normalized else None
    for update in range(setting.updates):
        for _ in range(setting.discriminator_updates):
            _update_discriminator(g, d, d_optimizer, batches, toy, generator)
        g_optimizer.zero_grad()
        d.requires_grad_(False)
        _generator_loss(g, d, next(batches), setting, generator, mean_square).backward()
        d.requires_grad_(True)
        g_optimizer.step()
        _update_ema(average, g, toy.ema, update)
        yield Progress(update + 1, setting.updates, "updates")
    return Trained(average, g, d)


def discriminator_gap(trained: Trained, toy: Toy, updates: int, seed: int, device: torch.device) -> float:
    """Return the fraction by which the loss of D falls in `updates` more against the same G: 0 at its optimum."""
    generator = torch.Generator().manual_seed(seed)
    g, d = trained.generator, copy.deepcopy(trained.discriminator)
    optimizer = torch.optim.Adam(d.parameters(), lr=toy.lr, betas=toy.betas)
    batches = _batches(g.steps, toy, generator, device)
    losses = [_update_discriminator(g, d, optimizer, batches, toy, generator) for _ in range(updates)]
    ends = max(updates // 10, 1)
    return 1 - sum(losses[-ends:]) / sum(losses[:ends])


def train_flow(toy: Toy, seed: int, device: torch.device) -> Generator[Progress, None, Velocity]:
    """Train flow matching per seed, mean (v(x_s, s) - (z - x))^2 at s ~ U(0, 1); return the moving average."""
    generator = torch.Generator().manual_seed(seed)
    network = Mlps(toy.seeds, EMBEDDING * 2, toy.width, generator).to(device)
    average = _frozen_copy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=toy.lr, betas=toy.betas)
    shape = (toy.seeds, toy.batch_size)
    for update in range(toy.flow_updates):
        x, _ = mixture.draw(shape, generator)
        z, s = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        x, z, s = (value.to(device) for value in (x, z, s))
        optimizer.zero_grad()
        velocity = network(embed(interpolate(x, z, s), s))  # (S, N)
        F.mse_loss(velocity, z - x, reduction="none").mean(1).sum().backward()
        optimizer.step()
        _update_ema(average, network, toy.ema, update)
        yield Progress(update + 1, toy.flow_updates, "updates")
    return Velocity(average)


def _batches(steps: int, toy: Toy, generator: torch.Generator, device: torch.device) -> Iterator[Batch]:
    shape = (toy.seeds, toy.batch_size)
    while True:
        x, labels = mixture.draw(shape, generator)
        z, step = torch.randn(shape, generator=generator), torch.randint(1, steps + 1, shape, generator=generator)
        s, t = step / steps, (step - 1) / steps
        batch = (interpolate(x, z, s), interpolate(x, z, t), s, t, labels)  # both of one noise, as in the paper's toy
        yield Batch(*(value.to(device) for value in batch))


def _update_discriminator(
    g: Map, d: Mlps, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], toy: Toy, generator: torch.Generator
) -> float:
    """Make one step of D on a fresh batch; return the loss before it, summed over seeds."""
    penalized = round(toy.batch_size * toy.penalty.batch_fraction)
    noise = torch.randn(2, toy.seeds, penalized, generator=generator)  # (2, S, n)
    optimizer.zero_grad()
    batch = next(batches)
    loss = _discriminator_loss(g, d, batch, noise.to(batch.source.device), toy)
    loss.backward()
    optimizer.step()
    return loss.item()


def _discriminator_loss(g: Map, d: Mlps, batch: Batch, noise: Tensor, toy: Toy) -> Tensor:
    """Return D's loss, summed over seeds, from one forward pass over 2 N + 2 n numbers."""
    penalty, n = toy.penalty, noise.shape[-1]
    with torch.no_grad():
        fake = g(batch.source, batch.s, batch.t, batch.labels)  # (S, N)
    ends = [batch.target, fake]
    x = torch.cat(ends + [perturb(x[:, :n], z, penalty.epsilon) for x, z in zip(ends, noise, strict=True)], dim=1)
    t, labels = (torch.cat([value, value, value[:, :n], value[:, :n]], dim=1) for value in (batch.t, batch.labels))
    logits = _judge(g, d, x, t, labels).split([toy.batch_size, toy.batch_size, n, n], dim=1)

    def loss(logits: tuple[Tensor, ...], weighting: Tensor) -> Tensor:
        real, fake, real_perturbed, fake_perturbed = logits
        adversarial = relativistic(real, fake)
        r1 = gradient_penalty(real[:n], real_perturbed, penalty.epsilon, weighting)
        r2 = gradient_penalty(fake[:n], fake_perturbed, penalty.epsilon, weighting)
        centering = logit_centering(real, fake)
        return adversarial + penalty.weight * (r1 + r2) + toy.logit_centering * centering

    return vmap(loss)(logits, step_weighting(batch.s, batch.t)[:, :n]).sum()


def _generator_loss(
    g: Map,
    d: Mlps,
    batch: Batch,
    setting: Setting,
    generator: torch.Generator,
    mean_square: Tensor | None = None,
) -> Tensor:
    """Return G's loss, summed over seeds; `mean_square` (S,) is the state of gradient normalization, or None."""
    fake = g(batch.source, batch.s, batch.t, batch.labels)  # (S, N)
    judged = fake.view_as(fake)
    if mean_square is not None:
        judged.register_hook(lambda gradient: _normalized(gradient, mean_square))
    with torch.no_grad():
        real_logits = _judge(g, d, batch.target, batch.t, batch.labels)
    adversarial = vmap(relativistic)(_judge(g, d, judged, batch.t, batch.labels), real_logits)
    cost = vmap(transport_cost)(fake[..., None], batch.source[..., None], step_weighting(batch.s, batch.t))
    loss = (adversarial + setting.transport * cost).sum()
    if setting.guidance is None:
        return loss
    labels = batch.labels.flatten()
    guide = one_step_guidance(Posterior(), setting.guidance, labels, tuple(labels.shape), generator)
    return loss + len(fake) * guide(fake.flatten())  # `guide` is a mean over the samples of all seeds


def _normalized(gradient: Tensor, mean_square: Tensor) -> Tensor:
    """Return gradients (S, N) over their running root mean square."""
    square_sum = gradient.square().sum(1)
    return gradient / divisor(mean_square, square_sum, gradient.shape[1], NORMALIZATION_DECAY)[:, None]


def _judge(g: Map, d: Mlps, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Return D's logits (S, N); D sees the target time and the class if G does."""
    times = () if g.steps == 1 else (t,)
    return d(embed(x, *times, labels=labels if g.conditional else None))


def _frozen_copy(network: Mlps) -> Mlps:
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def _update_ema(average: nn.Module, online: nn.Module, ema: Ema, update: int) -> None:
    new = [parameter.detach() for parameter in online.parameters()]
    torch._foreach_lerp_(list(average.parameters()), new, 1 - ema_decay_at(ema, update))
