"""The toy experiment: train every setting for several seeds, map the same noise through each, and measure.

Shapes: S seeds, K noise values.
"""

from collections.abc import Generator
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from afm_pipe.params import Guidance, Toy
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress
from afm_pipe.study.toy import mixture
from afm_pipe.study.toy.networks import transport
from afm_pipe.study.toy.results import GuidanceResults, MapResults, OwnScale, ToyResults
from afm_pipe.study.toy.training import Setting, train_adversarially, train_flow

T = TypeVar("T")
FLOW_COST = 5  # updates of flow matching that cost as much as one update of D and one of G


class LearnedMap(NamedTuple):
    """The images of the noise under the generators of one setting."""

    method: Literal["gan", "flow", "afm"]
    steps: int
    transport: float | None
    x: Tensor  # (S, K) float64


class Experiment(NamedTuple):
    """All maps, and the class-conditional samples by guidance; float64 on the CPU."""

    noise: Tensor  # (K,)
    maps: dict[str, LearnedMap]
    guided: dict[str, Tensor]  # (S, classes, K); (1, classes, K) of the exact reference


def run_experiment(toy: Toy, seed: int, device: torch.device) -> Generator[Progress, None, Experiment]:
    """Train all settings and map the noise through each; progress counts pairs of updates."""
    noise = mixture.noise_grid(toy.points)
    start = noise.float().to(device).expand(toy.seeds, -1)  # (S, K)
    no_labels = torch.zeros_like(start, dtype=torch.long)
    labels = torch.arange(mixture.CLASSES, device=device).repeat_interleave(toy.points).expand(toy.seeds, -1)
    settings = toy_settings(toy)
    total = sum(setting.updates for setting in settings.values()) + toy.flow_updates // FLOW_COST
    maps: dict[str, LearnedMap] = {}
    guided: dict[str, Tensor] = {}
    done = 0
    for name, setting in settings.items():
        trained = yield from part_of(train_adversarially(setting, toy, seed, device), name, done, total)
        g = trained.average
        done += setting.updates
        if setting.conditional:
            x = transport(g, start.repeat(1, mixture.CLASSES), setting.steps, labels)  # (S, classes * K)
            guided[name] = x.double().cpu().view(toy.seeds, mixture.CLASSES, toy.points)
        else:
            x = transport(g, start, setting.steps, no_labels).double().cpu()
            maps[name] = LearnedMap("afm" if setting.transport else "gan", setting.steps, setting.transport, x)
    velocity = yield from part_of(train_flow(toy, seed, device), "flow matching", done, total, 1 / FLOW_COST)
    for steps in toy.steps:
        x = transport(velocity, start, steps, no_labels).double().cpu()
        maps[f"flow_{steps}"] = LearnedMap("flow", steps, None, x)
    exact = mixture.guided_flow(noise.repeat(mixture.CLASSES), labels[0].cpu(), toy.guidance.cfg_scale)
    guided["exact_cfg"] = exact.view(1, mixture.CLASSES, toy.points)
    return Experiment(noise, maps, guided)


def toy_settings(toy: Toy) -> dict[str, Setting]:
    """Return the adversarial settings: the GAN, AFM by steps and by transport weight, then the conditional ones."""
    settings = {"gan": Setting(1, 0.0, toy.pairs)}
    settings |= {f"afm_{steps}": Setting(steps, toy.transport, toy.pairs) for steps in toy.steps}
    settings |= {f"afm_1_ot_{each:g}": Setting(1, each, toy.pairs) for each in toy.sweep if each != toy.transport}
    own = toy.guidance
    guides = {"plain": Guidance(scale=own.scale, t=(0.0, 0.0)), "flow_based": Guidance(scale=own.scale, t=own.t)}
    conditional = {name: Setting(1, own.transport, own.pairs, True, guides.get(name)) for name in ("none", *guides)}
    return settings | conditional


def measure(experiment: Experiment, toy: Toy) -> ToyResults:
    """Measure all maps. Raises UserError naming a setting that diverged."""
    for name, x in ({name: each.x for name, each in experiment.maps.items()} | experiment.guided).items():
        if not x.isfinite().all():
            raise UserError(f"Found non-finite samples of {name}, expected numbers: lower toy.lr in params.")
    optimal = mixture.optimal_map(experiment.noise)
    maps = {
        name: MapResults(
            method=each.method,
            steps=each.steps,
            transport=each.transport,
            **measure_map(each.x, experiment.noise, optimal),
        )
        for name, each in experiment.maps.items()
    }
    scale = OwnScale(
        seeds=toy.seeds,
        points=toy.points,
        width=toy.width,
        batch_size=toy.batch_size,
        updates=2 * toy.pairs,
        penalty_weight=toy.penalty.weight,
        lr=toy.lr,
    )
    guidance = {name: GuidanceResults(**_measure_classes(x)) for name, x in experiment.guided.items()}
    ratio = maps["gan"].spread_mean / maps["afm_1"].spread_mean
    return ToyResults(maps=maps, guidance=guidance, scale=scale, spread_ratio=ratio)


def measure_map(x: Tensor, noise: Tensor, optimal: Tensor) -> dict[str, float]:
    """Return the fields of `MapResults` of maps x (S, K) of the noise (K,), given the optimal map (K,)."""
    differences = (x[:, None] - x[None]).square().mean(-1)  # (S, S), 0 on the diagonal
    return _over_seeds(
        w1=mixture.wasserstein(x),
        rms=(x - optimal).square().mean(-1).sqrt(),
        spread=(differences.sum(1) / (len(x) - 1)).sqrt(),
        move=(x - noise).square().mean(-1).sqrt(),
    )


def _measure_classes(x: Tensor) -> dict[str, float]:
    """Return the fields of `GuidanceResults` of samples x (S, classes, K), classes in ascending order."""
    distance = x.mean(-1) * torch.tensor(mixture.MEANS).sign()  # (S, classes)
    outer, inner = distance[:, [0, -1]].mean(1), distance[:, 1:-1].mean(1)
    return _over_seeds(outer=outer, inner=inner, within_class_std=x.std(-1).mean(1))


def _over_seeds(**values: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of each value (S,); the exact reference has a single one."""
    means = {f"{key}_mean": value.mean().item() for key, value in values.items()}
    return means | {f"{key}_std": value.std().item() if len(value) > 1 else 0.0 for key, value in values.items()}


def part_of(
    ticks: Generator[Progress, None, T], name: str, before: int, total: int, weight: float = 1
) -> Generator[Progress, None, T]:
    """Report progress as part of a larger total, in which an update counts `weight`; return what `ticks` returns."""
    while True:
        try:
            tick = next(ticks)
        except StopIteration as end:
            return end.value
        yield Progress(before + int(tick.done * weight), total, "updates", name)
