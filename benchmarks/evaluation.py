"""What evaluation costs beyond generating the samples and passing them through the feature networks.

    python benchmarks/evaluation.py t4 --rounds 3     # a trained run of this project

Prints seconds of generation, of the networks' forward passes and of the whole evaluation, and the ratio of the last to
the first two, measured in turns in one process. Loading is not counted.
"""

import time
from typing import Annotated

import typer

from afm_pipe import paths
from afm_pipe.evaluation.metrics import Evaluator, evaluate_run
from afm_pipe.launch import load_launch
from afm_pipe.params_file import load_params
from afm_pipe.pipeline import _sampler
from afm_pipe.sampling import stream_images


def main(run: str, rounds: Annotated[int, typer.Option(help="Turns, of which the fastest count.")] = 2) -> None:
    params, device = load_params(), load_launch().torch_device()
    sampler, tools = _sampler(params, run, device), Evaluator(params, paths.REFERENCE, device)
    generator, vae, settings = sampler.generator, sampler.vae, params.evaluate
    generation, forward, whole, tail = ([] for _ in range(4))
    for _ in range(rounds):
        started, passes = time.perf_counter(), 0.0
        for _, _, images in stream_images(
            generator, vae, params, settings.seed, settings.samples, tools.num_classes, device
        ):
            before = time.perf_counter()
            for network in tools.networks:
                network(images)
            passes += time.perf_counter() - before
        generation.append(time.perf_counter() - started - passes)
        forward.append(passes)
        started = last = time.perf_counter()
        for _ in evaluate_run(params, generator, vae, paths.REFERENCE, {}, device, evaluator=tools):
            last = time.perf_counter()
        whole.append(time.perf_counter() - started)
        tail.append(time.perf_counter() - last)
    parts = min(generation) + min(forward)
    print(f"{settings.samples} samples: generation {min(generation):.2f} s, networks {min(forward):.2f} s")
    print(f"evaluation {min(whole):.2f} s, of which {min(tail):.2f} s after the last sample")
    print(f"ratio {min(whole) / parts:.3f}; of the pass over the samples alone {(min(whole) - min(tail)) / parts:.3f}")


if __name__ == "__main__":
    typer.run(main)
