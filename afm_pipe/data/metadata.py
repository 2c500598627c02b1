"""Metadata of image files, which never decides whether an image is read: it is cut off before Pillow sees the bytes.

Pillow refuses a PNG for a text or a color profile of more than a megabyte, and a file for a damaged one. What shapes
pixels stays: in a PNG the critical chunks, transparency (tRNS) and the marks of an animation; in a JPEG the segments
from which a decoder tells its color space (JFIF, Adobe).
"""

import struct
import zlib
from collections.abc import Iterator

PNG, JPEG, RIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF"
SHAPES_PIXELS = {b"tRNS", b"acTL", b"fcTL", b"fdAT"}
EXIF = b"Exif\0\0"
ORIENTATION = 0x0112  # an EXIF tag
INTEGERS = {1: "B", 3: "H", 4: "I"}  # EXIF's types of whole numbers

Part = tuple[bytes, int, int]  # type, start and end of a chunk or segment, its header and checksum included


def without_metadata(data: bytes) -> bytes:
    """Return an image file without metadata; a file of another format or with damaged structure keeps the rest."""
    if data.startswith(PNG):
        start, parts, keeps = len(PNG), _png_chunks(data), _shapes_png
    elif data.startswith(JPEG):
        start, parts, keeps = 2, _jpeg_segments(data), _shapes_jpeg
    else:
        return data
    kept = [data[:start]]
    for part in parts:
        kept += [data[part[1] : part[2]]] if keeps(data, part) else []
        start = part[2]
    return b"".join([*kept, data[start:]])


def read_orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1 (upright) where there is none or it is damaged."""
    exif = _exif(data).removeprefix(EXIF)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, at)
            if tag == ORIENTATION and kind in INTEGERS:
                (value,) = struct.unpack_from(order + INTEGERS[kind], exif, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _exif(data: bytes) -> bytes:
    if data.startswith(PNG):
        chunks = ((start + 4, end - 4) for kind, start, end in _png_chunks(data) if kind == b"eXIf")
        sound = (data[a + 4 : b] for a, b in chunks if zlib.crc32(data[a:b]) == int.from_bytes(data[b : b + 4]))
        return next(sound, b"")
    if data.startswith(JPEG):
        blocks = (data[start + 4 : end] for kind, start, end in _jpeg_segments(data) if kind == b"\xe1")
        return b"".join(block.removeprefix(EXIF) for block in blocks if block.startswith(EXIF))  # may be several
    blocks = (data[start + 8 : end] for kind, start, end in _riff_chunks(data) if kind == b"EXIF")
    return next(blocks, b"")


def _shapes_png(data: bytes, part: Part) -> bool:
    ancillary = part[0].isalpha() and part[0][:1].islower()
    return not ancillary or part[0] in SHAPES_PIXELS


def _shapes_jpeg(data: bytes, part: Part) -> bool:
    marker, start, end = part
    content = data[start + 4 : end]
    if marker == b"\xe0":
        return content.startswith(b"JFIF\0") and len(content) >= 14
    if marker == b"\xee":
        return content.startswith(b"Adobe") and len(content) >= 12
    return not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe")  # the other APP segments, and comments


def _png_chunks(data: bytes) -> Iterator[Part]:
    """Yield the complete chunks up to IEND."""
    at, kind = len(PNG), b""
    while at + 12 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            return
        yield kind, at, end
        at = end


def _jpeg_segments(data: bytes) -> Iterator[Part]:
    """Yield the segments before the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1 : at + 2], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == b"\xff":  # a byte that only fills
            at += 1
            continue
        if marker < b"\xc0" or b"\xd0" <= marker <= b"\xda" or not at + 4 <= end <= len(data):
            return  # without a length, start of a scan, or damaged
        yield marker, at, end
        at = end


def _riff_chunks(data: bytes) -> Iterator[Part]:
    at = 12
    while data.startswith(RIFF) and at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        yield kind, at, at + 8 + length
        at += 8 + length + length % 2
