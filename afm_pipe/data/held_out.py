"""Real images held out of everything: training, latents, the reference, thumbnails and the feature classifier.

They are taken out of the manifest, which every later stage reads, and get a manifest of their own, which only the
reference reads, to say how far new real images are from its statistics.
"""

import hashlib
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np

from afm_pipe.data.classes import require_same_classes
from afm_pipe.data.manifest import Manifest, columns_digest, read_manifest, write_manifest
from afm_pipe.data.reading import build_manifest
from afm_pipe.params import Data, HeldOut
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, write_json
from afm_pipe.runtime.progress import Progress


def hold_out(
    manifest: Manifest, settings: HeldOut | None, data: Data
) -> Generator[Progress, None, tuple[Manifest, Manifest | None]]:
    """Return the images to train on and the held-out ones, of all images under data.root and of held_out.root.

    No image, by its bytes, is in both. Raises UserError for a class with no image left, for held-out images of other
    classes, and where none is left.
    """
    if settings is None:
        return manifest, None
    if settings.share is not None:
        held = _chosen(manifest, settings.share)
        return _subset(manifest, ~held, "train on"), _subset(manifest, held, "hold out")
    others = yield from build_manifest(settings.data(data))
    require_same_classes(others.classes, str(settings.root), manifest.classes, str(data.root))
    known = set(manifest.sha256)
    new = np.array([sha256 not in known for sha256 in others.sha256])
    return manifest, others if new.all() else _subset(others, new, "hold out")


def describe(held_out: Manifest) -> str:
    """Return one line on the held-out images."""
    classes = np.bincount(held_out.labels, minlength=len(held_out.classes))
    return (
        f"Held out: {held_out.num_images} real images under {held_out.root}, {classes.min()} to {classes.max()} of a "
        "class; nothing is trained on them."
    )


def write_held_out(path: Path, held_out: Manifest | None) -> None:
    """Write the manifest of the held-out images, or null."""
    if held_out is None:
        write_json(path, None)
    else:
        write_manifest(path, held_out)


def read_held_out(path: Path, settings: HeldOut | None) -> Manifest | None:
    """Read the manifest of the held-out images, if params hold any out. Raises UserError when it is missing."""
    if settings is None:
        return None
    if not path.is_file() or read_json(path) is None:
        raise UserError(f"Found no held-out images in {path}, expected those of held_out: run `dvc repro prepare`.")
    return read_manifest(path)


def _chosen(manifest: Manifest, share: float) -> np.ndarray:
    """Return which images are held out (N,) bool: `share` of each class, at least one of two or more.

    The choice rests on the bytes alone, not on names or order; all copies of a held-out image are held out.
    """
    ranks = np.array([hashlib.sha256(f"held out {sha256}".encode()).hexdigest() for sha256 in manifest.sha256])
    chosen: set[str] = set()
    for label in range(len(manifest.classes)):
        members = np.flatnonzero(manifest.labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        chosen.update(manifest.sha256[index] for index in members[np.argsort(ranks[members], kind="stable")[:count]])
    return np.array([sha256 in chosen for sha256 in manifest.sha256])


def _subset(manifest: Manifest, kept: np.ndarray, purpose: str) -> Manifest:
    """Return the manifest of the images `kept` (N,) bool. Raises UserError for a class without any."""
    rows = np.flatnonzero(kept)
    labels = manifest.labels[rows]
    empty = np.flatnonzero(np.bincount(labels, minlength=len(manifest.classes)) == 0)
    if len(empty) and (purpose == "train on" or len(empty) == len(manifest.classes)):
        raise UserError(
            f"Found no image of class {manifest.classes[empty[0]]!r} to {purpose} under {manifest.root}, expected at "
            "least one: add images, or set held_out to null."
        )
    paths, hashes = (tuple(column[row] for row in rows) for column in (manifest.paths, manifest.sha256))
    spans = None if manifest.spans is None else tuple(manifest.spans[row] for row in rows)
    digest = columns_digest(manifest.classes, paths, labels.tolist(), hashes, manifest.orientation)
    return replace(manifest, paths=paths, labels=labels, sha256=hashes, digest=digest, spans=spans)
