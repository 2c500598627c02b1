"""Listing class folders, and decoding image files to square uint8 arrays."""

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afm_pipe.data.images import decode_image
from afm_pipe.data.listing import list_images
from afm_pipe.runtime.errors import UserError

RNG = np.random.default_rng(0)
SLOPE = np.add.outer(np.arange(60), np.arange(80))[..., None] * [1, 1.5, 0.7]
PHOTO = Image.fromarray((SLOPE + RNG.uniform(0, 20, (60, 80, 3))).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The center crop as published with ADM, reimplemented from its description."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (70, 64), (65, 200), (300, 131), (20, 25), (1, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_equals_the_published_one(shape: tuple[int, int], channels: int) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = adm_crop(image.convert("L" if channels == 1 else "RGB"), 32).reshape(32, 32, channels)
    found = decode_image(encoded(image), "image", 32, channels)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


def test_image_of_the_right_size_is_unchanged() -> None:
    pixels = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(pixels)), "image", 32, 1), pixels[None])


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    wide = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    found = decode_image(encoded(Image.fromarray(wide)), "image", 32, 1)
    np.testing.assert_array_equal(found[0], np.round(wide / 257))
    assert decode_image(encoded(Image.fromarray(wide)), "image", 32, 3).shape == (3, 32, 32)


def test_transparency_is_composited_on_white() -> None:
    clear = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    grey = Image.new("LA", (32, 32), (7, 255))
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (decode_image(encoded(clear), "image", 32, 3) == 255).all()
    assert (decode_image(encoded(half), "image", 32, 3) == 127).all()
    assert (decode_image(encoded(grey), "image", 32, 1) == 7).all()
    assert (decode_image(encoded(palette), "image", 32, 1) == 9).all()
    assert (decode_image(encoded(palette, transparency=1), "image", 32, 1) == 255).all()


def test_cmyk_one_bit_and_webp_are_converted() -> None:
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    found = decode_image(encoded(red.convert("CMYK"), "JPEG", quality=95), "image", 32, 3)
    assert found[0].min() > 240
    assert found[1:].max() < 15
    assert (decode_image(encoded(Image.new("1", (32, 32), 1)), "image", 32, 1) == 255).all()
    assert (decode_image(encoded(red, "WEBP", lossless=True), "image", 32, 3)[0] == 255).all()
    assert decode_image(encoded(red, "BMP"), "image", 32, 1).shape == (1, 32, 32)


def test_exif_rotation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    np.testing.assert_array_equal(
        decode_image(encoded(PHOTO, "JPEG", exif=exif), "image", 32, 3),
        decode_image(encoded(PHOTO, "JPEG"), "image", 32, 3),
    )


def test_content_decides_not_the_name() -> None:
    name = "n02105855_2933.JPEG"  # ImageNet's PNG of that name
    assert decode_image(encoded(PHOTO, "PNG"), name, 32, 3).shape == (3, 32, 32)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_truncated_file_is_refused_by_name(form: str) -> None:
    with pytest.raises(UserError, match=r"cut\.png"):
        decode_image(encoded(PHOTO, form)[:-900], "cut.png", 32, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_bytes_end_in_a_user_error_or_an_image(form: str) -> None:
    whole = encoded(PHOTO.resize((40, 30)), form)
    for _ in range(150):
        data = bytearray(whole)
        for position in RNG.integers(0, min(len(data), 400), 3):
            data[position] = RNG.integers(256)
        with suppress(UserError):
            assert decode_image(bytes(data[: RNG.integers(len(data))]), "x", 32, 3).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (encoded(PHOTO, "GIF"), "not an image"),
        (encoded(PHOTO, "TIFF"), "not an image"),
        (encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)]), "animation"),
        (encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]), "animation"),
        (encoded(Image.new("L", (1, 5000))), "strip"),
    ],
)
def test_what_is_no_still_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_image(data, "x.png", 256, 3)


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_decompression_bomb_is_refused_before_decoding(side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match="expected at most 80,000,000 pixels"):
        decode_image(data, "bomb.png", 32, 1)
    assert limit == Image.MAX_IMAGE_PIXELS


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_listing_is_sorted_and_names_what_it_passes_over(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "b/10.JPEG", "a/x.WebP", "a/.DS_Store", ".cache/y.png", "README.md")
    found = list_images(tmp_path)
    assert found[:2] == (["a", "b"], [("a/x.WebP", 0), ("b/10.JPEG", 1), ("b/2.png", 1)])
    assert found.skipped == [".cache", "README.md", "a/.DS_Store"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1.png", "stray.JPG"], r"Found stray\.JPG directly under"),
        (["a/1.png", "b/.hidden"], "Found no image of class b"),
        (["a/1.png", "a/notes.txt"], r"Found a/notes\.txt"),
        (["a/1.png", "a/deep/1.png"], "Found a/deep under"),
        ([".hidden/1.png"], "Found no class under"),
    ],
)
def test_folders_that_are_no_data_set_are_refused_by_name(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list_images(touch(tmp_path, *names))


def test_missing_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check data\.root"):
        list_images(tmp_path / "none")
