"""The monitor's probe: a cheap measure of the moving average's samples, without decoding them.

Features are those of a small network that is trained on the latents when a run starts. Network, noise, classes and the
real latents are functions of the seed, the same at every probe, so that probes differ by G alone.

Shapes: N samples, C, H, W of latents, F features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.objectives.base import Sampler
from afm_pipe.params import Run
from afm_pipe.training.kernel_distance import kid
from afm_pipe.training.rules import Probed

FEATURES = 64
SIDE = 8  # latents are averaged down to it, so that features cost the same at any size
BATCH = 64
LR = 2e-3
WORST = 1e12  # a distance that is not finite: logs hold numbers alone


class Probe:
    """Measures generators of one run; built at every start, always the same."""

    def __init__(self, latents: Latents, run: Run, device: torch.device) -> None:
        self.run, self.device = run, device
        self.body, self.head = _trained(latents, run, device)
        generator = stream_generator(run.seed, "probe")
        chosen = torch.randperm(latents.num_images, generator=generator)[: run.monitor.probe.samples]
        self.labels = torch.as_tensor(latents.labels)[chosen]  # (N,)
        real = latents.draw(chosen, generator)  # (N, C, H, W)
        self.noise = torch.randn(real.shape, generator=generator)
        self.dtype = real.dtype
        self.real_features, classes = self._seen(real)
        self.real_right = self._right(classes)
        self.real_within = _within(self.real_features, self.labels)
        self.real_spread = float(real.var(0).mean())

    @torch.no_grad()
    def __call__(self, sampler: Sampler) -> Probed:
        """Return the kernel distance, and relative to the data's: class accuracy, variances."""
        parts = zip(self.noise.split(self.run.batch_size), self.labels.split(self.run.batch_size), strict=True)
        samples = torch.cat(
            [sampler.sample(z.to(self.device), c.to(self.device)).cpu().to(self.dtype) for z, c in parts]
        )
        if not samples.isfinite().all():
            return {"kid": WORST, "class_accuracy": 0.0, "variance": 0.0, "spread": 0.0}
        features, classes = self._seen(samples)
        distance = kid(self.real_features.numpy(), features.numpy(), 1, len(features), self.run.seed)
        return {
            "kid": distance if math.isfinite(distance) else WORST,
            "class_accuracy": self._right(classes) / self.real_right,
            "variance": _within(features, self.labels) / self.real_within,
            "spread": float(samples.var(0).mean()) / self.real_spread,
        }

    def _right(self, classes: Tensor) -> float:
        """Return the share of classes (N,) that are the requested ones; never zero, since it is a divisor."""
        return max(float((classes == self.labels).float().mean()), 1 / len(classes))

    @torch.no_grad()
    def _seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, F) and classes (N,) of latents."""
        features = self.body(_small(x))
        return features, self.head(features).argmax(1)


def _trained(latents: Latents, run: Run, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Train the feature network to classify latents, on the CPU: it is tiny."""
    channels, updates = latents.latent_shape[0], run.monitor.probe.updates
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        side = min(latents.latent_shape[1], SIDE)
        body = nn.Sequential(
            nn.Conv2d(channels, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(48 * ((side + 1) // 2) ** 2, FEATURES),
        )
        head = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, latents.num_classes))
    weights = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LR, fused=True)
    order, labels = Order(latents.num_images, run.seed, "probe"), torch.as_tensor(latents.labels)
    for update in range(updates):
        indices = order.indices(update * BATCH, BATCH)
        x = latents.draw(indices, stream_generator(run.seed, "probe", update))
        optimizer.param_groups[0]["lr"] = LR * (1 - update / updates)
        loss = F.cross_entropy(head(body(_small(x))), labels[indices])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return body.requires_grad_(False), head.requires_grad_(False)


def _small(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, SIDE) if x.shape[-1] > SIDE else x


def _within(features: Tensor, labels: Tensor) -> float:
    """Return the variance within classes, summed over features."""
    x = features.double()
    total = sum(float((x[labels == c] - x[labels == c].mean(0)).square().sum()) for c in labels.unique())
    return total / len(x)
