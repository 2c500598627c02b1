"""Folders of classes and the image files in them: listing, decoding whatever people have, the ADM centre crop.

Legend: C channels (1 grey, 3 RGB), S side of the square images.
"""

import errno
import io
from os import DirEntry, scandir
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from afm_pipe.runtime.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content: ImageNet has a PNG named .JPEG
MAX_PIXELS = 80_000_000  # below Pillow's own limit, whose first level only warns
MAX_BYTES = 1 << 29  # of an image file: more than so many pixels take uncompressed
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def list_images(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """List the class folders of `root` and their images, as (class names, [(path relative to root, label)]).

    Folders, then files, are in plain string order, as in torchvision's ImageFolder; hidden ones are passed over.
    Raises UserError on a missing or empty root, images beside the class folders, an empty class folder, a folder
    within a class folder, and files of unknown extension.
    """
    if not root.is_dir():
        raise UserError(f"Found no folder {root}, expected one folder of images per class in it: check data.root.")
    entries = _visible(root)
    classes = [entry.name for entry in entries if entry.is_dir()]
    stray = [entry.name for entry in entries if not entry.is_dir() and Path(entry.name).suffix.lower() in EXTENSIONS]
    if stray:
        raise UserError(
            f"Found {named(stray)} directly under {root}, expected images inside class folders only: "
            f"move them to {root}/CLASS/."
        )
    if not classes:
        raise UserError(f"Found no class folder under {root}, expected {root}/CLASS/IMAGE.png: check data.root.")

    images, empty, unknown = [], [], []
    for label, name in enumerate(classes):
        files = _visible(root / name)
        unknown += [f"{name}/{file.name}" for file in files if not _is_image_file(file)]
        images += [(f"{name}/{file.name}", label) for file in files if _is_image_file(file)]
        if not files:
            empty.append(name)
    if unknown:
        raise UserError(
            f"Found {named(unknown)} under {root}, expected only files ending in {', '.join(sorted(EXTENSIONS))}: "
            "move the rest away, or convert them."
        )
    if empty:
        raise UserError(
            f"Found no image in class folder {named(empty)} under {root}, expected at least one: fill or remove it."
        )
    return classes, images


def named(names: list[str]) -> str:
    """Name the first few of many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def class_root(root: Path) -> Path:
    """Return the folder of the class folders: root/train where that holds folders, as in ImageNet, else root."""
    train = root / "train"
    return train if train.is_dir() and any(entry.is_dir() for entry in _visible(train)) else root


def load_image(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """Read an image file as the training sees it: (C, S, S) uint8. Raises UserError naming the path."""
    try:
        data = read_image_file(path)
    except OSError as error:
        raise UserError(f"Found {path} unreadable ({error.strerror}): restore it, or remove it.") from None
    return decode_image(data, str(path), size, channels)


def read_image_file(path: Path) -> bytes:
    """Read the bytes of an image file, up to `MAX_BYTES`. Raises OSError, for a larger one too."""
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "a folder, a pipe or a device")
    if path.stat().st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_BYTES:,} bytes")
    return path.read_bytes()


def decode_image(data: bytes, name: str, size: int, channels: int) -> NDArray[np.uint8]:
    """Decode the bytes of one image file, convert and centre-crop it to (C, S, S) uint8; `name` is for errors.

    16-bit grey is scaled to 8 bits, transparency is laid on white, all else becomes grey or RGB as `channels` says.
    EXIF rotation is ignored, as in ADM. Raises UserError on truncated, foreign, animated and oversized files.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not image.width or not image.height:
                raise UserError(f"Found {name} of {image.width}x{image.height} pixels: replace or remove it.")
            if image.width * image.height > MAX_PIXELS:
                raise _oversized(name, f"{image.width}x{image.height}")
            if getattr(image, "n_frames", 1) > 1 and image.format in {"PNG", "WEBP"}:  # not a camera's MPO with preview
                raise UserError(f"Found an animation in {name}, expected a still image: keep one frame of it.")
            image.load()
            still = _converted(image, "L" if channels == 1 else "RGB")
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"Found {name}, which is not an image: expected {', '.join(FORMATS)}: replace or remove it."
        ) from None
    except BOMBS:
        raise _oversized(name, "an enormous image") from None
    except Exception as error:  # whatever Pillow's decoders make of damaged or hostile bytes
        raise UserError(f"Found {name} damaged ({error}), expected a whole image: replace or remove it.") from None
    width, height = still.size
    if size * size * max(width, height) > MAX_PIXELS * min(width, height):  # once its short side is scaled up to size
        raise _oversized(name, f"a strip of {width}x{height}")
    pixels = np.asarray(centre_crop(still, size))  # (S, S) or (S, S, 3)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))  # (C, S, S)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop to size x size as ADM does: halve by box filter while possible, bicubic to the size, cut the centre.

    An image that is size x size already comes back unchanged. Source: Dhariwal and Nichol 2021, as used by DiT and SiT.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).clip(0, 255).astype(np.uint8))  # 65535 / 255 = 257
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _oversized(name: str, found: str) -> UserError:
    return UserError(f"Found {found} in {name}, expected at most {MAX_PIXELS:,} pixels: scale it down, or remove it.")


def _visible(folder: Path) -> list[DirEntry[str]]:
    with scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_image_file(entry: DirEntry[str]) -> bool:
    return Path(entry.name).suffix.lower() in EXTENSIONS and entry.is_file()  # a pipe would be waited for
