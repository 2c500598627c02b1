"""Training on a line: the pipeline's own losses, and flow matching beside them; all seeds of a setting at once.

Shapes: S seeds, N batch, n its penalised part. Seeds share no weight and no draw, and what a seed draws is the same
in every setting, so that settings differ by what they set alone.
"""

import copy
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from afm_pipe.objectives.adversarial_flow.guidance import guide_to_data
from afm_pipe.objectives.adversarial_flow.losses import (
    Logits,
    interpolate,
    moved,
    relativistic,
    step_weighting,
    transport_cost,
)
from afm_pipe.objectives.adversarial_flow.terms import D_TERMS, Judged
from afm_pipe.objectives.schedules import ema_decay_at
from afm_pipe.params import Ema, Guidance, Toy
from afm_pipe.runtime.progress import Progress
from afm_pipe.study.toy import mixture
from afm_pipe.study.toy.networks import CODES, Mlps, codes

_UPDATES_PER_TICK = 20


class Setting(NamedTuple):
    """What one adversarial training is made with. `guidance` None: without classes, else the class is a condition."""

    steps: int
    transport: float
    updates: int
    conditional: bool = False
    guidance: Guidance | None = None


class Batch(NamedTuple):
    """One batch of each seed: x_s to start from, x_t to arrive at, their times, and classes; (S, N) each."""

    source: Tensor
    target: Tensor
    s: Tensor
    t: Tensor
    labels: Tensor


class Map(nn.Module):
    """Takes x_s to x_t: in one step directly, in several in residual form, x_s - (s - t) g(x_s, s, t); (S, N) each."""

    def __init__(self, network: Mlps, steps: int, conditional: bool) -> None:
        super().__init__()
        self.network, self.steps, self.conditional = network, steps, conditional

    def forward(self, x: Tensor, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        times = () if self.steps == 1 else (s, t)
        output = self.network(_features(x, times, labels if self.conditional else None))
        return output if self.steps == 1 else x - (s - t) * output


class Velocity(nn.Module):
    """Flow matching's map: one Euler step along the learned velocity v(x_s, s), so any number of steps."""

    def __init__(self, network: Mlps) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x - (s - t) * self.network(_features(x, (s,), None))


class Posterior(nn.Module):
    """The classifier that guides: known exactly here, where the paper trains one."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return mixture.log_posterior(x_t, t)


def train_adversarially(setting: Setting, toy: Toy, seed: int, device: torch.device) -> Generator[Progress, None, Map]:
    """Train a generator per seed against a discriminator per seed; return the generators' moving average."""
    generator = torch.Generator().manual_seed(seed)
    times = 0 if setting.steps == 1 else 1  # the discriminator's; a generator has source and target time
    networks = [
        Mlps(toy.seeds, CODES * (numbers + setting.conditional), toy.width, generator).to(device)
        for numbers in (1 + 2 * times, 1 + times)
    ]
    online, critic = networks
    g, average = (Map(network, setting.steps, setting.conditional) for network in (online, _copy(online)))
    g_optimizer, d_optimizer = (
        torch.optim.Adam(network.parameters(), lr=toy.lr, betas=toy.betas) for network in networks
    )
    batches = _batches(setting.steps, toy, generator, device)
    penalised = round(toy.batch_size * toy.penalty.batch_fraction)
    for update in range(setting.updates):
        noise = torch.randn(2, toy.seeds, penalised, generator=generator).to(device)  # (2, S, n)
        d_optimizer.zero_grad()
        _discriminator_loss(g, critic, next(batches), noise, toy).backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        critic.requires_grad_(False)
        _generator_loss(g, critic, next(batches), setting, generator).backward()
        critic.requires_grad_(True)
        g_optimizer.step()
        _follow(average, g, toy.ema, update)
        if (update + 1) % _UPDATES_PER_TICK == 0 or update + 1 == setting.updates:
            yield Progress(update + 1, setting.updates, "updates")
    return average


def train_flow(toy: Toy, seed: int, device: torch.device) -> Generator[Progress, None, Velocity]:
    """Train flow matching, mean (v(x_s, s) - (z - x))^2 at s ~ U(0, 1), per seed; return the moving average."""
    generator = torch.Generator().manual_seed(seed)
    network = Mlps(toy.seeds, CODES * 2, toy.width, generator).to(device)
    average = _copy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=toy.lr, betas=toy.betas)
    shape = (toy.seeds, toy.batch_size)
    for update in range(toy.flow_updates):
        x, _ = mixture.draw(shape, generator)
        z, s = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        x, z, s = (value.to(device) for value in (x, z, s))
        optimizer.zero_grad()
        guess = network(_features(interpolate(x, z, s), (s,), None))  # (S, N)
        F.mse_loss(guess, z - x, reduction="none").mean(1).sum().backward()
        optimizer.step()
        _follow(average, network, toy.ema, update)
        if (update + 1) % _UPDATES_PER_TICK == 0 or update + 1 == toy.flow_updates:
            yield Progress(update + 1, toy.flow_updates, "updates")
    return Velocity(average)


@torch.no_grad()
def carry(flow: nn.Module, noise: Tensor, steps: int, labels: Tensor) -> Tensor:
    """Take noise (S, N) of classes (S, N) to data in equal steps."""
    x, times = noise, torch.linspace(1, 0, steps + 1, device=noise.device)
    for s, t in zip(times[:-1], times[1:], strict=True):
        x = flow(x, s.expand_as(x), t.expand_as(x), labels)
    return x


def _batches(steps: int, toy: Toy, generator: torch.Generator, device: torch.device) -> Iterator[Batch]:
    shape = (toy.seeds, toy.batch_size)
    while True:
        x, labels = mixture.draw(shape, generator)
        z, step = torch.randn(shape, generator=generator), torch.randint(1, steps + 1, shape, generator=generator)
        s, t = step / steps, (step - 1) / steps
        batch = (interpolate(x, z, s), interpolate(x, z, t), s, t, labels)  # of the same noise, as in the paper's toy
        yield Batch(*(value.to(device) for value in batch))


def _discriminator_loss(g: Map, critic: Mlps, batch: Batch, noise: Tensor, toy: Toy) -> Tensor:
    """Return D's loss, summed over seeds, of one D forward over 2 N + 2 n numbers."""
    epsilon, n = toy.penalty.epsilon, noise.shape[-1]
    with torch.no_grad():
        fake = g(batch.source, batch.s, batch.t, batch.labels)  # (S, N)
    ends = [batch.target, fake]
    everything = torch.cat(ends + [moved(x[:, :n], z, epsilon) for x, z in zip(ends, noise, strict=True)], dim=1)
    t, labels = (torch.cat([value, value, value[:, :n], value[:, :n]], dim=1) for value in (batch.t, batch.labels))
    sizes = [toy.batch_size, toy.batch_size, n, n]
    logits = Logits(*_judge(g, critic, everything, t, labels).split(sizes, dim=1))
    weighting = step_weighting(batch.s, batch.t)[:, :n]

    def of_seed(logits: Logits, weighting: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.value(Judged(logits, epsilon, weighting)) for each in D_TERMS)

    adversarial, r1, r2, centering = vmap(of_seed)(logits, weighting)  # (S,) each
    return (adversarial + toy.penalty.weight * (r1 + r2) + toy.logit_centering * centering).sum()


def _generator_loss(g: Map, critic: Mlps, batch: Batch, setting: Setting, generator: torch.Generator) -> Tensor:
    """Return G's loss, summed over seeds."""
    fake = g(batch.source, batch.s, batch.t, batch.labels)  # (S, N)
    with torch.no_grad():
        real_logits = _judge(g, critic, batch.target, batch.t, batch.labels)
    adversarial = vmap(relativistic)(_judge(g, critic, fake, batch.t, batch.labels), real_logits)
    transport = vmap(transport_cost)(fake[..., None], batch.source[..., None], step_weighting(batch.s, batch.t))
    loss = (adversarial + setting.transport * transport).sum()
    if setting.guidance is None:
        return loss
    labels = batch.labels.flatten()  # the guidance loss is a mean over samples: over those of all seeds, times seeds
    guide = guide_to_data(Posterior(), setting.guidance, labels, tuple(labels.shape), generator)
    return loss + len(fake) * guide(fake.flatten())


def _judge(g: Map, critic: Mlps, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    times = () if g.steps == 1 else (t,)
    return critic(_features(x, times, labels if g.conditional else None))  # (S, N)


def _features(x: Tensor, times: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
    """Return what a network sees of x, times and classes (S, N): (S, N, F)."""
    seen = [codes(value) for value in (x, *times)]
    if labels is not None:
        seen.append(codes(labels - (mixture.CLASSES - 1) / 2))  # centred numbers, as far apart as the data
    return torch.cat(seen, dim=-1)


def _copy(network: Mlps) -> Mlps:
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def _follow(average: nn.Module, online: nn.Module, ema: Ema, update: int) -> None:
    new = [parameter.detach() for parameter in online.parameters()]
    torch._foreach_lerp_(list(average.parameters()), new, 1 - ema_decay_at(ema, update))
