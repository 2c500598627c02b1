"""One dimension against an arbitrarily strong discriminator: does G still reach the optimal map?

The paper leaves open whether G is guaranteed to converge. Here the optimal map is known, and D can be trained almost to
its optimum before every update of G. Shapes: S seeds, K noise values.
"""

import math
from collections.abc import Generator
from itertools import product

import torch

from afm_pipe.params import Toy
from afm_pipe.runtime.progress import Progress
from afm_pipe.study.statistics import t_interval
from afm_pipe.study.toy import mixture
from afm_pipe.study.toy.experiment import part_of
from afm_pipe.study.toy.networks import transport
from afm_pipe.study.toy.results import Outcome, Strong, StrongClaim, StrongResults
from afm_pipe.study.toy.training import Setting, discriminator_gap, train_adversarially


def run_strong(toy: Toy, seed: int, device: torch.device) -> Generator[Progress, None, Strong | None]:
    """Train and measure every combination of D updates, transport and normalization; None where params have none."""
    strong = toy.strong_discriminator
    if strong is None:
        return None
    noise = mixture.noise_grid(toy.points)
    start = noise.float().to(device).expand(toy.seeds, -1)  # (S, K)
    optimal, no_labels = mixture.optimal_map(noise), torch.zeros_like(start, dtype=torch.long)
    combinations = list(product(strong.updates, (True, False), (True, False)))
    results: list[StrongResults] = []
    total, done = sum(strong.pairs * (1 + updates) for updates, *_ in combinations), 0
    for updates, with_transport, normalized in combinations:
        setting = Setting(
            steps=1,
            transport=toy.transport if with_transport else 0.0,
            updates=strong.pairs,
            discriminator_updates=updates,
            normalized=normalized,
        )
        training = train_adversarially(setting, toy, seed, device)
        trained = yield from part_of(training, f"{updates} D updates", done, total, 1 + updates)
        done += strong.pairs * (1 + updates)
        x = transport(trained.average, start, 1, no_labels).double().cpu()  # (S, K)
        rms = (x - optimal).square().mean(-1).sqrt()
        results.append(
            StrongResults(
                discriminator_updates=updates,
                transport=with_transport,
                normalized=normalized,
                rms=[value if math.isfinite(value) else None for value in rms.tolist()],
                w1=[value if math.isfinite(value) else None for value in mixture.wasserstein(x).tolist()],
                discriminator_gap=discriminator_gap(trained, toy, strong.pairs, seed, device),
            )
        )
    return Strong(settings=results, claims=strong_claims(results), pairs=strong.pairs, seeds=toy.seeds)


def strong_claims(results: list[StrongResults]) -> list[StrongClaim]:
    """Return verdicts on claims about the distance to the optimal map, by t-intervals over seeds of its logarithm."""
    few, *_, many = sorted({each.discriminator_updates for each in results})
    full = {each.discriminator_updates: each for each in results if each.transport and each.normalized}
    strongest = [each for each in results if each.discriminator_updates == many]

    def group(**wanted: bool) -> list[StrongResults]:
        return [each for each in strongest if all(getattr(each, key) == value for key, value in wanted.items())]

    return [
        _claim(f"G comes closer to the optimal map with {many} D updates than with {few}", [full[many]], [full[few]]),
        _claim(f"With {many} D updates, transport brings G closer", group(transport=True), group(transport=False)),
        _claim(
            f"With {many} D updates, gradient normalization brings G closer",
            group(normalized=True),
            group(normalized=False),
        ),
    ]


def _claim(text: str, less: list[StrongResults], than: list[StrongResults]) -> StrongClaim:
    """Decide a claim; a seed without a number leaves it undecided."""
    sides = [list(zip(*(each.rms for each in side), strict=True)) for side in (less, than)]  # by seed
    if any(value is None for side in sides for seed in side for value in seed):
        return StrongClaim(claim=text, outcome="undecided")
    logs = [[sum(map(math.log, seed)) / len(seed) for seed in side] for side in sides]
    differences = [a - b for a, b in zip(*logs, strict=True)]
    interval = t_interval(differences)
    assert interval is not None, "the toy has at least two seeds"
    outcome: Outcome = "supported" if interval[1] < 0 else "not supported" if interval[0] > 0 else "undecided"
    ratio = math.exp(sum(differences) / len(differences))
    return StrongClaim(
        claim=text, outcome=outcome, ratio=ratio, interval=(math.exp(interval[0]), math.exp(interval[1]))
    )
