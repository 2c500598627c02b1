"""Statistics of the real images, which samples are measured against, and the floor their reconstructions set.

Shapes: N images, C channels, H x W pixels, D features, K classes.
"""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afm_pipe.evaluation.adm import adm_path, adm_references
from afm_pipe.evaluation.classifier import save_classifier, train_classifier
from afm_pipe.evaluation.features import LEGACY, SPATIAL, FeatureNetwork, load_networks
from afm_pipe.evaluation.nearest import build_thumbnails, thumbnail
from afm_pipe.evaluation.statistics import FeatureStream
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import write_json
from afm_pipe.runtime.progress import Progress
from afm_pipe.sampling.generate import grid, noise

SUMMARY, THUMBNAILS = "summary.json", "thumbnails.npz"
MAX_FEATURES = 50_000  # kept for KID; mean and covariance are of all images
CPU = torch.device("cpu")


def build_reference(
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    manifest_digest: str,
    vae: Any,
    folder: Path,
    device: torch.device = CPU,
) -> Generator[Progress, None, dict[str, Any]]:
    """Write the statistics of the real images into `folder`; return the summary, which is written there too.

    `images` (N, C, H, W) uint8 is an array, or anything that has a shape and a dtype and is indexed like one (images
    too many for memory); `labels` (N,) count from 0 in the order of `classes`.

    Written: the classifier, if it is among evaluate.features; NAME.npz per feature network; thumbnails.npz;
    summary.json; real.png and reconstructed.png (a row per class, the same images in both).
    The reconstructions are of posterior samples, evenly spread over the images and as many as evaluate.samples at most:
    their distance is the floor for a generator that matches the latents exactly.
    Raises UserError for images of another shape than params say, and for a missing feature network.
    """
    _check(params, images, labels, classes)
    folder.mkdir(parents=True, exist_ok=True)
    names = params.evaluate.features
    adm = params.evaluate.adm_reference if LEGACY in names else None
    dinov2_sha256 = params.evaluate.dinov2_sha256
    others = [name for name in names if name != "classifier"]
    load_networks(others, folder, device, dinov2_sha256=dinov2_sha256)  # fail before the classifier is trained
    if adm:
        adm_path(adm)
    summary: dict[str, Any] = {
        "images": len(images),
        "image_shape": list(images.shape[1:]),
        "classes": list(classes),
        "manifest": manifest_digest,
    }
    if "classifier" in names:
        training = train_classifier(params.reference.classifier, images, labels, len(classes), params.seed, device)
        classifier, summary["classifier_accuracy"] = yield from training
        save_classifier(classifier, folder)
    networks = load_networks(names, folder, device, dinov2_sha256=dinov2_sha256)

    size = params.sample.micro_batch
    kept = _evenly(len(images), MAX_FEATURES)
    chosen = _evenly(len(images), params.evaluate.samples)
    shown = _shown(networks, np.arange(len(images)), kept, bool(adm))
    visited = max(shown, key=len)
    total = len(visited) + len(chosen)
    collected = [FeatureStream(network, len(kept)) for network in networks]
    for start in range(0, len(visited), size):
        rows = visited[start : start + size]
        batch = _rows(images, rows)
        for stream, own in zip(collected, shown, strict=True):
            if len(own) == len(visited):
                stream.add(batch, np.isin(rows, kept))
            elif len(own) and np.isin(rows, own).any():
                stream.add(batch[torch.from_numpy(np.isin(rows, own))])
        yield Progress(start + len(rows), total, "images", "features of real images")
    references = [stream.reference(labels[kept], len(images), manifest_digest) for stream in collected]
    if adm:
        references = list(adm_references(adm, networks, references, size))
    for reference in references:
        reference.save(folder)
    summary["within_class_variance"] = references[0].within_class_variance

    collected = [FeatureStream(network, len(chosen)) for network in networks]
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        rebuilt = _reconstructed(params, vae, images, rows)
        for stream in collected:
            stream.add(rebuilt)
        yield Progress(len(visited) + start + len(rows), total, "images", "features of reconstructions")
    for stream, reference in zip(collected, references, strict=True):
        measured = reference.measured(stream.statistics, stream.features, labels[chosen], params.evaluate)
        summary |= {f"{key}_reconstruction": value for key, (value, _) in measured.items()}
    summary["reconstructions"] = len(chosen)

    kept = np.sort(_spread_over_classes(labels, len(classes), params.reference.thumbnails))
    small = [thumbnail(_rows(images, kept[start : start + size])) for start in range(0, len(kept), size)]
    thumbnails = build_thumbnails(torch.cat(small), labels[kept])
    thumbnails.save(folder / THUMBNAILS)
    summary["thumbnails"] = len(kept)

    _draw(params, vae, images, labels, folder)
    write_json(folder / SUMMARY, summary)
    return summary


def _shown(networks: Sequence[FeatureNetwork], every: np.ndarray, kept: np.ndarray, adm: bool) -> list[np.ndarray]:
    """Return which images each network is shown: where ADM's statistics take the place of ours, only what is used.

    That is, for the first network, the images kept for its variance within a class, and none for another.
    """
    replaced = [adm and network.name in (LEGACY, SPATIAL) for network in networks]
    none = every[:0]
    return [(none if place else kept) if given else every for place, given in enumerate(replaced)]


def _check(params: Params, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    expected = (params.data.channels, params.data.image_size, params.data.image_size)
    if images.shape[1:] != expected or images.dtype != np.uint8:
        raise UserError(
            f"Found images of shape {tuple(images.shape[1:])} {images.dtype}, expected {expected} uint8: "
            "check data.image_size and data.channels, and prepare the images again."
        )
    if len(labels) != len(images) or len(classes) != len(np.unique(labels)):
        raise UserError(
            f"Found {len(labels)} labels of {len(np.unique(labels))} classes for {len(images)} images, expected one "
            f"each of {len(classes)} classes: prepare the images again."
        )


def _rows(images: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images[rows]))


@torch.inference_mode()
def _reconstructed(params: Params, vae: Any, images: np.ndarray, rows: np.ndarray) -> Tensor:
    """Return images (B, C, H, W) uint8 encoded and decoded, through a posterior sample of a stochastic autoencoder."""
    encoded = vae.encode(_rows(images, rows), params.encode.precision)
    drawn = noise(params.seed, [int(row) for row in rows], vae.spec.shape)
    return vae.spec.to_uint8(vae.decode(vae.sample(encoded, drawn))).cpu()


def _draw(params: Params, vae: Any, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write the first images of the first classes, and their reconstructions, one class a row."""
    columns = params.sample.per_class
    real, rebuilt = [], []
    for label in range(min(params.sample.classes, int(labels.max()) + 1)):
        rows = np.flatnonzero(labels == label)[:columns]
        blank = torch.full((columns - len(rows), *images.shape[1:]), 255, dtype=torch.uint8)  # a class of too few
        real.append(torch.cat([_rows(images, rows), blank]))
        rebuilt.append(torch.cat([_reconstructed(params, vae, images, rows), blank]))
    grid(torch.cat(real), columns).save(folder / "real.png")
    grid(torch.cat(rebuilt), columns).save(folder / "reconstructed.png")


def spread_evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` rows, evenly spaced."""
    return rows if len(rows) <= most else rows[_evenly(len(rows), most)]


def _evenly(total: int, most: int) -> np.ndarray:
    """Return at most `most` of `total` indices, evenly spaced: images are sorted by class, so classes share alike."""
    return np.arange(total) if total <= most else np.arange(most) * total // most


def _spread_over_classes(labels: np.ndarray, num_classes: int, most: int) -> np.ndarray:
    """Return at most `most` indices, a class as often as any other while it has images left."""
    rank = np.empty(len(labels), dtype=np.int64)  # of an image within its class
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))[:most]
