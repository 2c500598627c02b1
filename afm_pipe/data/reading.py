"""Read the images of a manifest: files are checked against their hashes and decoded in threads.

Legend: N images, B images of a batch, C channels, S side.
"""

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from afm_pipe.data.images import decode_image, read_image_file
from afm_pipe.data.listing import count_by_name, list_images
from afm_pipe.data.manifest import Manifest, columns_digest
from afm_pipe.data.metadata import read_orientation
from afm_pipe.data.sources import BUILT_IN, materialize, require_clothing
from afm_pipe.data.tars import Span, index_tar, read_span
from afm_pipe.params import Data
from afm_pipe.runtime.environment import local_world_size
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.machine import usable_cores
from afm_pipe.runtime.paths import local
from afm_pipe.runtime.progress import Progress

READ_AHEAD = 4  # batches
FILES_PER_TICK = 256
COMPARED = 100  # images whose bytes `compare_images` reads


def build_manifest(data: Data) -> Generator[Progress, None, Manifest]:
    """List, hash and decode every image under data.root; return their manifest.

    Raises UserError for a folder or archive that is not a data set (see `list_images`, `index_tar`), for too few
    images, and, after all files are read, for damaged images: their number and the first ten.
    """
    given, spans = local(data.root), None
    if data.in_tar:
        root = given
        if data.source == "clothing":
            require_clothing(root)
        listing, spans = yield from index_tar(root)
    else:
        listing = list_images(given)
        root = given / listing.base
    classes, images = listing.classes, listing.images
    paths, labels = [path for path, _ in images], [label for _, label in images]
    if len(images) < data.min_images:
        raise UserError(
            f"Found {len(images)} images under {root}, expected at least {data.min_images} (data.min_images): "
            "check data.root, or lower data.min_images."
        )

    hashes: list[str] = []
    errors: list[str] = []
    oriented = 0
    with _reader(root, paths, spans) as read, _pool() as pool:

        def inspect(index: int) -> tuple[str, bool, str | None]:
            path = root / paths[index]
            try:
                content = read(index)
                decode_image(content, str(path), data.image_size, data.channels, data.orientation)
            except UserError as error:
                return "", False, str(error)
            except OSError as error:
                return "", False, f"Found {path} unreadable ({error.strerror}): restore it, or remove it."
            return hashlib.sha256(content).hexdigest(), read_orientation(content) != 1, None

        for batch in _ranges(len(images)):
            for digest, turned, error in pool.map(inspect, batch):
                hashes.append(digest)
                oriented += turned
                errors += [error] if error else []
            yield Progress(len(hashes), len(images), "images", f"{len(errors)} damaged" if errors else "")
    if errors:
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise UserError(
            f"Found {len(errors)} of {len(images)} images under {root} unusable, expected none:\n  "
            + "\n  ".join(errors[:10])
            + more
        )
    digest = columns_digest(classes, paths, labels, hashes, data.orientation)
    places = None if spans is None else tuple(spans)
    columns = tuple(classes), tuple(paths), np.array(labels, np.int64), tuple(hashes)
    named = Path(data.root) / root.relative_to(given)  # as in params, and so the same on every machine
    return Manifest(named, *columns, digest, places, count_by_name(listing.skipped), data.orientation, oriented)


def require_images(manifest: Manifest, data: Data) -> Generator[Progress, None, None]:
    """Check that the raw images exist; write a built-in data set again if it was deleted.

    Raises UserError naming the first missing file.
    """
    _require_params(manifest, data)
    missing = _missing(manifest)
    if missing and data.source in BUILT_IN and len(missing) == manifest.num_images:
        yield from materialize(data.source, manifest.folder)
        missing = _missing(manifest)
    _refuse_missing(manifest, missing)


def compare_images(manifest: Manifest, data: Data, held_out: Sequence[str] = ()) -> None:
    """Compare a manifest with params and the disk: all names, and the bytes of COMPARED images. Writes nothing.

    `held_out` are the paths of other images under the same root. Raises UserError if the source, root, orientation,
    number of images, a name or the content differs.
    """
    _require_params(manifest, data)
    found, expected = ("folder", "tar")[manifest.spans is not None], ("folder", "tar")[data.in_tar]
    if found != expected:
        raise UserError(
            f"Found a manifest of a {found}, expected of a {expected} (data.source): run `dvc repro prepare`."
        )
    total = manifest.num_images + len(held_out)
    if total < data.min_images:
        raise UserError(f"Found a manifest of {total} images, expected at least {data.min_images} (data.min_images).")
    missing = _missing(manifest)
    if len(missing) == manifest.num_images and data.source in BUILT_IN:
        return  # `require_images` writes them again
    _refuse_missing(manifest, missing)
    if manifest.spans is None:
        listed = {*manifest.paths, *held_out}
        added = [path for path, _ in list_images(manifest.folder).images if path not in listed]
        if added:
            raise UserError(
                f"Found {len(added)} more images under {manifest.root} than in the manifest, the first {added[0]}: "
                "remove them, or run `dvc repro -f prepare` to use the images as they are now."
            )
    step = max(manifest.num_images // COMPARED, 1)
    for _ in image_batches(manifest, data, [[index] for index in range(0, manifest.num_images, step)]):
        pass


def _require_params(manifest: Manifest, data: Data) -> None:
    root = Path(data.root)
    if manifest.root not in (root, root / "train"):
        raise UserError(
            f"Found a manifest of images under {manifest.root}, expected those under {root} (data.root): run "
            "`dvc repro prepare`."
        )
    if manifest.orientation != data.orientation:
        raise UserError(
            f"Found a manifest of images with the EXIF orientation {manifest.orientation}, expected "
            f"{data.orientation} (data.orientation): run `dvc repro prepare`."
        )


def _refuse_missing(manifest: Manifest, missing: Sequence[str]) -> None:
    if missing:
        raise UserError(
            f"Found {len(missing)} of {manifest.num_images} images missing under {manifest.root}, the first "
            f"{missing[0]}: put them back, or run `dvc repro -f prepare` to use the images as they are now."
        )


def image_batches(
    manifest: Manifest, data: Data, batches: Iterable[Sequence[int]]
) -> Generator[NDArray[np.uint8], None, None]:
    """Yield each batch of indices as (B, C, S, S) uint8, reading a few batches ahead in threads (Pillow frees the GIL).

    Raises UserError if a file is missing or has changed since `prepare`.
    """

    def load(read: Callable[[int], bytes], index: int) -> NDArray[np.uint8]:
        path = manifest.folder / manifest.paths[index]
        try:
            content = read(index)
        except OSError as error:
            raise UserError(f"Found {path} unreadable ({error.strerror}): put it back.") from None
        if hashlib.sha256(content).hexdigest() != manifest.sha256[index]:
            raise UserError(
                f"Found {path} changed since the manifest was written: put it back, or run `dvc repro -f prepare`."
            )
        return decode_image(content, str(path), data.image_size, data.channels, data.orientation)

    def load_part(read: Callable[[int], bytes], part: Sequence[int]) -> list[NDArray[np.uint8]]:
        return [load(read, index) for index in part]

    with _reader(manifest.folder, manifest.paths, manifest.spans) as read:
        pool = _pool()
        try:
            ahead: deque[Iterator[list[NDArray[np.uint8]]]] = deque()
            for batch in batches:
                # One task per thread, not per image: a task costs more than decoding a small image.
                size = -(-len(batch) // _num_threads())
                parts = [batch[start : start + size] for start in range(0, len(batch), size)]
                ahead.append(pool.map(partial(load_part, read), parts))  # starts at once
                if len(ahead) > READ_AHEAD:
                    yield np.stack(list(chain.from_iterable(ahead.popleft())))  # (B, C, S, S)
            while ahead:
                yield np.stack(list(chain.from_iterable(ahead.popleft())))
        finally:
            pool.shutdown(cancel_futures=True)  # before the archive is closed


def read_images(manifest: Manifest, data: Data, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Read the images at `indices`, cropped: (B, C, S, S) uint8. Raises UserError as `image_batches` does."""
    with closing(image_batches(manifest, data, [indices])) as batches:
        return next(batches)


def load_images(manifest: Manifest, data: Data) -> Generator[Progress, None, NDArray[np.uint8]]:
    """Read all images into memory, cropped: (N, C, S, S) uint8. Raises UserError as `image_batches` does."""
    yield from require_images(manifest, data)
    images = np.empty(LazyImages(manifest, data).shape, np.uint8)
    batches = _ranges(len(images))
    for indices, batch in zip(batches, image_batches(manifest, data, batches), strict=True):
        images[indices.start : indices.stop] = batch
        yield Progress(indices.stop, len(images), "images")
    return images


class LazyImages:
    """The images of a manifest as an array (N, C, S, S) uint8 whose rows are read on access.

    It serves data sets that do not fit into memory. Raises UserError as `image_batches` does.
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
    """Yield a function from the index of an image to its bytes, for any thread; it raises OSError."""
    if spans is None:
        yield lambda index: read_image_file(root / paths[index])
        return
    try:
        archive = root.open("rb")
    except PermissionError:
        raise
    except OSError as error:
        raise UserError(f"Found {root} unreadable ({error.strerror}): put it back.") from None
    with archive:
        yield lambda index: read_span(archive.fileno(), spans[index])


def _missing(manifest: Manifest) -> list[str]:
    if manifest.spans is not None:
        end = manifest.folder.stat().st_size if manifest.folder.is_file() else 0
        return [path for path, span in zip(manifest.paths, manifest.spans, strict=True) if sum(span) > end]
    existing: set[str] = set()
    for name in manifest.classes:
        folder = manifest.folder / name
        if folder.is_dir():
            existing.update(f"{name}/{file}" for file in os.listdir(folder))
    return [path for path in manifest.paths if path not in existing]


def _ranges(total: int) -> list[range]:
    return [range(start, min(start + FILES_PER_TICK, total)) for start in range(0, total, FILES_PER_TICK)]


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_num_threads())


def _num_threads() -> int:
    """Return the number of decoding threads: one per available core, divided by the processes on this machine."""
    return max(usable_cores() // local_world_size(), 1)
