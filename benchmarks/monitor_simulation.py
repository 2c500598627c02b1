"""What the monitor's rules do at 1,000 classes, simulated: false alarms, a partial collapse, a plateau.

    python -m benchmarks.monitor_simulation

The noise of a probe's figures is measured first, by the probe's own code on features of 1,000 classes (Gaussian
classes, a classifier of about `--accuracy`), at the ImageNet profile's number of samples; then whole runs are drawn
with that noise and given to the rules as they stand. It takes a minute or two.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from afm_pipe.models.model_files import run_config
from afm_pipe.params import Run
from afm_pipe.params.file import load_params
from afm_pipe.planning.counting import measure
from afm_pipe.training.kernel_distance import kid_with_error
from afm_pipe.training.probe import Figures
from afm_pipe.training.rules import ProbeResult, collapse, spread_lost, stopped_improving

PROFILE = Path(__file__).parents[1] / "profiles" / "imagenet256.yaml"
CLASSES, FEATURES = 1000, 256
PROBES = 60  # of a run
AWAY = 0.15  # shift of the samples' features, in their deviations: G is not perfect
RUNS = 2000


class World:
    """Features of real latents, and of an equally good generator at every probe."""

    def __init__(self, samples: int, accuracy: float) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.samples = samples
        self.labels = torch.arange(samples) % CLASSES
        # Class means at a distance at which a nearest-mean classifier has about the accuracy wanted.
        self.means = self._separation(accuracy) * self._normal(CLASSES, FEATURES) / math.sqrt(FEATURES)
        self.real = self.draw()

    def draw(self, away: float = 0.0, collapsed: int = 0) -> torch.Tensor:
        """Draw features of all samples; those of the first `collapsed` classes fall onto one class, and a point."""
        noise = self._normal(self.samples, FEATURES)
        features = self.means[self.labels] + noise + away * self._normal(1, FEATURES) / math.sqrt(FEATURES)
        if collapsed:
            hit = self.labels < collapsed
            features[hit] = self.means[0] + 0.1 * noise[hit]
        return features

    def figures(self, features: torch.Tensor) -> Figures:
        """Return the probe's figures of features; latents are the features themselves."""
        logits = features @ self.means.T - 0.5 * self.means.square().sum(1)
        return Figures.of(features, features, logits, self.labels)

    def _separation(self, accuracy: float) -> float:
        low, high = 1.0, 30.0
        for _ in range(12):
            middle = (low + high) / 2
            self.means = middle * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
            self.means /= math.sqrt(FEATURES)
            chosen = torch.arange(2000) % CLASSES
            seen = self.means[chosen] + torch.randn(2000, FEATURES, generator=torch.Generator().manual_seed(2))
            logits = seen @ self.means.T - 0.5 * self.means.square().sum(1)
            right = float((logits.argmax(1) == chosen).float().mean())
            low, high = (middle, high) if right < accuracy else (low, middle)
        return low

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)


def measured(world: World, collapsed: int = 0) -> ProbeResult:
    """Return one probe, by the probe's own code."""
    real, found = world.figures(world.real), world.figures(world.draw(AWAY, collapsed))
    kid, error = kid_with_error(world.real.numpy(), found.features.numpy())
    probed = {"kid": kid, "kid_error": error}
    for name in ("class_accuracy", "variance", "spread"):
        value, of_real = getattr(found, name), getattr(real, name)
        ratio = value[0] / of_real[0]
        probed |= {name: ratio, f"{name}_error": ratio * math.hypot(value[1] / value[0], of_real[1] / of_real[0])}
    return probed


def runs(
    run: Run, healthy: ProbeResult, random: np.random.Generator, after: ProbeResult | None = None, at: int = PROBES
) -> list[ProbeResult]:
    """Draw a run of probes with the noise of `healthy`; from `at` on with the figures of `after`."""
    found = []
    for index in range(PROBES):
        base = healthy if after is None or index < at else after
        values = {name: base[name] for name in ("kid", "class_accuracy", "variance", "spread")}
        noisy = {name: value + base[f"{name}_error"] * random.standard_normal() for name, value in values.items()}
        clock = {"update": 5000 * (index + 1), "epoch": run.monitor.settle_epochs + index}
        found.append(clock | noisy | {f"{name}_error": base[f"{name}_error"] for name in values})
    return found


def first_alarm(run: Run, probes: list[ProbeResult]) -> int | None:
    """Return the probe at which the rules of probes first fire."""
    for index in range(len(probes)):
        seen = probes[: index + 1]
        if spread_lost(run, seen) or collapse(run, seen):
            return index
    return None


def told(run: Run, noise: float, slope: float, random: np.random.Generator) -> float:
    """Return how often a run that improves by `slope` a probe is called a plateau after one window of probes."""
    window, hits = run.monitor.stagnation.probes, 0
    for _ in range(RUNS):
        level = [(1 - slope) ** index for index in range(window)]
        probes: list[Any] = [
            {
                "update": index + 1,
                "epoch": run.monitor.settle_epochs,
                "kid": value * (1 + noise * random.standard_normal()),
                "kid_error": noise * value,
            }
            for index, value in enumerate(level)
        ]
        hits += stopped_improving(run, probes)
    return hits / RUNS


def main(accuracy: Annotated[float, typer.Option(help="Of the feature network, on real latents.")] = 0.4) -> None:
    """Print what was found."""
    torch.set_num_threads(1)
    params = load_params(PROFILE)
    run = next(iter(params.runs.values()))
    settings, random = run.monitor, np.random.default_rng(0)
    samples = settings.probe.samples
    world = World(samples, accuracy)
    healthy, hit = measured(world), measured(world, collapsed=CLASSES // 10)
    config = run_config(run, (4, 32, 32), CLASSES)
    updates = 1_281_167 / run.batch_size * settings.probe.every_epochs
    unit = measure(run, config, 16)
    cost = samples / (unit.units * run.batch_size)
    print(f"{samples:,} samples, {samples // CLASSES} a class of {CLASSES:,}; rules at {settings.significance} errors")
    print(f"A probe's samples cost {cost:.1f} updates of {run.size} of the {updates:,.0f} between two probes.")
    for name in ("kid", "class_accuracy", "variance", "spread"):
        error = healthy[f"{name}_error"]
        print(
            f"  {name:<15} {healthy[name]:.4g} ± {error:.2g} ({error / abs(healthy[name]):.1%}), "
            f"collapsed {hit[name]:.4g}"
        )
    alarms = [first_alarm(run, runs(run, healthy, random)) for _ in range(RUNS)]
    print(f"False alarms in {PROBES} probes: {sum(each is not None for each in alarms) / RUNS:.2%} of {RUNS:,} runs")
    at = PROBES // 2
    noticed = [first_alarm(run, runs(run, healthy, random, hit, at)) for _ in range(RUNS // 10)]
    late = [each - at + 1 if each is not None and each >= at else math.inf for each in noticed]
    share = sum(each <= 5 for each in late) / len(late)
    print(
        f"A tenth of the classes collapsed: noticed within 5 probes in {share:.1%} of runs "
        f"(median {np.median(late):.0f})"
    )
    noise = healthy["kid_error"] / healthy["kid"]
    for each in (noise, 0.1):
        print(f"Plateau against improvement, after {settings.stagnation.probes} probes with {each:.1%} of noise:")
        for slope in (0.0, 0.02, 0.03, 0.05, 0.08):
            print(f"  improving by {slope:.0%} a probe: called a plateau in {told(run, each, slope, random):.1%}")


if __name__ == "__main__":
    typer.run(main)
