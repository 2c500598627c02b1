"""The manifest lists every image with its class and the hash of its bytes.

The manifest is a DVC dependency; raw images are not, since a million files make even a no-op slow. Images are read
through it, so that a reader gets the bytes that `prepare` saw, or an error.

Legend: N images.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afm_pipe.data.tars import Span
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_json
from afm_pipe.runtime.paths import local

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Manifest:
    """The images of a data set, in order. `paths` are relative to `root`; `digest` is one sha256 over all columns.

    `root` is a folder, or a tar archive that holds the images at `spans`; both have the same digest. It is written as
    in params, possibly with `~`; `folder` is the path on this machine.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,)
    sha256: tuple[str, ...]
    digest: str
    spans: tuple[Span, ...] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of skipped entries by name (see `listing`); known to `prepare` only, and not written to the file."""
    orientation: str = "ignore"
    """Whether the EXIF orientation of the images is applied: part of the digest when it is."""
    oriented: int = 0
    """How many images have another EXIF orientation than upright; not in the file either."""

    @property
    def folder(self) -> Path:
        """`root` on this machine."""
        return local(self.root)

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.paths)

    def describe(self) -> str:
        """Return the totals: images, classes, skipped entries and rotated images."""
        classes = "1 class" if len(self.classes) == 1 else f"{len(self.classes)} classes"
        total = f"{self.num_images} images of {classes} under {self.root}"
        named = ", ".join(f"{count} {name!r}" for name, count in self.skipped.items())
        total += (f"; skipped {sum(self.skipped.values())}: {named}" if named else "") + "."
        if not self.oriented:
            return total
        done = {"ignore": "ignored, as in ADM", "apply": "applied"}[self.orientation]
        oriented = f"{self.oriented} of them carry an EXIF orientation other than upright"
        return f"{total}\n{oriented}, {done} (data.orientation)."


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as JSON, one line per column, atomically."""
    columns: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "root": str(manifest.root),
        "digest": manifest.digest,
        "classes": manifest.classes,
        "labels": manifest.labels.tolist(),
        "paths": manifest.paths,
        "sha256": manifest.sha256,
    }
    if manifest.orientation != "ignore":
        columns["orientation"] = manifest.orientation
    if manifest.spans is not None:
        columns["spans"] = manifest.spans
    lines = (f"{json.dumps(name)}: {json.dumps(column)}" for name, column in columns.items())
    with atomic_path(path) as temp:
        temp.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises UserError when it is missing, of another version, or edited."""
    raw = read_json(path)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"Found {path} of format {version}, expected {FORMAT_VERSION}: run `dvc repro prepare` again.")
    try:
        columns = raw["classes"], raw["paths"], raw["labels"], raw["sha256"]
        root = Path(raw["root"])
        spans = tuple(Span(int(offset), int(size)) for offset, size in raw["spans"]) if "spans" in raw else None
        orientation = raw.get("orientation", "ignore")
        intact = _is_sound(*columns, spans) and columns_digest(*columns, orientation) == raw["digest"]
        intact &= orientation in ("ignore", "apply")
    except (KeyError, TypeError, ValueError, OverflowError):
        intact = False
    if not intact:
        raise UserError(f"Found {path} edited or damaged, expected it as written: run `dvc repro prepare` again.")
    classes, paths, labels, hashes = columns
    arrays = tuple(classes), tuple(paths), np.array(labels, np.int64), tuple(hashes)
    return Manifest(root, *arrays, raw["digest"], spans, orientation=orientation)


def columns_digest(
    classes: Sequence[str],
    paths: Sequence[str],
    labels: Sequence[int],
    hashes: Sequence[str],
    orientation: str = "ignore",
) -> str:
    """Return one sha256 over the columns. File names that are not UTF-8 keep their bytes."""
    lines = [f"{path}\0{label}\0{sha256}" for path, label, sha256 in zip(paths, labels, hashes, strict=True)]
    lines += [] if orientation == "ignore" else [f"orientation\0{orientation}"]
    return hashlib.sha256(os.fsencode("\n".join(["\0".join(classes), *lines]))).hexdigest()


def _is_sound(classes: Any, paths: Any, labels: Any, hashes: Any, spans: tuple[Span, ...] | None) -> bool:
    """Return whether the columns are consistent and every path is CLASS/IMAGE."""
    if not all(isinstance(column, list) and column for column in (classes, paths, labels, hashes)):
        return False
    if not len(paths) == len(labels) == len(hashes) or (spans is not None and len(spans) != len(paths)):
        return False
    if not all(_is_name(name) for name in classes):
        return False
    for path, label in zip(paths, labels, strict=True):
        if type(label) is not int or not 0 <= label < len(classes):
            return False
        folder, _, file = path.partition("/")
        if folder != classes[label] or not _is_name(file):
            return False
    return spans is None or all(offset >= 0 and size >= 0 for offset, size in spans)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name
