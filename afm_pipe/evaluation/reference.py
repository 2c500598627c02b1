"""Build the reference: statistics of the real images, and the distances of their reconstructions.

Legend: N images, C channels, H x W pixels, D features.
"""

import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.data.manifest import Manifest
from afm_pipe.evaluation.accumulate import FeatureStream
from afm_pipe.evaluation.adm import adm_path, adm_references
from afm_pipe.evaluation.classifier import save_classifier, train_classifier
from afm_pipe.evaluation.features import load_networks
from afm_pipe.evaluation.measures import psnr, spread_evenly, squared_errors, within_class_variance
from afm_pipe.evaluation.networks import LEGACY, SPATIAL, FeatureNetwork
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.evaluation.thumbnails import build_thumbnails, thumbnail
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import write_json
from afm_pipe.runtime.progress import Progress
from afm_pipe.sampling.image_writers import grid
from afm_pipe.sampling.sampler import seeded_noise

SUMMARY, THUMBNAILS = "summary.json", "thumbnails.npz"
MAX_FEATURES = 50_000  # kept for KID; mean and covariance are of all images
CPU = torch.device("cpu")


def build_reference(
    params: Params,
    manifest: Manifest,
    images: np.ndarray,
    autoencoder: Autoencoder,
    folder: Path,
    device: torch.device = CPU,
) -> Generator[Progress, None, dict[str, Any]]:
    """Write the statistics of the real images into `folder`; return the summary, which is written there too.

    `images` (N, C, H, W) uint8 are those of the manifest: an array, or a lazy one with shape, dtype and indexing.

    Writes the classifier, if evaluate.features names it; NAME.npz for each feature network; thumbnails.npz;
    summary.json; real.png and reconstructed.png (a row per class, the same images in both). The reconstructions are
    spread evenly over the images, at most evaluate.samples of them: their distance is the lower bound for a generator
    that matches the latents exactly. Their PSNR is the mean over images, and that of the mean squared error.
    Statistics and reconstructions are of images in the shares of
    reference.class_shares; where those are unequal, the summary holds `class_counts`. Raises UserError for images of
    another shape than params say, and for a missing feature network.
    """
    _check(params, manifest, images)
    folder.mkdir(parents=True, exist_ok=True)
    settings, labels, size = params.evaluate, manifest.labels, params.sample.micro_batch
    adm = settings.adm_reference if LEGACY in settings.features else None
    if adm:
        adm_path(adm)
    # Report missing weights before the classifier is trained.
    load_networks(settings, folder, device, [name for name in settings.features if name != "classifier"])
    summary: dict[str, Any] = {
        "images": len(images),
        "image_shape": list(images.shape[1:]),
        "classes": list(manifest.classes),
        "manifest": manifest.digest,
    }
    if "classifier" in settings.features:
        classes = len(manifest.classes)
        training = train_classifier(params.reference.classifier, images, labels, classes, params.seed, device)
        classifier, summary["classifier_accuracy"] = yield from training
        save_classifier(classifier, folder)
    networks = load_networks(settings, folder, device)

    population = _in_shares(labels, len(manifest.classes), params.reference.class_shares)
    counts = np.bincount(labels[population], minlength=len(manifest.classes))
    if counts.min() != counts.max():
        summary["class_counts"] = counts.tolist()
    kept = population[spread_evenly(len(population), MAX_FEATURES)]
    needed = _needed(networks, population, kept, bool(adm))
    visited, chosen = max(needed, key=len), population[spread_evenly(len(population), settings.samples)]
    total = len(visited) + len(chosen)
    streams = [FeatureStream(network, len(kept)) for network in networks]
    for start in range(0, len(visited), size):
        rows = visited[start : start + size]
        batch = _rows(images, rows)
        for stream, own in zip(streams, needed, strict=True):
            if len(own) == len(visited):
                stream.add(stream.network(batch), np.isin(rows, kept))
            elif np.isin(rows, own).any():
                stream.add(stream.network(batch[torch.from_numpy(np.isin(rows, own))]))
        yield Progress(start + len(rows), total, "images", "features of real images")
    references = [_reference(stream, manifest, len(population), labels[kept]) for stream in streams]
    if adm:
        references = list(adm_references(adm, networks, references, size))
    for reference in references:
        reference.save(folder)
    summary["within_class_variance"] = references[0].within_class_variance

    streams, errors = [FeatureStream(network, len(chosen)) for network in networks], []
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        rebuilt = _reconstructed(params, autoencoder, images, rows)
        errors.append(squared_errors(_rows(images, rows), rebuilt))
        for stream in streams:
            stream.add(stream.network(rebuilt))
        yield Progress(len(visited) + start + len(rows), total, "images", "features of reconstructions")
    for stream, reference in zip(streams, references, strict=True):
        measured = reference.distances(stream.statistics, stream.features, labels[chosen], settings)
        summary |= {f"{key}_reconstruction": value for key, (value, _) in measured.items()}
    summary["reconstructions"] = len(chosen)
    summary["psnr_reconstruction"], summary["psnr_of_mse_reconstruction"] = psnr(torch.cat(errors))

    kept = np.sort(_spread_over_classes(labels, len(manifest.classes), params.reference.thumbnails))
    small = [thumbnail(_rows(images, kept[start : start + size])) for start in range(0, len(kept), size)]
    build_thumbnails(torch.cat(small), labels[kept]).save(folder / THUMBNAILS)
    summary["thumbnails"] = len(kept)

    _draw(params, autoencoder, images, labels, folder)
    write_json(folder / SUMMARY, summary)
    return summary


def describe_reconstructions(summary: dict[str, Any]) -> str:
    """Return one line of text: how well the autoencoder reconstructs."""
    each, of_mse = (
        "infinite" if value is None else f"{value:.2f} dB"
        for value in (summary["psnr_reconstruction"], summary["psnr_of_mse_reconstruction"])
    )
    return (
        f"PSNR of {summary['reconstructions']} reconstructions: {each} as the mean over images, {of_mse} from the mean "
        "squared error."
    )


def _needed(networks: Sequence[FeatureNetwork], every: np.ndarray, kept: np.ndarray, adm: bool) -> list[np.ndarray]:
    """Return the images that each network needs: all of them, unless ADM's statistics replace ours.

    Then it is none, or, for the first network, the images kept for its variance within classes.
    """
    replaced = [adm and network.name in (LEGACY, SPATIAL) for network in networks]
    return [(every[:0] if index else kept) if by_adm else every for index, by_adm in enumerate(replaced)]


def _reference(stream: FeatureStream, manifest: Manifest, count: int, labels: np.ndarray) -> Reference:
    """Return the reference of a stream of `count` images; `labels` are of its features.

    ADM's statistics replace those of no images.
    """
    statistics, network = stream.statistics, stream.network
    empty = statistics.count == 0
    return Reference(
        name=network.name,
        sha256=network.sha256,
        manifest_digest=manifest.digest,
        count=count,
        mu=statistics.mu,
        sigma=statistics.scatter if empty else statistics.sigma,
        features=stream.features,
        labels=labels,
        within_class_variance=math.nan if empty else within_class_variance(stream.features, labels),
    )


def _check(params: Params, manifest: Manifest, images: np.ndarray) -> None:
    expected = (params.data.channels, params.data.image_size, params.data.image_size)
    if images.shape[1:] != expected or images.dtype != np.uint8:
        raise UserError(
            f"Found images of shape {tuple(images.shape[1:])} {images.dtype}, expected {expected} uint8: "
            "check data.image_size and data.channels, and prepare the images again."
        )
    labels, present = len(manifest.labels), len(np.unique(manifest.labels))
    if labels != len(images) or len(manifest.classes) != present:
        raise UserError(
            f"Found {labels} labels of {present} classes for {len(images)} images, expected one each of "
            f"{len(manifest.classes)} classes: prepare the images again."
        )


def _rows(images: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images[rows]))


@torch.inference_mode()
def _reconstructed(params: Params, autoencoder: Autoencoder, images: np.ndarray, rows: np.ndarray) -> Tensor:
    """Return images (N, C, H, W) uint8 encoded and decoded, through a posterior sample of a stochastic autoencoder."""
    encoded = autoencoder.encode(_rows(images, rows), params.encode.precision)
    noise = seeded_noise(params.seed, [int(row) for row in rows], autoencoder.spec.shape)
    return autoencoder.spec.to_uint8(autoencoder.decode(autoencoder.sample(encoded, noise))).cpu()


def _draw(params: Params, autoencoder: Autoencoder, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write the first images of the first classes, and their reconstructions, one class per row."""
    columns = params.sample.per_class
    real, rebuilt = [], []
    for label in range(min(params.sample.classes, int(labels.max()) + 1)):
        rows = np.flatnonzero(labels == label)[:columns]
        blank = torch.full((columns - len(rows), *images.shape[1:]), 255, dtype=torch.uint8)  # for small classes
        real.append(torch.cat([_rows(images, rows), blank]))
        rebuilt.append(torch.cat([_reconstructed(params, autoencoder, images, rows), blank]))
    grid(torch.cat(real), columns).save(folder / "real.png")
    grid(torch.cat(rebuilt), columns).save(folder / "reconstructed.png")


def class_counts(params: Params, summary: dict[str, Any], reference: Reference, folder: Path) -> list[int]:
    """Return the number of images of each class in the statistics: samples compared with them are in these shares.

    Raises UserError where they are not what reference.class_shares says.
    """
    classes, rule, found = len(summary["classes"]), params.reference.class_shares, summary.get("class_counts")
    if found is None:
        of_class = np.bincount(reference.labels, minlength=classes)
        counts = [reference.count // classes] * classes
        sound = bool(np.ptp(of_class) <= (len(reference.labels) >= MAX_FEATURES))  # one more where not all are kept
    else:
        counts = found
        sound = rule == "data" and isinstance(found, list) and len(found) == classes
        sound = sound and all(type(count) is int and count >= 0 for count in found)
    if not sound or (rule == "data" and sum(counts) != summary["images"]):
        raise UserError(
            f"Found {folder / SUMMARY} of images in other class shares, expected {rule} as reference.class_shares "
            "says: build the reference again."
        )
    return counts


def _in_shares(labels: np.ndarray, num_classes: int, shares: str) -> np.ndarray:
    """Return the indices of the images in the statistics: all, or as many of each class as the smallest has."""
    members = [np.flatnonzero(labels == label) for label in range(num_classes)]
    least = min(map(len, members))
    if shares == "data" or least == max(map(len, members)):
        return np.arange(len(labels))
    return np.sort(np.concatenate([each[spread_evenly(len(each), least)] for each in members]))


def _spread_over_classes(labels: np.ndarray, num_classes: int, maximum: int) -> np.ndarray:
    """Return at most `maximum` indices, spread equally over the classes as far as their images reach."""
    rank = np.empty(len(labels), dtype=np.int64)  # of an image within its class
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))[:maximum]
