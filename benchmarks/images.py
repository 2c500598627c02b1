"""Encoding, sampling and evaluation beside their bare forward passes."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from afm_pipe.autoencoders import load_autoencoder
from afm_pipe.autoencoders.encoding import encode_dataset
from afm_pipe.data.manifest import Manifest
from afm_pipe.data.reading import build_manifest, load_images
from afm_pipe.models.flow import Flow
from afm_pipe.models.model_files import ModelConfig, build_generator
from afm_pipe.params import Params
from afm_pipe.runtime import paths
from afm_pipe.sampling.sampler import Sampler, balanced_labels, seeded_noise
from benchmarks.inputs import CLASS_COUNT, photographs, sd_vae
from benchmarks.measuring import Row, in_turns, speed_row

SD_IMAGE, SD_LATENT, SD_BATCH = 256, (4, 32, 32), 2


def encode(params: Params, quick: bool) -> Iterator[Row]:
    """`encode` from files to a latents file, beside the encoder on images in memory."""
    for title, own, vae, manifest in _sources(params, quick):
        images = torch.from_numpy(_finish(load_images(manifest, own.data)))
        size, number = own.encode.batch_size, iter(range(1000))
        with tempfile.TemporaryDirectory(dir=".") as folder:

            def whole(own: Any = own, vae: Any = vae, manifest: Any = manifest, folder: str = folder) -> None:
                place = Path(folder) / str(next(number))  # noqa: B023  # used within this turn of the loop
                place.mkdir()
                _finish(encode_dataset(own, manifest, vae, "0" * 64, place / "latents.h5", place / "work"))

            def bare(own: Any = own, vae: Any = vae, images: Any = images, size: int = size) -> None:
                for batch in images.split(size):
                    for side in (batch, batch.flip(-1)) if own.data.mirror else (batch,):
                        vae.encode(side, own.encode.precision)

            def load(own: Any = own, manifest: Any = manifest) -> None:
                _finish(load_images(manifest, own.data))

            seconds = in_turns(1 if quick else 2, warm=0 if quick else 1, whole=whole, bare=bare, load=load)
        loading, both = median(seconds["load"]), median(seconds["load"]) + median(seconds["bare"])
        note = (
            f"reading and decoding files alone on the same cores: {len(images) / loading:.3g} images/s; followed by "
            f"the encoder: {len(images) / both:.3g}"
        )
        yield speed_row(
            "encode", title, seconds, "whole", "bare", "the bare encoder on images in memory",
            per=len(images), unit="images/s", bar=">= 0.9", note=note,
        )  # fmt: skip


def sampling(params: Params, quick: bool) -> Iterator[Row]:
    """Samples as evaluation draws them, beside bare forward passes of generator and decoder."""
    for title, own, flow, vae, count in _models(params, quick):
        size, shape = own.sample.micro_batch, own.latent_shape

        def whole(own: Any = own, flow: Any = flow, vae: Any = vae, count: int = count) -> None:
            sampler = Sampler(flow, vae, own.latent_shape, (), own.sample.micro_batch)
            for _ in sampler.stream(balanced_labels(range(count), CLASS_COUNT), 0):
                pass

        @torch.inference_mode()
        def bare(flow: Any = flow, vae: Any = vae, size: int = size, shape: Any = shape, count: int = count) -> None:
            z, labels = torch.randn(size, *shape), torch.zeros(size, dtype=torch.int64)
            for _ in range(count // size):
                vae.decode(flow.sample(z, labels))

        decoded = torch.zeros(size, own.data.channels, own.data.image_size, own.data.image_size)
        seconds = in_turns(
            (1 if quick else 2) if size < 10 else 10,
            whole=whole,
            bare=bare,
            noise=partial(seeded_noise, 0, range(count), shape),
            quantise=partial(vae.spec.to_uint8, decoded),
        )
        spent = median(seconds["whole"])
        drawing, rounding = median(seconds["noise"]) / spent, median(seconds["quantise"]) * (count // size) / spent
        note = f"drawing noise takes {drawing:.1%} of the time, rounding to 8 bits {rounding:.1%}"
        yield speed_row(
            "sampling", title, seconds, "whole", "bare", "bare generator and decoder",
            per=count, unit="images/s", bar=">= 0.95", note=note,
        )  # fmt: skip


def evaluation(params: Params, quick: bool) -> Iterator[Row]:
    """Evaluation of a trained run, if there is one, beside generation and the networks' bare forward passes."""
    from afm_pipe import pipeline
    from afm_pipe.evaluation.evaluator import Evaluator
    from benchmarks.evaluation import generate_and_pass, timed

    run = next((name for name in params.runs if (paths.model(name) / "config.json").exists()), None)
    if run is None or not paths.REFERENCE.exists():
        print("evaluation: not measured, because it needs a trained run and its reference (make repro)")
        return
    evaluate = params.evaluate.model_copy(update={"samples": 500 if quick else 2000})
    params, device = params.model_copy(update={"evaluate": evaluate}), torch.device("cpu")
    sampler, tools = pipeline.load_sampler(params, run, device), Evaluator(params, paths.REFERENCE, device)
    intervals: list[float] = []
    kernel: list[float] = []

    def whole() -> None:
        with timed("frechet_error", "kernel_error") as spent, timed("kid_of_subsets") as measuring:
            _finish(tools.evaluate(sampler, {}))
        intervals.append(sum(spent.seconds))
        kernel.append(sum(measuring.seconds))

    def parts() -> None:
        generate_and_pass(params, sampler, tools)

    seconds = in_turns(1 if quick else 4, whole=whole, parts=parts)
    seconds["whole"] = [spent - own for spent, own in zip(seconds["whole"], intervals[1:], strict=True)]
    share = median(kernel) / median(seconds["whole"])
    yield speed_row(
        "evaluation", f"{run}, {evaluate.samples} samples, intervals not counted", seconds, "whole", "parts",
        "generation and the networks' forward passes", per=evaluate.samples, unit="images/s",
        note=f"the kernel distance, of {evaluate.kid_subsets} subsets, takes {share:.0%} of it",
    )  # fmt: skip


def _sources(params: Params, quick: bool) -> Iterator[tuple[str, Params, Any, Manifest]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photographs(root, 4 if quick else 8)
        data = {"source": "folder", "root": str(root), "image_size": SD_IMAGE, "channels": 3, "mirror": False}
        autoencoder = params.autoencoder.model_copy(
            update={"latent_channels": 4, "downsample": 8, "scaling_factor": 0.18215}
        )
        own = params.model_copy(
            update={
                "data": params.data.model_copy(update={**data, "min_images": 1}),
                "autoencoder": autoencoder,
                "encode": params.encode.model_copy(update={"batch_size": SD_BATCH}),
            }
        )
        manifest = _finish(build_manifest(own.data))
        yield f"SD-VAE's shape (untrained), {manifest.num_images} JPEGs of 500 x 375", own, sd_vae(), manifest
    if Path(params.data.root).exists() and paths.AUTOENCODER_WEIGHTS.exists():
        manifest = _finish(build_manifest(params.data))
        title = f"the default's autoencoder, {manifest.num_images:,} digits of 32 x 32"
        yield title, params, load_autoencoder(params, paths.AUTOENCODER), manifest
    else:
        print("encode: the default's is not measured, because its images and autoencoder are missing (make repro)")


def _models(params: Params, quick: bool) -> Iterator[tuple[str, Params, Flow, Any, int]]:
    if paths.AUTOENCODER_WEIGHTS.exists():
        count = 4 * params.sample.micro_batch
        config = ModelConfig(size="t4", channels=4, latent_size=params.latent_shape[1], num_classes=CLASS_COUNT)
        yield (
            "t4 and the default's autoencoder",
            params,
            _flow(config),
            load_autoencoder(params, paths.AUTOENCODER),
            count,
        )
    own = params.model_copy(
        update={
            "data": params.data.model_copy(update={"image_size": SD_IMAGE, "channels": 3}),
            "autoencoder": params.autoencoder.model_copy(update={"latent_channels": 4, "downsample": 8}),
            "sample": params.sample.model_copy(update={"micro_batch": SD_BATCH}),
        }
    )
    config = ModelConfig(size="b2", channels=4, latent_size=SD_LATENT[1], num_classes=CLASS_COUNT)
    yield "B/2 and SD-VAE's shape (untrained), 256 x 256", own, _flow(config), sd_vae(), SD_BATCH if quick else 4


def _flow(config: ModelConfig) -> Flow:
    torch.manual_seed(0)
    return Flow(build_generator(config).eval().requires_grad_(False), config.form, config.nfe)


def _finish(work: Any) -> Any:
    """Run a generator to its end; return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
