"""Images inside a tar archive, read in place: the archive is indexed once and never unpacked.

Two layouts: the official tar of tars (ILSVRC2012_img_train.tar holds n01440764.tar, which holds that class's images),
and one archive of CLASS/IMAGE or train/CLASS/IMAGE. What counts and what is passed over is `listing`'s rule.
"""

import errno
import io
import os
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from afm_pipe.data.images import MAX_BYTES
from afm_pipe.data.listing import Listing, checked_listing, is_beside, is_clutter, is_image
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress

BLOCK = 512
LARGEST_HEADER = 1 << 20  # bytes; a long name, or pax attributes


class Span(NamedTuple):
    """Where the bytes of a file lie in the archive."""

    offset: int
    size: int


def index_tar(path: Path) -> Generator[Progress, None, tuple[Listing, list[Span]]]:
    """List the images of an archive without reading them: where each lies, and what is passed over.

    Raises UserError naming the member on links, devices, sparse files, absolute paths, paths with `..`, duplicate
    files, files that are not images and empty folders, and on a compressed, damaged or truncated archive.
    """
    if not path.is_file():
        raise UserError(f"Found no file {path}, expected a tar archive: check data.root, or set data.source: folder.")
    found: dict[str, dict[str, Span]] = {}
    passed_over: set[str] = set()
    folders: list[list[str]] = []
    filled: set[str] = set()
    with path.open("rb") as file:
        whole = Span(0, os.fstat(file.fileno()).st_size)
        for parts, span in _members(file.fileno(), whole, str(path), passed_over):
            if span is None:
                folders.append(parts)
                continue
            yield Progress(span.offset >> 20, (whole.size >> 20) + 1, "MiB", "indexed")
            filled.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
            inside = parts[1:] if parts[0] == "train" and len(parts) == 3 else parts
            if parts[-1].endswith(".tar"):
                images = found.setdefault(parts[-1].removesuffix(".tar"), {})
                where = f"{path}/{'/'.join(parts)}"
                for inner, inner_span in _members(file.fileno(), span, where, passed_over):
                    if inner_span is None and not inner:
                        continue  # the folder that was packed
                    if inner_span is None or len(inner) != 1:
                        raise UserError(f"Found the folder {inner[0]} in {where}, expected images only: repack it.")
                    _add(images, inner[0], inner_span, where)
            elif len(parts) == 1 and is_beside(parts[0]):
                passed_over.add(parts[0])
            elif len(inside) != 2:
                raise UserError(
                    f"Found {'/'.join(parts)} in {path}, expected CLASS/IMAGE, train/CLASS/IMAGE or CLASS.tar only: "
                    "pack the class folders and nothing else."
                )
            else:
                _add(found.setdefault(inside[0], {}), inside[1], span, str(path))
    for parts in folders:  # an empty one is a class without images
        if parts and "/".join(parts) not in filled:
            found.setdefault("/".join(parts[1:] if parts[0] == "train" and parts[1:] else parts), {})
    strays = [f"{name}/{image}" for name, images in found.items() for image in images if not is_image(image)]
    strays += [name for name in found if name.startswith(".")]
    names = {
        name: [image for image in images if is_image(image)]
        for name, images in found.items()
        if not name.startswith(".")
    }
    listing = checked_listing(names, path, strays, passed_over)
    return listing, [found[image.partition("/")[0]][image.partition("/")[2]] for image, _ in listing.images]


def read_span(handle: int, span: Span) -> bytes:
    """Read the bytes of a file in an open archive, from any thread. Raises OSError when the archive is cut short."""
    if span.size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_BYTES:,} bytes")
    content = os.pread(handle, span.size, span.offset)
    if len(content) < span.size:
        raise OSError(0, "the archive ends within it")
    return content


class _Window(io.RawIOBase):
    """A span of an open file as a file, for tarfile to read headers from."""

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


def _members(handle: int, span: Span, where: str, passed_over: set[str]) -> Iterator[tuple[list[str], Span | None]]:
    """Yield the path (in parts) and the span of each file of the archive at `span`; a folder has no span.

    Known clutter is added to `passed_over` instead.
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
                passed_over.add("/".join([where, *parts[: clutter + 1]]))
            else:
                yield parts, at if member.isreg() else None
    except UserError:
        raise
    except Exception as error:  # whatever tarfile raises for damaged or hostile bytes
        raise UserError(
            f"Found {where}, which is not a complete, uncompressed tar archive ({error}): download it again, "
            "or decompress it."
        ) from None
    # tarfile takes a damaged header, and a cut between two members, for the end.
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


def _add(images: dict[str, Span], name: str, span: Span, where: str) -> None:
    if name in images:
        raise UserError(f"Found {name} twice in {where}, expected it once: repack it.")
    images[name] = span
