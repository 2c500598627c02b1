"""What is measured of a run: one pass over its samples, every number with the protocol it was measured by.

Shapes: N samples, B of them at a time, C channels, H x W pixels, K classes, T training thumbnails.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afm_pipe.console import Tick
from afm_pipe.errors import UserError
from afm_pipe.evaluation.features import NAMES, load_network
from afm_pipe.evaluation.measures import ClassSpread, sample_suffix, within_class_variance
from afm_pipe.evaluation.nearest import Neighbours, Thumbnails, thumbnail
from afm_pipe.evaluation.reference import SUMMARY, THUMBNAILS, FeatureStream, Reference
from afm_pipe.files import read_json
from afm_pipe.models.flow import Flow
from afm_pipe.params import Params
from afm_pipe.sampling import UINT8_RULE, grid, labels_for, stream_images

NEAREST_SAMPLES, NEAREST_SHOWN = 10, 3  # in the picture of nearest training images
CPU = torch.device("cpu")


def evaluate_run(
    params: Params,
    generator: Flow,
    vae: Any,
    reference_dir: Path,
    provenance: dict[str, Any],
    device: torch.device = CPU,
) -> Generator[Tick, None, tuple[dict[str, Any], Image.Image]]:
    """Measure a generator; return its metrics and a picture of samples above their nearest training images.

    Per network of evaluate.features the Frechet and the kernel distance to the real images, keys as in
    `features.NAMES`, followed by the sample count below 50,000 (fd_classifier_5k, fid, kid_clean_1234). KID of a
    perfect generator is a little below zero: with classes in equal shares its samples are not quite independent.

    class_accuracy        share of samples the reference's classifier puts in the class asked for (if it is used)
    within_class_variance variance of thumbnails' pixels within a class, averaged over classes, over real images';
                          _features: the same in the first network of evaluate.features
    copies                share of samples whose nearest training image, in pixels, is as much nearer than the second
                          nearest as for one training image in a thousand (`Thumbnails.copied`): new images give 0.001
    nearest_distance_ratio median distance of samples to the nearest training image, over the median of training
                          images to their nearest other; null when most training images have exact duplicates
    protocol              how it was measured, with `provenance` laid under it

    Memory does not grow with the number of samples but for their features.
    Raises UserError for too few samples, for a reference of other images, networks or params, for latents not finite.
    """
    protocol = params.evaluate
    summary = read_json(reference_dir / SUMMARY)
    num_classes = len(summary["classes"])
    _check(params, summary, reference_dir)
    networks = [load_network(name, reference_dir, device) for name in protocol.features]
    references = [Reference.load(reference_dir, network) for network in networks]
    thumbnails = Thumbnails.load(reference_dir / THUMBNAILS)
    neighbours = Neighbours(thumbnails.images)

    streams = [FeatureStream(network, protocol.samples) for network in networks]
    distances, pictured, found = [], [], []
    spread, real_spread = ClassSpread(num_classes), ClassSpread(num_classes)
    real_spread.add(thumbnails.images, torch.from_numpy(thumbnails.labels))
    samples = stream_images(generator, vae, params, protocol.seed, protocol.samples, num_classes, device)
    for indices, asked, images in samples:
        _check_size(images, summary["image_shape"])
        for stream in streams:
            stream.add(images)
        small = thumbnail(images)
        spread.add(small, asked)
        near, which = neighbours.nearest(small, NEAREST_SHOWN)  # (B, 3) each
        distances.append(near)
        if indices.start < NEAREST_SAMPLES:
            pictured.append(small)
            found.append(which)
        yield Tick(indices.stop, protocol.samples, "samples")

    suffix = sample_suffix(protocol.samples)
    labels = labels_for(range(protocol.samples), num_classes).numpy()
    metrics: dict[str, Any] = {}
    for stream, reference in zip(streams, references, strict=True):
        keys = NAMES[reference.name]
        frechet, kernel = reference.distances(stream.statistics, stream.features, protocol)
        metrics[f"{keys.distance}{suffix}"], metrics[f"{keys.kid}{suffix}"] = frechet, kernel
        if stream.network.head is not None:
            predicted = stream.network.predict(torch.from_numpy(stream.features)).numpy()
            metrics["class_accuracy"] = float((predicted == labels).mean())
    metrics["within_class_variance"] = spread.variance() / real_spread.variance()
    of_features = within_class_variance(streams[0].features, labels)
    metrics["within_class_variance_features"] = of_features / references[0].within_class_variance
    metrics |= _nearness(torch.cat(distances), thumbnails)
    metrics["protocol"] = provenance | {
        "samples": protocol.samples,
        "seed": protocol.seed,
        "noise": "sample i from its own generator seeded with seed + i",
        "label_mode": "balanced: sample i is of class i modulo the number of classes",
        "micro_batch": params.sample.micro_batch,
        "uint8_rule": UINT8_RULE,
        "decode_precision": "fp32",
        "device": device.type,
        "features": {network.name: network.sha256 for network in networks},
        "within_class_variance_network": networks[0].name,
        "kid_features": {name: "rms 1" if NAMES[name].kid_rescaled else "as they are" for name in protocol.features},
        "kid_subsets": protocol.kid_subsets,
        "kid_subset_size": min(protocol.kid_subset_size, protocol.samples, len(references[0].features)),
        "reference_images": references[0].count,
        "reference_manifest": references[0].manifest_digest,
        "thumbnails": len(thumbnails.images),
        "copy_ratio": thumbnails.copy_ratio,
    }
    return metrics, _picture(torch.cat(pictured), torch.cat(found), thumbnails)


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
