"""Pictures inside the page, scaled down if they are too large, and one sheet of pictures as a file."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFont

from afm_pipe.reporting.inputs import require_output
from afm_pipe.runtime.errors import UserError

SIDES = (2048, 1536, 1024, 768, 512, 256)  # tried in this order for a picture that is too large


class Picture(NamedTuple):
    """A picture inside the page: a data URI, its size in pixels and its alternative text."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str
    source: str


def inline(path: Path, stage: str, alt: str, caption: str, max_bytes: int, width: int | None = None) -> Picture:
    """Put a PNG, or its left `width` pixels, into a data URI of about `max_bytes` at most, if needed as a smaller WebP.

    Raises UserError naming the stage that writes the file if it is missing or damaged.
    """
    image = open_png(path, stage)
    data, kind = path.read_bytes(), "png"
    if width is not None and width < image.width:
        image = image.crop((0, 0, width, image.height))
        data = _encode(_without_color(image), "PNG", optimize=True)
    for side in SIDES:
        if len(data) <= max_bytes:
            break
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        data, kind = _encode(image, "WEBP", quality=85), "webp"
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, image.width, image.height, alt, caption, str(path))


def open_png(path: Path, stage: str) -> Image.Image:
    """Decode a PNG to RGB. Raises UserError naming its stage if the file is missing or damaged."""
    try:
        with Image.open(require_output(path, stage), formats=["PNG"]) as image:
            return image.convert("RGB")
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"Found {path}, which is no complete PNG ({error}): run `dvc repro --force {stage}`.") from None


def draw_sheet(tiles: Sequence[tuple[str, Image.Image]], path: Path, columns: int = 4, side: int = 640) -> None:
    """Write titled pictures side by side into one PNG; each is at most `side` pixels wide and high."""
    gap, head = 16, 26
    images = [image.copy() for _, image in tiles]
    for image in images:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    font = ImageFont.load_default(16)
    titled = max(math.ceil(font.getlength(title)) for title, _ in tiles)
    width, height = max(titled, *(image.width for image in images)), max(image.height for image in images) + head
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, ((title, _), image) in enumerate(zip(tiles, images, strict=True)):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (height + gap)
        draw.text((x, y), title, fill="#1c2127", font=font)
        sheet.paste(image, (x, y + head))
    if all(_without_color(image).mode == "L" for image in images):
        sheet = sheet.convert("L")
    sheet.save(path, optimize=True)


def _without_color(image: Image.Image) -> Image.Image:
    """Return an RGB image that is gray as one channel, a third of the bytes; others unchanged."""
    red, *others = image.split()
    return red if all(ImageChops.difference(red, band).getbbox() is None for band in others) else image


def _encode(image: Image.Image, kind: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
