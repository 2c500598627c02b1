"""Cost of evaluation beyond generating samples and passing them through the feature networks.

    python benchmarks/evaluation.py t4 --rounds 3     # a trained run of this project, with evaluate.features of params
    python benchmarks/evaluation.py t4 --samples 200 --inception   # an untrained network as expensive as Inception

Prints the seconds of generation, of the networks' forward passes, of the whole evaluation and of its intervals, and the
ratios of the pass over the samples and of the whole without intervals to the first two. Each is the fastest of several
rounds, taken in turns in one process. Loading is not counted.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer

from afm_pipe import pipeline
from afm_pipe.distributed.launch import load_launch
from afm_pipe.evaluation import statistics as statistics_module
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.evaluation.frechet import Statistics
from afm_pipe.evaluation.networks import FeatureNetwork
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.commands import user_command
from afm_pipe.sampling.sampler import Sampler, balanced_labels

REAL = 2_000  # real images of the untrained network: random features of their size cost as much


@user_command
def main(
    run: str,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the fastest counts.")] = 2,
    samples: Annotated[int | None, typer.Option(help="Instead of evaluate.samples.")] = None,
    inception: Annotated[bool, typer.Option(help="An untrained Inception v3 at 299 x 299 as the network.")] = False,
) -> None:
    params, device = load_params(), load_launch().torch_device()
    if samples is not None:
        params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"samples": samples})})
    sampler, tools = pipeline.load_sampler(params, run, device), Evaluator(params, paths.REFERENCE, device)
    if inception:
        put_inception_in(tools, device)
    generation, forward, whole, tail, intervals = ([] for _ in range(5))
    for _ in range(rounds):
        made, passed = generate_and_pass(params, sampler, tools)
        generation.append(made)
        forward.append(passed)
        with timed("frechet_error", "kernel_error") as spent:
            started = last = time.perf_counter()
            for _ in tools.evaluate(sampler, {}):
                last = time.perf_counter()
            ended = time.perf_counter()
        whole.append(ended - started)
        tail.append(ended - last)
        intervals.append(sum(spent.seconds))
    parts = min(generation) + min(forward)
    print(f"{params.evaluate.samples} samples: generation {min(generation):.2f} s, networks {min(forward):.2f} s")
    print(f"evaluation {min(whole):.2f} s, of which {min(tail):.2f} s after the last sample, ", end="")
    print(f"{min(intervals):.2f} s of them for intervals")
    print(f"ratio of the pass over the samples {(min(whole) - min(tail)) / parts:.3f}")
    print(f"ratio of the whole, intervals not counted {(min(whole) - min(intervals)) / parts:.3f}")


def generate_and_pass(params: Params, sampler: Sampler, tools: Evaluator) -> tuple[float, float]:
    """Return the seconds of generating the samples, and of their forward passes."""
    settings, started, passes = params.evaluate, time.perf_counter(), 0.0
    labels = balanced_labels(range(settings.samples), tools.num_classes)
    for images in sampler.stream(labels, settings.seed):
        before = time.perf_counter()
        for network in tools.networks:
            network(images)
        passes += time.perf_counter() - before
    return time.perf_counter() - started - passes, passes


def put_inception_in(tools: Evaluator, device: torch.device) -> None:
    """Replace the networks by a torchvision Inception v3 with random weights: the same cost, no meaning."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    model = inception_v3(weights=None, aux_logits=False, init_weights=False).to(device).eval()
    model.fc = torch.nn.Identity()

    def extract(images: torch.Tensor) -> torch.Tensor:
        rgb = images.to(device).float().expand(-1, 3, -1, -1) / 128 - 1
        return model(F.interpolate(rgb, (299, 299), mode="bilinear"))

    tools.networks = [FeatureNetwork("inception_clean", 2048, "0" * 64, extract)]
    features = np.abs(np.random.default_rng(0).normal(size=(REAL, 2048))).astype(np.float32)
    own = Statistics.of(features)
    tools.references = [
        dataclasses.replace(
            tools.references[0],
            name="inception_clean",
            mu=own.mu,
            sigma=own.sigma,
            features=features,
            labels=np.arange(REAL) % tools.num_classes,
        )
    ]


class timed:  # noqa: N801  # reads as a verb
    """Time calls of functions that evaluation imports from the module of intervals."""

    def __init__(self, *names: str) -> None:
        self.whole: dict[str, Callable[..., Any]] = {name: getattr(statistics_module, name) for name in names}
        self.seconds: list[float] = []

    def __enter__(self) -> "timed":
        for name, function in self.whole.items():
            setattr(statistics_module, name, self._around(function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.whole.items():
            setattr(statistics_module, name, function)

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self.seconds.append(time.perf_counter() - started)
            return result

        return run


if __name__ == "__main__":
    typer.run(main)
