"""Statistics of the real images, which samples are measured against, and the floor their reconstructions set.

Shapes: N images, C channels, H x W pixels, D features, K classes.
"""

import hashlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afm_pipe.console import Tick
from afm_pipe.errors import UserError
from afm_pipe.evaluation.classifier import save_classifier, train_classifier
from afm_pipe.evaluation.features import LEGACY, NAMES, SPATIAL, FeatureNetwork, load_networks
from afm_pipe.evaluation.frechet import Array, Statistics, frechet_and_map
from afm_pipe.evaluation.intervals import around, frechet_error, kernel_error
from afm_pipe.evaluation.measures import kid_of_subsets, root_mean_square, within_class_variance
from afm_pipe.evaluation.nearest import build_thumbnails, load_arrays, thumbnail
from afm_pipe.files import write_json
from afm_pipe.models.autoencoder import decode, encode_moments, sample_latent
from afm_pipe.params import Evaluate, Params
from afm_pipe.sampling import grid, noise, to_uint8

SUMMARY, THUMBNAILS = "summary.json", "thumbnails.npz"
OWN = "training images"
SCALARS = {
    "name": str,
    "sha256": str,
    "manifest_digest": str,
    "count": int,
    "within_class_variance": float,
    "source": str,
}
MAX_FEATURES = 50_000  # kept for KID; mean and covariance are of all images
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Reference:
    """What is kept of the real images in one network's features, and of which network and images it is."""

    name: str
    sha256: str
    manifest_digest: str
    count: int
    mu: Array
    sigma: Array
    features: np.ndarray
    labels: np.ndarray
    within_class_variance: float
    source: str = OWN
    """Whose statistics: our own images', or `adm SHA256`; count, manifest and labels are then still our images'."""

    @property
    def digest(self) -> str:
        """Hash of mean and covariance, by which a reference is told from another."""
        return hashlib.sha256(self.mu.tobytes() + self.sigma.tobytes()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write NAME.npz into a folder."""
        arrays: dict[str, Any] = {field: np.asarray(value) for field, value in vars(self).items()}
        np.savez(folder / f"{self.name}.npz", **arrays)

    @classmethod
    def load(cls, folder: Path, network: FeatureNetwork) -> "Reference":
        """Read the statistics of a network's features. Raises UserError when they are missing or another's."""
        path = folder / f"{network.name}.npz"
        arrays = load_arrays(path, tuple(cls.__dataclass_fields__))
        fields: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in arrays.items()}
        found = cls(**fields)
        if {name: type(fields[name]) for name in SCALARS} != SCALARS or not _belong_together(arrays):
            raise UserError(
                f"Found {path} with arrays that do not belong together, expected mean (D,), covariance (D, D), "
                "features (N, D) and labels (N,) of one network: build the reference again."
            )
        for what, value, expected in (
            ("network", found.name, network.name),
            ("network sha256", found.sha256, network.sha256),
            ("feature width", found.mu.shape, (network.dim,)),
        ):
            if value != expected:
                raise UserError(
                    f"Found {path} of {what} {value}, expected {expected}: features of one network or mode are never "
                    "compared with statistics of another; build the reference again."
                )
        return found

    def measured(
        self, statistics: Statistics, features: np.ndarray, labels: np.ndarray, params: Evaluate
    ) -> dict[str, tuple[float, list[float]]]:
        """Return the distances to other images by key, each with its interval.

        They are given by their statistics, features (N, D) and labels (N,).
        """
        names = NAMES[self.name]
        value, pull = frechet_and_map(statistics.mu, statistics.sigma, self.mu, self.sigma)
        error = frechet_error(features, labels, self.mu, pull)
        found = {names.distance: (value, around(value, error, 0.0))}
        if names.kid:
            size = root_mean_square(self.features) if names.kid_rescaled else 1.0
            sets = self.features, features
            each = kid_of_subsets(*sets, params.kid_subsets, params.kid_subset_size, params.seed, size)
            found[names.kid] = float(each.mean()), around(each.mean(), kernel_error(*sets, labels, each, size))
        return found


def build_reference(
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    manifest_digest: str,
    vae: Any,
    folder: Path,
    device: torch.device = CPU,
) -> Generator[Tick, None, dict[str, Any]]:
    """Write the statistics of the real images into `folder`; return the summary, which is written there too.

    `images` (N, C, H, W) uint8 is an array, or anything that has a shape and a dtype and is indexed like one (images
    too many for memory); `labels` (N,) count from 0 in the order of `classes`.

    Written: the classifier, if it is among evaluate.features; NAME.npz per feature network; thumbnails.npz;
    summary.json; real.png and reconstructed.png (a row per class, the same images in both).
    The reconstructions are of posterior samples, evenly spread over the images and as many as evaluate.samples at most:
    their distance is the floor for a generator that matches the latents exactly.
    Raises UserError for images of another shape than params say, and for a missing feature network.
    """
    from afm_pipe.evaluation.adm import adm_path, adm_references

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
        yield Tick(start + len(rows), total, "images", "features of real images")
    references = [stream.reference(labels[kept], len(images), manifest_digest) for stream in collected]
    if adm:
        references = list(adm_references(adm, networks, references, size))
    for reference in references:
        reference.save(folder)
    summary["within_class_variance"] = references[0].within_class_variance

    collected = [FeatureStream(network, len(chosen)) for network in networks]
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        rebuilt = _reconstructed(params, vae, images, rows, device)
        for stream in collected:
            stream.add(rebuilt)
        yield Tick(len(visited) + start + len(rows), total, "images", "features of reconstructions")
    for stream, reference in zip(collected, references, strict=True):
        measured = reference.measured(stream.statistics, stream.features, labels[chosen], params.evaluate)
        summary |= {f"{key}_reconstruction": value for key, (value, _) in measured.items()}
    summary["reconstructions"] = len(chosen)

    kept = np.sort(_spread_over_classes(labels, len(classes), params.reference.thumbnails))
    small = [thumbnail(_rows(images, kept[start : start + size])) for start in range(0, len(kept), size)]
    thumbnails = build_thumbnails(torch.cat(small), labels[kept])
    thumbnails.save(folder / THUMBNAILS)
    summary["thumbnails"] = len(kept)

    _draw(params, vae, images, labels, folder, device)
    write_json(folder / SUMMARY, summary)
    return summary


def _belong_together(arrays: dict[str, np.ndarray]) -> bool:
    kinds = [arrays[name].dtype.kind for name in ("mu", "sigma", "features", "labels")]
    if kinds != ["f", "f", "f", "i"] or arrays["mu"].ndim != 1 or arrays["labels"].ndim != 1:
        return False
    width, count, features = len(arrays["mu"]), len(arrays["labels"]), arrays["features"]
    adm = str(arrays["source"]).startswith("adm ")  # then features are ADM's, or those of the images that are shown
    return arrays["sigma"].shape == (width, width) and features.ndim == 2 and (adm or len(features) == count)


class FeatureStream:
    """Statistics of a stream of images in one network's features, and up to `keep` of the features themselves."""

    def __init__(self, network: FeatureNetwork, keep: int) -> None:
        self.network = network
        self.statistics = Statistics.none(network.dim)
        self._features = np.empty((keep, network.dim), dtype=np.float32)
        self._filled = 0

    def add(self, images: Tensor, wanted: np.ndarray | None = None) -> None:
        """Take in images (B, C, H, W) uint8; keep the features of those `wanted` (B,), all without it."""
        self.take(self.network(images), wanted)

    def take(self, seen: Tensor, wanted: np.ndarray | None = None) -> None:
        """Take in features (B, D) of images, as `add` does."""
        features = seen.numpy()
        self.statistics += Statistics.of(features)
        kept = features if wanted is None else features[wanted]
        self._features[self._filled : self._filled + len(kept)] = kept
        self._filled += len(kept)

    @property
    def features(self) -> np.ndarray:
        return self._features[: self._filled]

    def state(self) -> dict[str, np.ndarray]:
        """Return what was taken in, as arrays by name."""
        name, s = self.network.name, self.statistics
        return {f"{name}/features": self.features, f"{name}/mu": s.mu, f"{name}/scatter": s.scatter}

    def restore(self, state: dict[str, np.ndarray], count: int) -> None:
        """Go on from what `state` returned after `count` images."""
        name, features = self.network.name, state[f"{self.network.name}/features"]
        self.statistics = Statistics(count, state[f"{name}/mu"], state[f"{name}/scatter"])
        self._features[: len(features)], self._filled = features, len(features)

    def reference(self, labels: np.ndarray, count: int, manifest_digest: str) -> Reference:
        """Return what was seen of `count` images as a reference; `labels` are of the features kept.

        A network that was shown none gets empty statistics, for others to take their place.
        """
        nothing = self.statistics.count == 0
        return Reference(
            name=self.network.name,
            sha256=self.network.sha256,
            manifest_digest=manifest_digest,
            count=count,
            mu=self.statistics.mu,
            sigma=self.statistics.scatter if nothing else self.statistics.sigma,
            features=self.features,
            labels=labels,
            within_class_variance=math.nan if nothing else within_class_variance(self.features, labels),
        )


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
def _reconstructed(params: Params, vae: Any, images: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Return images (B, C, H, W) uint8 as the autoencoder gives them back, through a sample of the posterior."""
    mean, std = encode_moments(vae, _rows(images, rows).to(device), params.encode.precision)
    drawn = noise(params.seed, [int(row) for row in rows], params.latent_shape).to(device)
    latents = sample_latent(mean, std, drawn, vae.config.scaling_factor)
    return to_uint8(decode(vae, latents)).cpu()


def _draw(params: Params, vae: Any, images: np.ndarray, labels: np.ndarray, folder: Path, device: torch.device) -> None:
    """Write the first images of the first classes, and their reconstructions, one class a row."""
    columns = params.sample.per_class
    real, rebuilt = [], []
    for label in range(min(params.sample.classes, int(labels.max()) + 1)):
        rows = np.flatnonzero(labels == label)[:columns]
        blank = torch.full((columns - len(rows), *images.shape[1:]), 255, dtype=torch.uint8)  # a class of too few
        real.append(torch.cat([_rows(images, rows), blank]))
        rebuilt.append(torch.cat([_reconstructed(params, vae, images, rows, device), blank]))
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
