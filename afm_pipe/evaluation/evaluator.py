"""Evaluate a generator in one pass over its samples, and record the protocol with the metrics.

Legend: N samples, C channels, H x W pixels, D features.
"""

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afm_pipe.data.classes import require_same_classes
from afm_pipe.distributed.mapping import map_across_ranks
from afm_pipe.evaluation.accumulate import MetricAccumulator
from afm_pipe.evaluation.adm import require_reference
from afm_pipe.evaluation.features import load_networks
from afm_pipe.evaluation.held_out import load_held_out
from afm_pipe.evaluation.intervals import fraction
from afm_pipe.evaluation.measures import (
    SCORE_PART,
    ClassSpread,
    inception_score,
    sample_suffix,
    spread_evenly,
    within_class_variance,
)
from afm_pipe.evaluation.networks import LEGACY, METRIC_NAMES, SPATIAL
from afm_pipe.evaluation.precision_recall import MAX_REAL, NEIGHBORS, precision_recall
from afm_pipe.evaluation.reference import SUMMARY, THUMBNAILS, class_counts
from afm_pipe.evaluation.sliced import DIRECTIONS
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.evaluation.thumbnails import Neighbors, Thumbnails, thumbnail
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json
from afm_pipe.runtime.progress import Progress
from afm_pipe.sampling.image_writers import grid
from afm_pipe.sampling.sampler import Sampler, labels_in_shares

PICTURED, NEIGHBORS_MEASURED = 10, 3  # samples shown with their nearest training images; neighbors of a sample
IN_TURN = "balanced: sample i is of class i modulo the number of classes"
IN_SHARES = "in the reference's class shares: the next sample is of the class that lags most behind its share"
CPU = torch.device("cpu")


class Evaluator:
    """Measures generators; loads feature networks and statistics of the real images once.

    Raises UserError for too few samples, and for a reference of other images, networks or params.
    """

    def __init__(self, params: Params, reference_dir: Path, device: torch.device = CPU) -> None:
        self.settings, self.device, self.folder = params.evaluate, device, reference_dir
        self.summary = read_json(reference_dir / SUMMARY)
        _check(params, self.summary, reference_dir)
        self.num_classes = len(self.summary["classes"])
        self.networks = load_networks(self.settings, reference_dir, device)
        self.references = [Reference.load(reference_dir, network) for network in self.networks]
        for reference in self.references:
            if reference.name in (LEGACY, SPATIAL):
                require_reference(self.settings.adm_reference, reference, reference_dir)
        self.held_out = load_held_out(reference_dir, self.summary, self.references)
        self.class_counts = class_counts(params, self.summary, self.references[0], reference_dir)
        self.labels = labels_in_shares(self.settings.samples, self.class_counts)
        self.thumbnails = Thumbnails.load(reference_dir / THUMBNAILS)
        self.neighbors = Neighbors(self.thumbnails.images)
        self.real_spread = ClassSpread(self.num_classes)
        self.real_spread.add(self.thumbnails.images, torch.from_numpy(self.thumbnails.labels))

    def require_classes(self, found: Any, where: Path | str) -> None:
        """Raise UserError unless `found`, the class names of `where`, are those of the real images."""
        require_same_classes(found, where, self.summary["classes"], self.folder / SUMMARY)

    def evaluate(
        self,
        sampler: Sampler,
        provenance: dict[str, Any],
        work_dir: Path | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> Generator[Progress, None, dict[str, Any] | None]:
        """Measure a generator; return its metrics.

        For each network of evaluate.features: the Frechet, kernel and sliced Wasserstein distances to the real images,
        precision and recall, with keys as in `METRIC_NAMES`, followed by the sample count below 50,000
        (fd_classifier_5k, fid, kid_clean_1234). Where images are held out: ratio_ of Frechet and sliced distances, and
        difference_ of kernel distances, to those of held-out images, followed by the number compared (`held_out`).
        Inception with TensorFlow's resizing adds sfid and inception_score. The KID of a perfect generator is slightly
        below zero: with fixed class shares its samples are not quite independent.

        class_accuracy         fraction of samples that the reference's classifier assigns to their class
        within_class_variance  pixel variance of thumbnails within a class, averaged over classes, relative to the real
                               images, null where those have none; _features: the same in the first network
        copies                 fraction of samples counted as copies (`Thumbnails.copied`); 0.001 for new real images
        nearest_distance_ratio median distance of samples to the nearest training image, relative to that of training
                               images, in the same class shares, to their nearest other; null when most training
                               images have exact duplicates
        intervals              {key: [low, high]}, 95 %, of distances and fractions
        protocol               how it was measured, merged into `provenance`

        Every process of the sampler's group calls this; the main process returns the result, the others None. The
        numbers do not depend on the number of processes. With a `work_dir`, the main process saves a checkpoint there
        every `checkpoint_seconds`, from which the same call resumes with the same result; the folder's name must
        identify generator and protocol. Of the samples, only their features stay in memory.
        Raises UserError for other classes than the reference's, for non-finite latents and for samples of another shape
        than the real images.
        """
        self.require_classes(sampler.class_names, f"model {provenance.get('run', 'of a trial')}")
        count, size = self.settings.samples, sampler.micro_batch
        is_main = sampler.group.is_main_process
        seen = MetricAccumulator(self.networks, count, self.num_classes)
        if work_dir is not None and is_main:
            seen.restore(work_dir)
        done = sampler.group.all_gather(seen.done)[0]
        saved = time.monotonic()

        def measure(indices: range) -> list[Tensor]:
            small = thumbnail(images := self._images(sampler, indices))
            distances, _ = self.neighbors.nearest(small, NEIGHBORS_MEASURED)
            return [small, distances, *(network(images) for network in self.networks)]

        pieces = sampler.micro_batches(range(done, count))
        for indices, (small, distances, *features) in map_across_ranks(pieces, measure, sampler.group):
            seen.add(features, small, distances, self.labels[indices.start : indices.stop])
            if work_dir is not None and time.monotonic() - saved >= checkpoint_seconds:
                seen.save(work_dir)
                saved = time.monotonic()
            yield Progress(indices.stop, count, "samples")
        if not is_main:
            return None
        metrics, held_out = self._metrics(seen)
        return metrics | {"protocol": provenance | self._protocol(size) | held_out}

    def nearest(self, sampler: Sampler) -> Image.Image:
        """Return a picture of the first samples, each above its nearest training images, nearest first."""
        samples = thumbnail(self._images(sampler, range(PICTURED)))
        _, found = self.neighbors.nearest(samples, NEIGHBORS_MEASURED)  # (N, 3)
        rows = [samples, *(self.thumbnails.images[neighbors] for neighbors in found.T)]
        return grid(torch.cat(rows), columns=len(samples))

    def _images(self, sampler: Sampler, indices: range) -> Tensor:
        """Generate samples (N, C, H, W) uint8."""
        images = sampler.images(indices, self.labels[indices.start : indices.stop], self.settings.seed)
        if list(images.shape[1:]) != self.summary["image_shape"]:
            raise UserError(
                f"Found samples of shape {list(images.shape[1:])}, expected {self.summary['image_shape']} as the real "
                "images: use the autoencoder and the generator of these params."
            )
        return images

    def _metrics(self, seen: MetricAccumulator) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the metrics, and what the protocol says of held-out images."""
        count = self.settings.samples
        suffix, labels = sample_suffix(count), self.labels.numpy()
        metrics: dict[str, Any] = {}
        intervals: dict[str, list[float]] = {}
        compared: dict[str, Any] = {}
        for index, (stream, reference) in enumerate(zip(seen.streams, self.references, strict=True)):
            names, features = METRIC_NAMES[reference.name], stream.features
            measured = reference.distances(stream.statistics, features, labels, self.settings)
            measured |= reference.sliced_distance(features, labels, self.settings)
            if names.suffix is not None:
                real = reference.features[spread_evenly(len(reference.features), MAX_REAL)]
                near = precision_recall(real, features, self.device)
                measured[f"precision{names.suffix}"] = fraction(near.samples_within, near.samples)
                measured[f"recall{names.suffix}"] = fraction(near.real_within, near.real)
            for key, (value, interval) in measured.items():
                metrics[f"{key}{suffix}"], intervals[f"{key}{suffix}"] = value, interval
            if self.held_out is not None:
                beside = self.held_out[index].compare(reference, features, labels, self.settings)
                metrics |= {key: value for key, (value, _) in beside.measured.items()}
                intervals |= {key: interval for key, (_, interval) in beside.measured.items()}
                compared[reference.name] = beside.record()
            if stream.network.probabilities is not None:
                probabilities = _in_parts(stream.network.probabilities)
                metrics[f"inception_score{suffix}"] = inception_score(features, probabilities, self.settings.seed)
            if stream.network.head is not None:
                correct = int((_in_parts(stream.network.predict)(features) == labels).sum())
                metrics["class_accuracy"], intervals["class_accuracy"] = fraction(correct, count)
        metrics["within_class_variance"] = _ratio(seen.spread.variance(), self.real_spread.variance())
        of_features = within_class_variance(seen.streams[0].features, labels)
        metrics["within_class_variance_features"] = _ratio(of_features, self.references[0].within_class_variance)
        distances, usual = torch.cat(seen.distances), self.thumbnails.median_nearest_other(self.class_counts)
        metrics["copies"] = float(self.thumbnails.copied(distances).mean())
        metrics["nearest_distance_ratio"] = _ratio(float(distances[:, 0].median()), usual)
        held_out = {"held_out": {**self.summary["held_out"], "compared": compared}} if compared else {}
        return metrics | {"intervals": intervals}, held_out

    def _protocol(self, micro_batch: int) -> dict[str, Any]:
        settings, references = self.settings, self.references
        return {
            "samples": settings.samples,
            "seed": settings.seed,
            "noise": "sample i from its own generator seeded with seed + i",
            "label_mode": IN_SHARES if len(set(self.class_counts)) > 1 else IN_TURN,
            "class_shares": "the data's" if len(set(self.class_counts)) > 1 else "equal",
            "images_per_class": [min(self.class_counts), max(self.class_counts)],
            "micro_batch": micro_batch,
            "uint8_rule": "round",
            "decode_precision": "fp32",
            "feature_precision": "fp32",
            "statistics_precision": "fp64",
            "device": self.device.type,
            "features": {network.name: network.sha256 for network in self.networks},
            "resize": {network.name: METRIC_NAMES[network.name].resize for network in self.networks},
            "within_class_variance_network": self.networks[0].name,
            "kid_features": {
                name: "rms 1" if METRIC_NAMES[name].kid_rescaled else "as they are" for name in settings.features
            },
            "kid_subsets": settings.kid_subsets,
            "kid_subset_size": min(settings.kid_subset_size, settings.samples, len(references[0].features)),
            "sliced_directions": DIRECTIONS,
            "precision_recall": f"k = {NEIGHBORS}, at most {MAX_REAL} real images",
            "intervals": "95 %; of drawing the samples, real images as given; distances to first order, "
            "shares by Wilson",
            "inception_score": f"mean over parts of {SCORE_PART} of a permutation drawn from seed",
            "reference": {reference.name: reference.source for reference in references},
            "reference_sha256": {reference.name: reference.digest for reference in references},
            "reference_images": references[0].count,
            "reference_manifest": references[0].manifest_digest,
            "thumbnails": len(self.thumbnails.images),
            "copy_ratio": self.thumbnails.copy_ratio,
        }


def _ratio(value: float, real: float) -> float | None:
    """Return a value relative to the real images', or None where that is 0 or unknown."""
    return value / real if real > 0 else None


def _in_parts(network: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that applies the network to features (N, D), 1,000 rows at a time."""
    return lambda features: np.concatenate([network(x).cpu().numpy() for x in torch.from_numpy(features).split(1000)])


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
