"""The monitor's probe: a cheap measurement of samples from the EMA weights, without decoding them.

Features come from a network that classifies latents at full resolution: the guidance classifier, or a small network
trained at the start of the run. Network, noise, classes and real latents are functions of the seed, equal at every
probe, so that probes differ only by G. Every value comes with its standard error over samples.

Shapes: N samples; C, H, W of latents; F features; K classes.
"""

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import Order, stream_generator
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.objectives.base import Sampler
from afm_pipe.params import Run
from afm_pipe.training.kernel_distance import kid_with_error
from afm_pipe.training.rules import ProbeResult

FEATURES, MANY_FEATURES = 64, 256  # of the small network, with up to 64 classes and with more
LAST_SIDE = 4  # side of its last feature map
LR = 2e-3
WORST = 1e12  # replaces non-finite values, since logs hold finite numbers only
MIN_PER_CLASS = 2  # latents of a class; the variance of a single one is unknown

Estimate = tuple[float, float]  # a value and its standard error


class FeatureNetwork(Protocol):
    """Classifies latents."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (n, F) and class logits (n, K) of latents (n, C, H, W), on the CPU."""


class Probe:
    """Measures generators of a run; rebuilt identically whenever the run starts or resumes."""

    def __init__(self, latents: Latents, run: Run, device: torch.device, classifier: nn.Module | None = None) -> None:
        """Choose latents and noise; train the feature network unless a guidance `classifier` is given."""
        self.run, self.device = run, device
        self.network: FeatureNetwork = (
            _GuidanceFeatures(classifier, device, run.batch_size)
            if isinstance(classifier, LatentClassifier)
            else _train_small_network(latents, run)
        )
        generator = stream_generator(run.seed, "probe")
        chosen = choose_in_equal_shares(torch.as_tensor(latents.labels), run.monitor.probe.samples, generator)
        self.labels = torch.as_tensor(latents.labels)[chosen]  # (N,)
        real = latents.draw(chosen, generator)  # (N, C, H, W)
        self.noise = torch.randn(real.shape, generator=generator)
        self.dtype = real.dtype
        self.real = Figures.of(real, *self.network(real), self.labels)

    @torch.no_grad()
    def __call__(self, sampler: Sampler) -> ProbeResult:
        """Return the kernel distance, and class accuracy and variances over those of the data, with standard errors."""
        parts = zip(self.noise.split(self.run.batch_size), self.labels.split(self.run.batch_size), strict=True)
        drawn = [sampler.sample(z.to(self.device), labels.to(self.device)) for z, labels in parts]
        samples = torch.cat([each.cpu().to(self.dtype) for each in drawn])
        if not samples.isfinite().all():
            figures = {"kid": WORST, "class_accuracy": 0.0, "variance": 0.0, "spread": 0.0}
            return figures | {f"{name}_error": 0.0 for name in figures}
        measured = Figures.of(samples, *self.network(samples), self.labels)
        distance, error = kid_with_error(self.real.features.numpy(), measured.features.numpy())
        probed = {"kid": distance, "kid_error": error}
        for name in ("class_accuracy", "variance", "spread"):
            value, real = getattr(measured, name), getattr(self.real, name)
            probed |= dict(zip((name, f"{name}_error"), _ratio(value, real), strict=True))
        return {name: value if math.isfinite(value) else WORST for name, value in probed.items()}


class Figures(NamedTuple):
    """Statistics of N latents, each with its standard error."""

    features: Tensor  # (N, F)
    class_accuracy: Estimate
    variance: Estimate
    spread: Estimate

    @classmethod
    def of(cls, x: Tensor, features: Tensor, logits: Tensor, labels: Tensor) -> "Figures":
        """Compute them for latents x (N, C, H, W) with features (N, F), class logits (N, K) and labels (N,)."""
        count = len(x)
        accuracy = max(float((logits.argmax(1) == labels).float().mean()), 1 / count)  # positive, since it is a divisor
        deviations = (x - x.mean(0)).square().flatten(1).mean(1)  # (N,)
        spread = float(deviations.mean()), float(deviations.std()) / math.sqrt(count)
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        return cls(features, (accuracy, error), _variance_within_classes(features, labels), spread)


class _GuidanceFeatures:
    """The guidance classifier at time 0; its features are the inputs of its head."""

    def __init__(self, classifier: LatentClassifier, device: torch.device, batch_size: int) -> None:
        self.classifier, self.device, self.batch_size = classifier, device, batch_size

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = [], []
        for part in x.split(self.batch_size):
            hidden = self.classifier.features(part.to(self.device), torch.zeros(len(part), device=self.device))
            features.append(hidden.cpu())
            logits.append(self.classifier.head(hidden).cpu())
        return torch.cat(features), torch.cat(logits)


class _SmallNetwork:
    """A small convolutional network on the CPU."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        self.body, self.head = body, head

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.cat([self.body(part) for part in x.split(1000)])
        return features, self.head(features)


def _train_small_network(latents: Latents, run: Run) -> _SmallNetwork:
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
    return _SmallNetwork(body.requires_grad_(False), head.requires_grad_(False))


def choose_in_equal_shares(labels: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Choose up to `samples` images in equal shares of the classes, at least two per class.

    If that is more than `samples`, only some of the classes are chosen.
    """
    order = torch.randperm(len(labels), generator=generator)
    classes = labels[order].unique()
    per_class = max(samples // len(classes), MIN_PER_CLASS)
    wanted = classes[torch.randperm(len(classes), generator=generator)[: max(samples // per_class, 1)]]
    counts, chosen = dict.fromkeys(wanted.tolist(), 0), []
    for index in order.tolist():
        label = int(labels[index])
        if label in counts and counts[label] < per_class:
            counts[label] += 1
            chosen.append(index)
    return torch.tensor(chosen)


def _variance_within_classes(features: Tensor, labels: Tensor) -> Estimate:
    """Return the variance within classes, summed over features, and its error from the scatter over classes.

    Classes of one sample are left out; if there are no others, the variance is unknown: 1, with an infinite error.
    """
    x, totals, counts = features.double(), [], []
    for label in labels.unique():
        members = x[labels == label]
        if len(members) >= MIN_PER_CLASS:
            totals.append(float((members - members.mean(0)).square().sum()))
            counts.append(len(members) - 1)
    if not totals:
        return 1.0, math.inf
    value = sum(totals) / sum(counts)
    if len(totals) < MIN_PER_CLASS:
        return value, value * math.sqrt(2 / sum(counts))
    excess = [total - value * count for total, count in zip(totals, counts, strict=True)]
    error = math.sqrt(sum(each**2 for each in excess) * len(totals) / (len(totals) - 1)) / sum(counts)
    return value, error


def _ratio(value: Estimate, real: Estimate) -> Estimate:
    """Return the ratio of an estimate to that of the data, with its error."""
    ratio = value[0] / real[0] if real[0] else 1.0
    relative = math.hypot(value[1] / value[0] if value[0] else 0.0, real[1] / real[0] if real[0] else math.inf)
    return ratio, ratio * relative
