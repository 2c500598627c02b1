"""What is measured of a run: one pass over its samples, every number with the protocol it was measured by.

Shapes: N samples, B of them at a time, C channels, H x W pixels, K classes, T training thumbnails.
"""

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afm_pipe.distributed.mapping import map_across_ranks
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.evaluation.accumulate import EvalBatch, MetricAccumulator
from afm_pipe.evaluation.adm import require_reference
from afm_pipe.evaluation.features import LEGACY, NAMES, SPATIAL, load_networks
from afm_pipe.evaluation.intervals import wilson
from afm_pipe.evaluation.manifold import MAX_REAL, NEIGHBOURS, precision_recall
from afm_pipe.evaluation.measures import (
    SCORE_PART,
    ClassSpread,
    inception_score,
    sample_suffix,
    within_class_variance,
)
from afm_pipe.evaluation.nearest import Neighbours, Thumbnails, thumbnail
from afm_pipe.evaluation.networks import RESIZE
from afm_pipe.evaluation.reference import SUMMARY, THUMBNAILS, spread_evenly
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.models.flow import Flow
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json
from afm_pipe.runtime.progress import Progress
from afm_pipe.sampling.generate import UINT8_RULE, generate_images, grid, labels_for, micro_batches

NEAREST_SAMPLES, NEAREST_SHOWN = 10, 3  # in the picture of nearest training images
CPU = torch.device("cpu")


class Evaluator:
    """All that samples are measured with, loaded once for any number of generators of the same params and reference.

    Raises UserError for too few samples, and for a reference of other images, networks or params.
    """

    def __init__(self, params: Params, reference_dir: Path, device: torch.device = CPU) -> None:
        self.params, self.device = params, device
        self.summary = read_json(reference_dir / SUMMARY)
        _check(params, self.summary, reference_dir)
        self.num_classes = len(self.summary["classes"])
        self.networks = load_networks(
            params.evaluate.features, reference_dir, device, dinov2_sha256=params.evaluate.dinov2_sha256
        )
        self.references = [Reference.load(reference_dir, network) for network in self.networks]
        for reference in self.references:
            if reference.name in (LEGACY, SPATIAL):
                require_reference(params.evaluate.adm_reference, reference, reference_dir)
        self.thumbnails = Thumbnails.load(reference_dir / THUMBNAILS)
        self.neighbours = Neighbours(self.thumbnails.images)
        self.real_spread = ClassSpread(self.num_classes)
        self.real_spread.add(self.thumbnails.images, torch.from_numpy(self.thumbnails.labels))


def evaluate_run(
    params: Params,
    generator: Flow,
    vae: Any,
    reference_dir: Path,
    provenance: dict[str, Any],
    device: torch.device = CPU,
    *,
    evaluator: Evaluator | None = None,
    work_dir: Path | None = None,
    checkpoint_seconds: float = 60.0,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Generator[Progress, None, tuple[dict[str, Any], Image.Image]]:
    """Measure a generator; return its metrics and a picture of samples above their nearest training images.

    Per network of evaluate.features the Frechet and the kernel distance to the real images, and precision and recall,
    keys as in `networks.NAMES`, followed by the sample count below 50,000 (fd_classifier_5k, fid, kid_clean_1234); with
    Inception of TensorFlow's resizing also sfid and inception_score. KID of a perfect generator is a little below
    zero: with classes in equal shares its samples are not quite independent.

    class_accuracy        share of samples the reference's classifier puts in the class asked for (if it is used)
    within_class_variance variance of thumbnails' pixels within a class, averaged over classes, over real images';
                          _features: the same in the first network of evaluate.features
    copies                share of samples whose nearest training image, in pixels, is as much nearer than the second
                          nearest as for one training image in a thousand (`Thumbnails.copied`): new images give 0.001
    nearest_distance_ratio median distance of samples to the nearest training image, over the median of training
                          images to their nearest other; null when most training images have exact duplicates
    intervals             {key: [low, high]}, 95 %, for every distance and share among these keys
    protocol              how it was measured, with `provenance` laid under it

    `evaluator` saves loading the networks and the reference again. With `work_dir` what was measured so far is kept
    there every `checkpoint_seconds`, the same call goes on from it and gives the same numbers; its name must tell the
    generator and the protocol apart.
    Memory does not grow with the number of samples but for their features. Of several `ranks` the first calls this and
    the others `assist`, with the same arguments; the numbers do not depend on how many there are.
    Raises UserError as `Evaluator`, and for latents not finite.
    """
    protocol = params.evaluate
    tools = evaluator or Evaluator(params, reference_dir, device)
    seen = MetricAccumulator(tools.networks, protocol.samples, tools.num_classes)
    if work_dir is not None:
        seen.restore(work_dir)
    ranks.all_gather(seen.done)  # tells the others where to go on
    saved = time.monotonic()
    for indices, labels, batch in _sightings(params, generator, vae, tools, device, ranks, seen.done):
        seen.add(batch, labels, pictured=indices.start < NEAREST_SAMPLES)
        if work_dir is not None and time.monotonic() - saved >= checkpoint_seconds:
            seen.save(work_dir)
            saved = time.monotonic()
        yield Progress(indices.stop, protocol.samples, "samples")
    metrics = _numbers(tools, seen, params, device)
    metrics["protocol"] = provenance | _protocol(tools, params, device)
    return metrics, _picture(torch.cat(seen.pictured), torch.cat(seen.found), tools.thumbnails)


def assist(
    params: Params, generator: Flow, vae: Any, evaluator: Evaluator, ranks: ProcessGroup, device: torch.device = CPU
) -> None:
    """Measure this rank's share of the samples for the first rank, which evaluates."""
    done = ranks.all_gather(0)[0]
    for _ in _sightings(params, generator, vae, evaluator, device, ranks, done):
        pass


def _sightings(
    params: Params, generator: Flow, vae: Any, tools: Evaluator, device: torch.device, ranks: ProcessGroup, done: int
) -> Iterator[tuple[range, Tensor, EvalBatch]]:
    """Yield what is measured of the samples from `done` on, in order, on the first rank: indices, labels, batch."""
    protocol, size = params.evaluate, params.sample.micro_batch

    def measured(indices: range) -> list[Tensor]:
        labels = labels_for(indices, tools.num_classes)
        images = generate_images(
            generator, vae, protocol.seed, indices, labels, params.latent_shape, size, device
        )  # (B, C, H, W)
        _check_size(images, tools.summary["image_shape"])
        small = thumbnail(images)
        near = tools.neighbours.nearest(small, NEAREST_SHOWN)  # (B, 3) each
        return [small, *near, *(network(images) for network in tools.networks)]

    for indices, (small, near, which, *features) in map_across_ranks(
        micro_batches(range(done, protocol.samples), size), measured, ranks
    ):
        yield indices, labels_for(indices, tools.num_classes), EvalBatch(small, near, which, features)


def _numbers(tools: Evaluator, seen: MetricAccumulator, params: Params, device: torch.device) -> dict[str, Any]:
    protocol = params.evaluate
    suffix, labels = sample_suffix(protocol.samples), labels_for(range(protocol.samples), tools.num_classes).numpy()
    metrics: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for stream, reference in zip(seen.streams, tools.references, strict=True):
        names, features = NAMES[reference.name], stream.features
        for key, (value, interval) in reference.measured(stream.statistics, features, labels, protocol).items():
            metrics[f"{key}{suffix}"], intervals[f"{key}{suffix}"] = value, interval
        if names.precision:
            near = precision_recall(spread_evenly(reference.features, MAX_REAL), features, device)
            for key, hits, count in (
                (f"{names.precision}{suffix}", near.samples_within, near.samples),
                (f"{names.recall}{suffix}", near.real_within, near.real),
            ):
                metrics[key], intervals[key] = hits / count, wilson(hits, count)
        if names.score and stream.network.probabilities is not None:
            score = inception_score(features, _in_parts(stream.network.probabilities), protocol.seed)
            metrics[f"{names.score}{suffix}"] = score
        if stream.network.head is not None:
            right = int((_in_parts(stream.network.predict)(features) == labels).sum())
            metrics["class_accuracy"], intervals["class_accuracy"] = right / len(labels), wilson(right, len(labels))
    metrics["within_class_variance"] = seen.spread.variance() / tools.real_spread.variance()
    of_features = within_class_variance(seen.streams[0].features, labels)
    metrics["within_class_variance_features"] = of_features / tools.references[0].within_class_variance
    metrics |= _nearness(torch.cat(seen.distances), tools.thumbnails)
    return metrics | {"intervals": intervals}


def _in_parts(network: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function on features (n, D) that hands them on a thousand at a time."""
    return lambda features: np.concatenate([network(x).cpu().numpy() for x in torch.from_numpy(features).split(1000)])


def _protocol(tools: Evaluator, params: Params, device: torch.device) -> dict[str, Any]:
    protocol, references = params.evaluate, tools.references
    return {
        "samples": protocol.samples,
        "seed": protocol.seed,
        "noise": "sample i from its own generator seeded with seed + i",
        "label_mode": "balanced: sample i is of class i modulo the number of classes",
        "micro_batch": params.sample.micro_batch,
        "uint8_rule": UINT8_RULE,
        "decode_precision": "fp32",
        "feature_precision": "fp32",
        "statistics_precision": "fp64",
        "device": device.type,
        "features": {network.name: network.sha256 for network in tools.networks},
        "resize": {network.name: RESIZE[network.name] for network in tools.networks},
        "within_class_variance_network": tools.networks[0].name,
        "kid_features": {name: "rms 1" if NAMES[name].kid_rescaled else "as they are" for name in protocol.features},
        "kid_subsets": protocol.kid_subsets,
        "kid_subset_size": min(protocol.kid_subset_size, protocol.samples, len(references[0].features)),
        "precision_recall": f"k = {NEIGHBOURS}, at most {MAX_REAL} real images",
        "intervals": "95 %; of drawing the samples, real images as given; distances to first order, shares by Wilson",
        "inception_score": f"mean over parts of {SCORE_PART} of a permutation drawn from seed",
        "reference": {reference.name: reference.source for reference in references},
        "reference_sha256": {reference.name: reference.digest for reference in references},
        "reference_images": references[0].count,
        "reference_manifest": references[0].manifest_digest,
        "thumbnails": len(tools.thumbnails.images),
        "copy_ratio": tools.thumbnails.copy_ratio,
    }


def _check(params: Params, summary: dict[str, Any], reference_dir: Path) -> None:
    samples, num_classes = params.evaluate.samples, len(summary["classes"])
    if samples < 2 * num_classes:
        raise UserError(
            f"Found evaluate.samples {samples}, expected at least 2 of each of {num_classes} classes "
            f"({2 * num_classes}): raise evaluate.samples."
        )
    expected = [params.data.channels, params.data.image_size, params.data.image_size]
    if summary["image_shape"] != expected:
        raise UserError(
            f"Found {reference_dir / SUMMARY} of images {summary['image_shape']}, expected {expected} as data says: "
            "build the reference again."
        )


def _check_size(images: Tensor, expected: list[int]) -> None:
    if list(images.shape[1:]) != expected:
        raise UserError(
            f"Found samples of shape {list(images.shape[1:])}, expected {expected} as the real images: "
            "take the autoencoder and the generator of these params."
        )


def _nearness(distances: Tensor, thumbnails: Thumbnails) -> dict[str, float | None]:
    usual = float(np.median(thumbnails.nearest_other))
    return {
        "copies": float(thumbnails.copied(distances).mean()),
        "nearest_distance_ratio": float(distances[:, 0].median()) / usual if usual > 0 else None,
    }


def _picture(samples: Tensor, found: Tensor, thumbnails: Thumbnails) -> Image.Image:
    """Draw the first samples, each above its nearest training images, nearest first."""
    samples, found = samples[:NEAREST_SAMPLES], found[:NEAREST_SAMPLES]
    rows = [samples, *(thumbnails.images[found[:, place]] for place in range(found.shape[1]))]
    return grid(torch.cat(rows), columns=len(samples))
