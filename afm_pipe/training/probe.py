"""The monitor's probe: a cheap measure of the moving average's samples, without decoding them.

Features are those of a network that classifies latents at full resolution: the classifier that guides the run, or a
small one trained when the run starts. Network, noise, classes and the real latents are functions of the seed, the same
at every probe, so that probes differ by G alone. Every figure comes with its standard error over samples.

Shapes: N samples, C, H, W of latents, F features, K classes.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.objectives.base import Sampler
from afm_pipe.params import Run
from afm_pipe.training.kernel_distance import kid_with_error
from afm_pipe.training.rules import Probed

FEATURES, MANY_FEATURES = 64, 256  # of the small network: with up to 64 classes, and with more
LAST_SIDE = 4  # of its last feature map
LR = 2e-3
WORST = 1e12  # a figure or an error that is not finite: logs hold numbers alone
LEAST = 2  # latents of a class: of one, no variance is known


Estimate = tuple[float, float]  # a value and its standard error


class FeatureNetwork(Protocol):
    """Sees latents."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (n, F) and class logits (n, K) of latents (n, C, H, W), on the CPU."""


class Probe:
    """Measures generators of one run; rebuilt at every start, always the same."""

    def __init__(self, latents: Latents, run: Run, device: torch.device, classifier: nn.Module | None = None) -> None:
        """Choose latents and noise, and train the feature network unless there is a `classifier` to see with."""
        self.run, self.device = run, device
        self.see: FeatureNetwork = (
            _Guide(classifier, device, run.batch_size)
            if isinstance(classifier, LatentClassifier)
            else _trained(latents, run)
        )
        generator = stream_generator(run.seed, "probe")
        chosen = equal_shares(torch.as_tensor(latents.labels), run.monitor.probe.samples, generator)
        self.labels = torch.as_tensor(latents.labels)[chosen]  # (N,)
        real = latents.draw(chosen, generator)  # (N, C, H, W)
        self.noise = torch.randn(real.shape, generator=generator)
        self.dtype = real.dtype
        self.real = Figures.of(real, *self.see(real), self.labels)

    @torch.no_grad()
    def __call__(self, sampler: Sampler) -> Probed:
        """Return the kernel distance, and relative to the data's: class accuracy and variances; with their errors."""
        parts = zip(self.noise.split(self.run.batch_size), self.labels.split(self.run.batch_size), strict=True)
        drawn = [sampler.sample(z.to(self.device), labels.to(self.device)) for z, labels in parts]
        samples = torch.cat([each.cpu().to(self.dtype) for each in drawn])
        if not samples.isfinite().all():
            figures = {"kid": WORST, "class_accuracy": 0.0, "variance": 0.0, "spread": 0.0}
            return figures | {f"{name}_error": 0.0 for name in figures}
        found = Figures.of(samples, *self.see(samples), self.labels)
        distance, error = kid_with_error(self.real.features.numpy(), found.features.numpy())
        probed = {"kid": distance, "kid_error": error}
        for name in ("class_accuracy", "variance", "spread"):
            value, real = getattr(found, name), getattr(self.real, name)
            probed |= dict(zip((name, f"{name}_error"), _ratio(value, real), strict=True))
        return {name: value if math.isfinite(value) else WORST for name, value in probed.items()}


class Figures:
    """Figures of N latents: each a value and its standard error."""

    def __init__(
        self,
        features: Tensor,
        accuracy: tuple[float, float],
        variance: tuple[float, float],
        spread: tuple[float, float],
    ) -> None:
        self.features, self.class_accuracy, self.variance, self.spread = features, accuracy, variance, spread

    @classmethod
    def of(cls, x: Tensor, features: Tensor, logits: Tensor, labels: Tensor) -> "Figures":
        """Return the figures of latents x (N, C, H, W) with features (N, F), class logits (N, K) and labels (N,)."""
        count = len(x)
        right = max(float((logits.argmax(1) == labels).float().mean()), 1 / count)  # never zero: it is a divisor
        deviations = (x - x.mean(0)).square().flatten(1).mean(1)  # (N,)
        spread = float(deviations.mean()), float(deviations.std()) / math.sqrt(count)
        return cls(features, (right, math.sqrt(right * (1 - right) / count)), _within(features, labels), spread)


class _Guide:
    """The classifier that guides the run, at time 0; its features are those its head sees."""

    def __init__(self, classifier: LatentClassifier, device: torch.device, batch_size: int) -> None:
        self.classifier, self.device, self.batch_size = classifier, device, batch_size

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = [], []
        for part in x.split(self.batch_size):
            seen = self.classifier.features(part.to(self.device), torch.zeros(len(part), device=self.device))
            features.append(seen.cpu())
            logits.append(self.classifier.head(seen).cpu())
        return torch.cat(features), torch.cat(logits)


class _Small:
    """A small convolutional network on the CPU."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        self.body, self.head = body, head

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.cat([self.body(part) for part in x.split(1000)])
        return features, self.head(features)


def _trained(latents: Latents, run: Run) -> _Small:
    """Train a feature network to classify latents."""
    settings, (channels, side, _) = run.monitor.probe, latents.latent_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        layers: list[nn.Module] = [nn.Conv2d(channels, settings.width, 3, padding=1), nn.SiLU()]
        width = settings.width
        while side > LAST_SIDE:
            wider = min(2 * width, 4 * settings.width)
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.SiLU()]
            width, side = wider, (side + 1) // 2
        features = FEATURES if latents.num_classes <= FEATURES else MANY_FEATURES
        body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side**2, features))
        head = nn.Sequential(nn.SiLU(), nn.Linear(features, latents.num_classes))
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=LR, fused=True)
    order, labels = Order(latents.num_images, run.seed, "probe"), torch.as_tensor(latents.labels)
    for update in range(settings.updates):
        indices = order.indices(update * settings.batch_size, settings.batch_size)
        x = latents.draw(indices, stream_generator(run.seed, "probe", update))
        optimizer.param_groups[0]["lr"] = LR * (1 - update / settings.updates)
        loss = F.cross_entropy(head(body(x)), labels[indices])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return _Small(body.requires_grad_(False), head.requires_grad_(False))


def equal_shares(labels: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Choose at most `samples` of the data set, in equal shares of its classes: at least two of a class.

    Where that is more than `samples`, only some classes are chosen.
    """
    order = torch.randperm(len(labels), generator=generator)
    classes = labels[order].unique()
    per_class = max(samples // len(classes), LEAST)
    wanted = classes[torch.randperm(len(classes), generator=generator)[: max(samples // per_class, 1)]]
    counts, chosen = dict.fromkeys(wanted.tolist(), 0), []
    for index in order.tolist():
        label = int(labels[index])
        if label in counts and counts[label] < per_class:
            counts[label] += 1
            chosen.append(index)
    return torch.tensor(chosen)


def _within(features: Tensor, labels: Tensor) -> Estimate:
    """Return the variance within classes, summed over features, and its error, from the scatter over classes.

    Classes of one sample have none; without any other the variance is unknown: 1, with a boundless error.
    """
    x, totals, counts = features.double(), [], []
    for label in labels.unique():
        members = x[labels == label]
        if len(members) >= LEAST:
            totals.append(float((members - members.mean(0)).square().sum()))
            counts.append(len(members) - 1)
    if not totals:
        return 1.0, math.inf
    value = sum(totals) / sum(counts)
    if len(totals) < LEAST:
        return value, value * math.sqrt(2 / sum(counts))
    excess = [total - value * count for total, count in zip(totals, counts, strict=True)]
    error = math.sqrt(sum(each**2 for each in excess) * len(totals) / (len(totals) - 1)) / sum(counts)
    return value, error


def _ratio(value: Estimate, real: Estimate) -> Estimate:
    """Return a figure over the data's, and the error of that."""
    ratio = value[0] / real[0] if real[0] else 1.0
    relative = math.hypot(value[1] / value[0] if value[0] else 0.0, real[1] / real[0] if real[0] else math.inf)
    return ratio, ratio * relative
