"""Read images inside a tar archive in place: the archive is indexed once and never unpacked.

Two layouts: the official tar of tars (ILSVRC2012_img_train.tar holds n01440764.tar, which holds that class's images),
and one archive of CLASS/IMAGE or train/CLASS/IMAGE. `listing` decides what is an image, skipped or an error.
"""

import errno
import io
import os
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from afm_pipe.data.images import MAX_BYTES
from afm_pipe.data.listing import Listing, is_clutter, list_tree
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress

BLOCK = 512
LARGEST_HEADER = 1 << 20  # bytes, of a long name or pax attributes


class Span(NamedTuple):
    """The place of a file's bytes in the archive."""

    offset: int
    size: int


def index_tar(path: Path) -> Generator[Progress, None, tuple[Listing, list[Span]]]:
    """List the images of an archive with their places, without reading them, and skipped entries.

    Raises UserError, naming the member, for links, devices, sparse files, absolute paths, paths with `..`, duplicates,
    files that are not images and empty folders, and for a compressed, damaged or truncated archive.
    """
    if not path.is_file():
        raise UserError(f"Found no file {path}, expected a tar archive: check data.root, or set data.source: folder.")
    tree: dict[str, Any] = {}
    with path.open("rb") as file:
        whole = Span(0, os.fstat(file.fileno()).st_size)
        for parts, span in _members(file.fileno(), whole, str(path)):
            yield Progress((span or whole).offset >> 20, (whole.size >> 20) + 1, "MiB", "indexed")
            if span is None or not parts[-1].endswith(".tar"):
                _insert(tree, parts, span, str(path))
                continue
            images = _folder(tree, [*parts[:-1], parts[-1].removesuffix(".tar")], str(path))
            where = f"{path}/{'/'.join(parts)}"
            for inner, inner_span in _members(file.fileno(), span, where):
                if len(inner) > 1 or (inner and inner_span is None and not is_clutter(inner[0])):
                    raise UserError(f"Found the folder {inner[0]} in {where}, expected images only: repack it.")
                _insert(images, inner, inner_span, where)
    listing = list_tree(tree, path, "CLASS/IMAGE, train/CLASS/IMAGE or CLASS.tar")
    classes = tree[listing.base] if listing.base else tree
    names = (image.partition("/") for image, _ in listing.images)
    return listing, [classes[name][image] for name, _, image in names]


def read_span(handle: int, span: Span) -> bytes:
    """Read the bytes of a file in an open archive, from any thread. Raises OSError if the archive is truncated."""
    if span.size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_BYTES:,} bytes")
    content = os.pread(handle, span.size, span.offset)
    if len(content) < span.size:
        raise OSError(0, "the archive ends within it")
    return content


class _Window(io.RawIOBase):
    """A span of an open file as a file, from which tarfile reads headers."""

    def __init__(self, handle: int, span: Span) -> None:
        self.handle, self.span, self.position = handle, span, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset
        return offset

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER or self.position < 0:
            raise tarfile.ReadError(f"a header of {size} bytes at {self.position}")
        size = max(min(size, self.span.size - self.position), 0)
        content = os.pread(self.handle, size, self.span.offset + self.position)
        self.position += len(content)
        return content


def _members(handle: int, span: Span, where: str) -> Iterator[tuple[list[str], Span | None]]:
    """Yield the path (in parts) and the span of each file of the archive at `span`; the span of a folder is None.

    Of clutter, only the topmost folder or file is yielded, as a folder.
    """
    try:
        tar = tarfile.open(fileobj=_Window(handle, span), mode="r:")  # noqa: SIM115  # it holds nothing open
        last = -1
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # a million of them fill the memory
            parts = _checked(member, where)
            at = Span(span.offset + member.offset_data, member.size)
            if not last < tar.offset <= span.size:
                raise UserError(f"Found {where} cut short within {member.name}: download it again.")
            last = tar.offset
            clutter = next((index for index, part in enumerate(parts) if is_clutter(part)), None)
            if clutter is not None:
                yield parts[: clutter + 1], None
            else:
                yield parts, at if member.isreg() else None
    except UserError:
        raise
    except Exception as error:  # tarfile raises almost anything for damaged or hostile bytes
        raise UserError(
            f"Found {where}, which is not a complete, uncompressed tar archive ({error}): download it again, "
            "or decompress it."
        ) from None
    # tarfile treats a damaged header, and a cut between two members, as the end of the archive.
    if os.pread(handle, BLOCK, span.offset + tar.offset) != bytes(BLOCK):
        raise UserError(f"Found {where} damaged or cut short after {tar.offset} bytes: download it again.")


def _checked(member: tarfile.TarInfo, where: str) -> list[str]:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts:
        raise UserError(f"Found the path {member.name!r} in {where}, expected one within the archive: repack it.")
    if not (member.isdir() or member.isreg()) or member.issparse():
        raise UserError(
            f"Found {member.name!r} in {where}, which is a link, a device or a sparse file; expected regular files: "
            "repack it with `tar --dereference`."
        )
    if member.size < 0 or (member.isreg() and not parts):
        raise UserError(f"Found {member.name!r} of {member.size} bytes in {where}, expected a file: download it again.")
    return parts


def _insert(tree: dict[str, Any], parts: list[str], span: Span | None, where: str) -> None:
    """Add a file, or a folder if `span` is None, to a tree (see `listing.Tree`)."""
    folder = _folder(tree, parts[:-1] if span else parts, where)
    if span and folder.setdefault(parts[-1], span) is not span:
        raise _twice(parts[-1], where)


def _folder(tree: dict[str, Any], parts: list[str], where: str) -> dict[str, Any]:
    for part in parts:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise _twice(part, where)
    return tree


def _twice(name: str, where: str) -> UserError:
    return UserError(f"Found {name} twice in {where}, expected it once: repack it.")
