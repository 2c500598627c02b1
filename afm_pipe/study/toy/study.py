"""The study: train every setting for several seeds, carry the same noises through each, measure the maps.

Shapes: S seeds, K noises.
"""

from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from afm_pipe.params import Guidance, Toy
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress
from afm_pipe.study.toy import mixture
from afm_pipe.study.toy.training import Setting, carry, train_adversarially, train_flow

T = TypeVar("T")
GUIDES = ("none", "plain", "flow_based")
PAPER = {"width": 1024, "batch_size": 1024, "updates": 10_000, "penalty_weight": 0.01, "lr": 1.0e-4}  # D's and G's


class Learned(NamedTuple):
    """The maps of one setting: where each seed's generator takes the noises."""

    method: str  # gan, flow or afm
    steps: int
    transport: float | None
    x: Tensor  # (S, K) float64


class Study(NamedTuple):
    """All maps, and the class-conditional samples by guidance; noises and maps as float64 on the CPU."""

    noise: Tensor  # (K,)
    maps: dict[str, Learned]
    guided: dict[str, Tensor]  # (S, classes, K); of the exact reference (1, classes, K)


def run_study(toy: Toy, seed: int, device: torch.device) -> Generator[Progress, None, Study]:
    """Train and carry everything; ticks count updates, flow matching's at a fifth."""
    noise = mixture.noise_grid(toy.points)
    any_class = torch.zeros(toy.seeds, toy.points, dtype=torch.long, device=device)
    start = noise.float().to(device).expand(toy.seeds, -1)  # (S, K)
    settings = adversarial_settings(toy)
    guided_settings = {name: guided_setting(toy, name) for name in GUIDES}
    total = sum(setting.updates for setting in (*settings.values(), *guided_settings.values())) + toy.flow_updates // 5
    maps: dict[str, Learned] = {}
    done = 0
    for name, setting in settings.items():
        flow = yield from _within(train_adversarially(setting, toy, seed, device), done, total, name)
        done += setting.updates
        x = carry(flow, start, setting.steps, any_class).double().cpu()
        maps[name] = Learned("afm" if setting.transport else "gan", setting.steps, setting.transport, x)
    velocity = yield from _within(train_flow(toy, seed, device), done, total, "flow matching", 5)
    done += toy.flow_updates // 5
    for steps in toy.steps:
        maps[f"flow_{steps}"] = Learned("flow", steps, None, carry(velocity, start, steps, any_class).double().cpu())
    guided: dict[str, Tensor] = {}
    labels = torch.arange(mixture.CLASSES, device=device).repeat_interleave(toy.points).expand(toy.seeds, -1)
    for name, setting in guided_settings.items():
        flow = yield from _within(train_adversarially(setting, toy, seed, device), done, total, f"guidance {name}")
        done += setting.updates
        x = carry(flow, start.repeat(1, mixture.CLASSES), 1, labels)  # (S, classes * K)
        guided[name] = x.double().cpu().view(toy.seeds, mixture.CLASSES, toy.points)
    exact = mixture.guided_exactly(noise.repeat(mixture.CLASSES), labels[0].cpu(), toy.guidance.cfg_scale)
    guided["exact_cfg"] = exact.view(1, mixture.CLASSES, toy.points)
    return Study(noise, maps, guided)


def adversarial_settings(toy: Toy) -> dict[str, Setting]:
    """Return the unconditional settings by name: the GAN, AFM by steps, and the sweep of the transport weight."""
    settings = {"gan": Setting(1, 0.0, toy.pairs)}
    settings |= {f"afm_{steps}": Setting(steps, toy.transport, toy.pairs) for steps in toy.steps}
    others = (weight for weight in toy.sweep if weight != toy.transport)
    return settings | {f"afm_1_ot_{weight:g}": Setting(1, weight, toy.pairs) for weight in others}


def guided_setting(toy: Toy, name: str) -> Setting:
    """Return the class-conditional setting of one of GUIDES."""
    guidance = toy.guidance
    t = (0.0, 0.0) if name == "plain" else guidance.t
    guide = None if name == "none" else Guidance(scale=guidance.scale, t=t)
    return Setting(1, guidance.transport, guidance.pairs, conditional=True, guidance=guide)


def measure(study: Study, toy: Toy) -> dict[str, Any]:
    """Return the numbers of the study as a tree of plain numbers and names, for results.json.

    Of each map, mean and standard deviation over seeds: w1, the W1 distance of its samples to the data; rms, its RMS
    distance to the optimal map; spread, its RMS distance to the other seeds' maps; move, rms(G(z) - z). All over
    N(0, 1). Of each guidance: the mean of its outer and inner classes, as distance from 0, and the standard deviation
    within classes. Raises UserError naming a setting whose training diverged.
    """
    for name, x in ({name: learned.x for name, learned in study.maps.items()} | study.guided).items():
        if not x.isfinite().all():
            raise UserError(f"Found samples of {name} that are not finite, expected numbers: lower toy.lr in params.")
    optimal = mixture.optimal_map(study.noise)
    maps: dict[str, Any] = {
        name: {"method": learned.method, "steps": learned.steps}
        | ({} if learned.transport is None else {"transport": learned.transport})
        | measure_maps(learned.x, study.noise, optimal)
        for name, learned in study.maps.items()
    }
    scale = {
        "seeds": toy.seeds,
        "points": toy.points,
        "width": toy.width,
        "batch_size": toy.batch_size,
        "updates": 2 * toy.pairs,
        "penalty_weight": toy.penalty.weight,
        "lr": toy.lr,
        "paper": PAPER,
    }
    return {
        "maps": maps,
        "spread_ratio": maps["gan"]["spread_mean"] / maps["afm_1"]["spread_mean"],
        "guidance": {name: _measure_classes(x) for name, x in study.guided.items()},
        "scale": scale,
    }


def measure_maps(x: Tensor, noise: Tensor, optimal: Tensor) -> dict[str, float]:
    """Measure maps x (S, K) of the noises (K,) against the optimal map (K,): mean and standard deviation over seeds."""
    differences = (x[:, None] - x[None]).square().mean(-1)  # (S, S), 0 on the diagonal
    of_seeds = {
        "w1": mixture.wasserstein(x),
        "rms": (x - optimal).square().mean(-1).sqrt(),
        "spread": (differences.sum(1) / (len(x) - 1)).sqrt(),
        "move": (x - noise).square().mean(-1).sqrt(),
    }
    return {f"{key}_{name}": value for key, of_seed in of_seeds.items() for name, value in _over_seeds(of_seed).items()}


def _measure_classes(x: Tensor) -> dict[str, float]:
    """Measure samples by class (S, classes, K), the classes in order on the line."""
    distance = x.mean(-1) * torch.tensor(mixture.MEANS).sign()  # (S, classes)
    outer, inner = distance[:, [0, -1]].mean(1), distance[:, 1:-1].mean(1)
    of_seeds = {"outer": outer, "inner": inner, "within_class_std": x.std(-1).mean(1)}
    return {f"{key}_{name}": value for key, of_seed in of_seeds.items() for name, value in _over_seeds(of_seed).items()}


def _over_seeds(values: Tensor) -> dict[str, float]:
    std = values.std().item() if len(values) > 1 else 0.0  # the exact reference has no seeds
    return {"mean": values.mean().item(), "std": std}


def _within(
    ticks: Generator[Progress, None, T], before: int, total: int, facts: str, divisor: int = 1
) -> Generator[Progress, None, T]:
    """Pass ticks on as part of a larger work; return what they return."""
    while True:
        try:
            tick = next(ticks)
        except StopIteration as end:
            return end.value
        yield Progress(before + tick.done // divisor, total, "updates", facts)
