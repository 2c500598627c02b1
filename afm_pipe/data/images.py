"""Convert image files to square uint8 arrays: decoding, color conversion, the ADM center crop.

Legend: C channels (1 gray, 3 RGB), S side of the square images.
"""

import errno
import io
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from afm_pipe.data.metadata import read_orientation, without_metadata
from afm_pipe.runtime.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # recognized by content: ImageNet has a PNG named .JPEG
MAX_PIXELS = 80_000_000  # below the size at which Pillow warns
MAX_BYTES = 1 << 29  # of an image file; MAX_PIXELS uncompressed take less
UPRIGHT = {  # EXIF orientation: the transpose that makes the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def read_image_file(path: Path) -> bytes:
    """Read the bytes of an image file. Raises OSError, also for more than `MAX_BYTES` and for special files."""
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "a folder, a pipe or a device")
    if path.stat().st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_BYTES:,} bytes")
    return path.read_bytes()


def decode_image(
    data: bytes, name: str, size: int, channels: int, orientation: Literal["ignore", "apply"] = "ignore"
) -> NDArray[np.uint8]:
    """Decode an image file, convert it and crop its center to (C, S, S) uint8; `name` appears in errors.

    16-bit gray is scaled to 8 bits, transparency is composited on white, and all modes become gray or RGB according to
    `channels`. EXIF orientation is ignored, as in ADM, or applied before the crop; other metadata is not read. Raises
    UserError for truncated, unknown, animated and oversized files.
    """
    turn = UPRIGHT.get(read_orientation(data)) if orientation == "apply" else None
    data = without_metadata(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not image.width or not image.height:
                raise UserError(f"Found {name} of {image.width}x{image.height} pixels: replace or remove it.")
            if image.width * image.height > MAX_PIXELS:
                raise _oversized(name, f"{image.width}x{image.height}")
            if getattr(image, "n_frames", 1) > 1:
                raise UserError(f"Found an animation in {name}, expected a still image: keep one frame of it.")
            image.load()
            still = _converted(image, data, "L" if channels == 1 else "RGB")
            still = still if turn is None else still.transpose(turn)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"Found {name}, which is not an image: expected {', '.join(FORMATS)}: replace or remove it."
        ) from None
    except BOMBS:
        raise _oversized(name, "an enormous image") from None
    except Exception as error:  # Pillow raises almost anything for damaged or hostile bytes
        raise UserError(f"Found {name} damaged ({error}), expected a complete image: replace or remove it.") from None
    width, height = still.size
    if size * size * max(width, height) > MAX_PIXELS * min(width, height):  # after its short side is scaled up to size
        raise _oversized(name, f"a strip of {width}x{height}")
    pixels = np.asarray(center_crop(still, size))  # (S, S) or (S, S, 3)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))  # (C, S, S)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop to size x size as ADM does: halve with a box filter, resize with a bicubic filter, cut out the center.

    An image of size x size is unchanged. Source: Dhariwal and Nichol 2021, as used by DiT and SiT.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _converted(image: Image.Image, data: bytes, mode: str) -> Image.Image:
    seen = _seen(image, data) if image.format == "PNG" and image.mode in ("1", "L", "I;16", "RGB") else None
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's conversion clips at 255
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).clip(0, 255).astype(np.uint8))  # 65535 / 255 = 257
    if seen is not None:
        image = image.convert("L" if image.mode == "1" else image.mode)
        image.putalpha(Image.fromarray(seen.astype(np.uint8) * 255))
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
        image = image.convert("RGB")  # Windows reserves these bytes and leaves them 0: viewers show the colors
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _seen(image: Image.Image, data: bytes) -> NDArray[np.bool_] | None:
    """Return the mask (H, W) of pixels that differ from the transparent color of a gray or RGB PNG, None without one.

    The color has the bit depth of the file, while Pillow compares it with pixels converted to 8 bits.
    """
    color = image.info.pop("transparency", None)
    if color is None:
        return None
    depth = data[24]
    top = (1 << depth) - 1
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image).astype(np.uint16)
    if depth < 8:
        pixels = pixels // (255 // top)
    elif depth == 16 and image.mode == "RGB":  # Pillow keeps the high bytes, and the low ones if read as little-endian
        with Image.open(io.BytesIO(data), formats=["PNG"]) as low:
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            pixels = pixels << 8 | np.asarray(low)
    return (pixels.reshape(image.height, image.width, -1) != np.atleast_1d(color) & top).any(-1)


def _oversized(name: str, found: str) -> UserError:
    return UserError(f"Found {found} in {name}, expected at most {MAX_PIXELS:,} pixels: scale it down, or remove it.")
