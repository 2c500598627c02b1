"""The manifest: which images there are, of which class, with which bytes; and reading exactly those images.

Raw images are no DVC dependency (a million files make a no-op slow), the manifest is: whoever reads an image through
it gets the bytes that `prepare` saw, or an error.

Legend: N images, B images of a batch, C channels, S side.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afm_pipe.data.images import class_root, decode_image, list_images, read_image_file
from afm_pipe.data.sources import BUILT_IN, materialize
from afm_pipe.data.tars import Span, index_tar, read_span
from afm_pipe.params import Data
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_json
from afm_pipe.runtime.progress import Progress

FORMAT_VERSION = 1
READ_AHEAD = 4  # batches
FILES_PER_TICK = 256


@dataclass(frozen=True, eq=False)
class Manifest:
    """The images of a data set in their order: `paths` are relative to `root`, `digest` is one sha256 over all.

    `root` is a folder, or a tar archive that holds the images at `spans`; the digest is the same for both.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,)
    sha256: tuple[str, ...]
    digest: str
    spans: tuple[Span, ...] | None = None

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.paths)


def build_manifest(data: Data) -> Generator[Progress, None, Manifest]:
    """List, count, hash and fully decode every image under data.root; return their manifest.

    Raises UserError on a folder or archive that is no data set (see `list_images`, `index_tar`), on fewer than
    data.min_images, and once, after all files were read, on damaged ones: their number and the first ten.
    """
    spans = None
    if data.source == "tar":
        root = Path(data.root)
        classes, images, spans = yield from index_tar(root)
    else:
        root = class_root(Path(data.root))
        classes, images = list_images(root)
    paths = [path for path, _ in images]
    if len(images) < data.min_images:
        raise UserError(
            f"Found {len(images)} images under {root}, expected at least {data.min_images} (data.min_images): "
            "check data.root."
        )

    hashes: list[str] = []
    mistakes: list[str] = []
    with _reader(root, paths, spans) as read, _pool() as pool:

        def inspect(index: int) -> tuple[str, str | None]:
            path = root / paths[index]
            try:
                content = read(index)
                decode_image(content, str(path), data.image_size, data.channels)
            except UserError as error:
                return "", str(error)
            except OSError as error:
                return "", f"Found {path} unreadable ({error.strerror}): restore it, or remove it."
            return hashlib.sha256(content).hexdigest(), None

        for start in range(0, len(images), FILES_PER_TICK):
            for digest, mistake in pool.map(inspect, range(start, min(start + FILES_PER_TICK, len(images)))):
                hashes.append(digest)
                mistakes += [mistake] if mistake else []
            yield Progress(len(hashes), len(images), "images", f"{len(mistakes)} damaged" if mistakes else "")
    if mistakes:
        more = f"\n  and {len(mistakes) - 10} more" if len(mistakes) > 10 else ""
        raise UserError(
            f"Found {len(mistakes)} of {len(images)} images under {root} unusable, expected none:\n  "
            + "\n  ".join(mistakes[:10])
            + more
        )
    labels = [label for _, label in images]
    digest = _digest(classes, paths, labels, hashes)
    places = None if spans is None else tuple(spans)
    return Manifest(root, tuple(classes), tuple(paths), np.array(labels, np.int64), tuple(hashes), digest, places)


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
    if manifest.spans is not None:
        columns["spans"] = manifest.spans
    lines = (f"{json.dumps(name)}: {json.dumps(column)}" for name, column in columns.items())
    with atomic_path(path) as aside:
        aside.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises UserError when it is absent, of another version, or was edited."""
    raw = read_json(path)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"Found {path} of format {version}, expected {FORMAT_VERSION}: run `dvc repro prepare` again.")
    try:
        columns = raw["classes"], raw["paths"], raw["labels"], raw["sha256"]
        root = Path(raw["root"])
        spans = tuple(Span(int(offset), int(size)) for offset, size in raw["spans"]) if "spans" in raw else None
        whole = _is_sound(*columns, spans) and _digest(*columns) == raw["digest"]
    except (KeyError, TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"Found {path} edited or damaged, expected it as written: run `dvc repro prepare` again.")
    classes, paths, labels, hashes = columns
    return Manifest(root, tuple(classes), tuple(paths), np.array(labels, np.int64), tuple(hashes), raw["digest"], spans)


def _is_sound(classes: Any, paths: Any, labels: Any, hashes: Any, spans: tuple[Span, ...] | None) -> bool:
    """Tell whether the columns fit each other and no path leads out of its class's folder."""
    if not all(isinstance(column, list) and column for column in (classes, paths, labels, hashes)):
        return False
    if not len(paths) == len(labels) == len(hashes) or (spans is not None and len(spans) != len(paths)):
        return False
    if not all(
        isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"} for name in classes
    ):
        return False
    for path, label in zip(paths, labels, strict=True):
        if type(label) is not int or not 0 <= label < len(classes):
            return False
        folder, _, file = path.partition("/")
        if folder != classes[label] or file in ("", ".", "..") or set(file) & {"/", "\0"}:
            return False
    return spans is None or all(offset >= 0 and size >= 0 for offset, size in spans)


def require_images(manifest: Manifest, data: Data) -> Generator[Progress, None, None]:
    """See to it that the raw images are there: a built-in data set that is gone is written again.

    Raises UserError naming the first missing file and what to do.
    """
    _require_root(manifest, data)
    missing = _missing(manifest)
    if missing and data.source in BUILT_IN and len(missing) == manifest.num_images:
        yield from materialize(data.source, manifest.root)
        missing = _missing(manifest)
    if missing:
        raise UserError(
            f"Found {len(missing)} of {manifest.num_images} images missing under {manifest.root}, the first "
            f"{missing[0]}: put them back, or run `dvc repro -f prepare` to take the images as they are now."
        )


def read_images(manifest: Manifest, data: Data, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Read the images at `indices`, cropped: (B, C, S, S) uint8. Raises UserError when a file is gone or changed."""
    with closing(image_batches(manifest, data, [indices])) as batches:
        return next(batches)


def image_batches(
    manifest: Manifest, data: Data, batches: Iterable[Sequence[int]]
) -> Generator[NDArray[np.uint8], None, None]:
    """Yield each batch of indices as (B, C, S, S) uint8, a few batches read ahead in threads (Pillow frees the GIL).

    Raises UserError when a file is gone, or has other bytes than `prepare` saw.
    """

    def load(read: Callable[[int], bytes], index: int) -> NDArray[np.uint8]:
        path = manifest.root / manifest.paths[index]
        try:
            content = read(index)
        except OSError as error:
            raise UserError(f"Found {path} unreadable ({error.strerror}): put it back.") from None
        if hashlib.sha256(content).hexdigest() != manifest.sha256[index]:
            raise UserError(
                f"Found {path} changed since the manifest was written: put it back, or run `dvc repro -f prepare`."
            )
        return decode_image(content, str(path), data.image_size, data.channels)

    def load_some(read: Callable[[int], bytes], some: Sequence[int]) -> list[NDArray[np.uint8]]:
        return [load(read, index) for index in some]

    with _reader(manifest.root, manifest.paths, manifest.spans) as read:
        pool = _pool()
        try:
            ahead: deque[Iterator[list[NDArray[np.uint8]]]] = deque()
            for batch in batches:
                # A task for each thread and not for each image: of small images the tasks would cost more than they do.
                share = -(-len(batch) // _threads())
                parts = [batch[start : start + share] for start in range(0, len(batch), share)]
                ahead.append(pool.map(partial(load_some, read), parts))  # starts at once
                if len(ahead) > READ_AHEAD:
                    yield np.stack(list(chain.from_iterable(ahead.popleft())))  # (B, C, S, S)
            while ahead:
                yield np.stack(list(chain.from_iterable(ahead.popleft())))
        finally:
            pool.shutdown(cancel_futures=True)  # before the archive is closed


def load_images(manifest: Manifest, data: Data) -> Generator[Progress, None, NDArray[np.uint8]]:
    """Read all images into memory, cropped: (N, C, S, S) uint8. For data sets that fit; see `image_batches`."""
    yield from require_images(manifest, data)
    total = manifest.num_images
    images = np.empty((total, data.channels, data.image_size, data.image_size), np.uint8)
    batches = [range(start, min(start + FILES_PER_TICK, total)) for start in range(0, total, FILES_PER_TICK)]
    for indices, batch in zip(batches, image_batches(manifest, data, batches), strict=True):
        images[indices.start : indices.stop] = batch
        yield Progress(indices.stop, total, "images")
    return images


class UnreadImages:
    """The images of a manifest, indexed like an array (N, C, S, S) uint8 but read when asked for.

    For data sets that do not fit into memory. Raises UserError as `image_batches` does.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, manifest: Manifest, data: Data) -> None:
        self.manifest, self.data = manifest, data
        self.shape = (manifest.num_images, data.channels, data.image_size, data.image_size)

    @property
    def nbytes(self) -> int:
        """The size of the array."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        return read_images(self.manifest, self.data, rows)  # (B, C, S, S)


@contextmanager
def _reader(root: Path, paths: Sequence[str], spans: Sequence[Span] | None) -> Iterator[Callable[[int], bytes]]:
    """Yield a function from an image's index to its bytes, for any thread; it raises OSError."""
    if spans is None:
        yield lambda index: read_image_file(root / paths[index])
        return
    try:
        archive = root.open("rb")
    except OSError as error:
        raise UserError(f"Found {root} unreadable ({error.strerror}): put it back.") from None
    with archive:
        yield lambda index: read_span(archive.fileno(), spans[index])


def _require_root(manifest: Manifest, data: Data) -> None:
    """Raise UserError for a manifest of other images than params name: what it lists is read, wherever that is."""
    root = Path(data.root)
    if manifest.root not in (root, root / "train"):
        raise UserError(
            f"Found a manifest of images under {manifest.root}, expected those under {root} (data.root): run "
            "`dvc repro prepare`."
        )


def _missing(manifest: Manifest) -> list[str]:
    if manifest.spans is not None:
        end = manifest.root.stat().st_size if manifest.root.is_file() else 0
        return [path for path, span in zip(manifest.paths, manifest.spans, strict=True) if sum(span) > end]
    there: set[str] = set()
    for name in manifest.classes:
        folder = manifest.root / name
        if folder.is_dir():
            there.update(f"{name}/{file}" for file in os.listdir(folder))
    return [path for path in manifest.paths if path not in there]


def _digest(classes: list[str], paths: list[str], labels: list[int], hashes: list[str]) -> str:
    """Hash the columns. File names that are not UTF-8 keep their bytes."""
    lines = [f"{path}\0{label}\0{sha256}" for path, label, sha256 in zip(paths, labels, hashes, strict=True)]
    return hashlib.sha256(os.fsencode("\n".join(["\0".join(classes), *lines]))).hexdigest()


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads())


def _threads() -> int:
    """Return how many threads decode: one for each core that this process may use, shared with its fellow ranks."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )  # macOS has none
    return max(allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
