"""Pictures inside the page, made smaller where it would grow too large; and one sheet as a file."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFont

from afm_pipe.reporting.inputs import needed
from afm_pipe.runtime.errors import UserError

SIDES = (2048, 1536, 1024, 768, 512, 256)  # tried in turn for a picture that is too large


class Picture(NamedTuple):
    """A picture inside the page: a data URI, its size in pixels and its alternative text."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str
    source: str


class Source(NamedTuple):
    """A decoded picture with the bytes of its PNG."""

    path: Path
    image: Image.Image
    png: bytes


def read(path: Path, stage: str) -> Source:
    """Read a PNG. Raises UserError when the file is missing or damaged."""
    return Source(path, open_png(path, stage), path.read_bytes())


def inline(source: Source, alt: str, caption: str, max_bytes: int) -> Picture:
    """Put a picture into a data URI of about `max_bytes` at most: its PNG if that fits, else a smaller WebP."""
    image, data, kind = source.image.copy(), source.png, "png"
    for side in SIDES:
        if len(data) <= max_bytes:
            break
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=85)
        data, kind = buffer.getvalue(), "webp"
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, image.width, image.height, alt, caption, str(source.path))


def open_png(path: Path, stage: str) -> Image.Image:
    """Decode a PNG. Raises UserError naming its stage when the file is missing or damaged."""
    try:
        with Image.open(needed(path, stage), formats=["PNG"]) as image:
            return image.convert("RGB")
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"Found {path}, which is no whole PNG ({error}): run `dvc repro --force {stage}`.") from None


def draw_sheet(tiles: Sequence[tuple[str, Image.Image]], path: Path, columns: int = 4, side: int = 640) -> None:
    """Write titled pictures side by side into one PNG; each is at most `side` pixels wide and high."""
    gap, head = 16, 26
    images = [image.copy() for _, image in tiles]
    for image in images:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = max(image.width for image in images), max(image.height for image in images) + head
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for index, ((title, _), image) in enumerate(zip(tiles, images, strict=True)):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (height + gap)
        draw.text((x, y), title, fill="#1c2127", font=font)
        sheet.paste(image, (x, y + head))
    if all(map(_is_grey, images)):
        sheet = sheet.convert("L")  # a third of the bytes
    sheet.save(path, optimize=True)


def _is_grey(image: Image.Image) -> bool:
    red, *others = image.split()
    return all(ImageChops.difference(red, band).getbbox() is None for band in others)
