"""Metadata never decides whether an image is read; transparency is composited alike; EXIF orientation is a param."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from afm_pipe.data.images import decode_image
from afm_pipe.data.manifest import read_manifest, write_manifest
from afm_pipe.data.metadata import read_orientation
from afm_pipe.data.reading import build_manifest, require_images
from afm_pipe.params import Data
from afm_pipe.params.file import load_params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.conftest import SMOKE

SAMPLES = Path(matplotlib.get_data_path()) / "sample_data"
CHINA = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"  # with a color profile in APP2
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
HUGE = 3 << 20  # bytes: more than Pillow reads of a text (1 << 20)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes, flip: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ flip)


def with_chunk(data: bytes, added: bytes) -> bytes:
    return data[:33] + added + data[33:]  # after IHDR


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def tiff(order: str, value: int, kind: int = 3) -> bytes:
    """An EXIF block of one tag: the orientation, as a SHORT (3) or a LONG (4)."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    number = struct.pack(order + {3: "HH", 4: "I"}[kind], *[value, 0][: 5 - kind])
    return mark + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + number + bytes(4)


TEXT = zlib.compress(bytes(HUGE))
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
METADATA = {
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * HUGE),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + TEXT),
    "iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + TEXT),
    "sixty of them": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20))) * 80,
    "iCCP": chunk(b"iCCP", b"ICC\0\0" + zlib.compress(PROFILE + bytes(HUGE))),
    "wrong checksum": chunk(b"tEXt", b"Comment\0x", flip=1),
    "cut pHYs": chunk(b"pHYs", b"\0"),
    "EXIF": chunk(b"eXIf", b"II*\0" + b"\xff" * HUGE),
}


@pytest.mark.parametrize("kind", METADATA)
def test_no_metadata_of_a_png_decides(kind: str) -> None:
    png = encoded(PHOTO)
    found = decode_image(with_chunk(png, METADATA[kind]), "x.png", 32, 3)
    np.testing.assert_array_equal(found, decode_image(png, "x.png", 32, 3))


@pytest.mark.parametrize(
    "added",
    [
        segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
        segment(0xE0, b"JFIF\0"),
        segment(0xEE, b"Adobe"),
        segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\0"),
        segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65000)) * 100,
        segment(0xFE, bytes(65000)) * 100,
    ],
    ids=["photoshop", "JFIF", "Adobe", "EXIF entries", "EXIF offset", "MPF", "ICC", "comments"],
)
@pytest.mark.filterwarnings("error")
def test_no_metadata_of_a_jpeg_decides(added: bytes) -> None:
    jpeg = encoded(PHOTO, "JPEG")
    for orientation in ("ignore", "apply"):
        found = decode_image(jpeg[:2] + added + jpeg[2:], "x.jpg", 32, 3, orientation)
        np.testing.assert_array_equal(found, decode_image(jpeg, "x.jpg", 32, 3))


def test_real_files_with_more_metadata_are_read_as_before() -> None:
    info = PngInfo()
    info.add_text("prompt", "x" * HUGE, zip=True)
    for path in (CHINA, SAMPLES / "grace_hopper.jpg", SAMPLES / "Minduka_Present_Blue_Pack.png"):
        with Image.open(path) as image:
            profile = PROFILE + bytes(HUGE)
            data = encoded(image, "PNG", pnginfo=info, icc_profile=profile)
        found = decode_image(data, path.name, 64, 3)
        np.testing.assert_array_equal(found, decode_image(path.read_bytes(), path.name, 64, 3))


LARGE = {
    "ICC": {"icc_profile": PROFILE + bytes(HUGE)},
    "XMP": {"xmp": b"<x:xmpmeta/>" + bytes(HUGE)},
    "EXIF": {"exif": b"Exif\0\0II*\0" + b"\xff" * HUGE},
}


@pytest.mark.parametrize("kind", LARGE)
def test_no_metadata_of_a_webp_decides(kind: str) -> None:
    plain, large = (encoded(PHOTO, "WEBP", lossless=True, **options) for options in ({}, LARGE[kind]))
    assert len(large) > len(plain) + HUGE
    np.testing.assert_array_equal(decode_image(large, "x.webp", 32, 3), decode_image(plain, "x.webp", 32, 3))


@pytest.mark.parametrize("mode", ["CMYK", "YCCK", "L", "RGB"])
def test_a_profile_of_megabytes_changes_no_color_of_a_real_photograph(mode: str) -> None:
    with Image.open(CHINA) as image:
        photograph = image.convert("CMYK" if mode == "YCCK" else mode)
    data = encoded(photograph, "JPEG", icc_profile=PROFILE + bytes(HUGE), comment=bytes(60000))
    if mode == "YCCK":  # Adobe's segment says so
        transform = data.index(b"Adobe") + 11
        data = data[:transform] + b"\2" + data[transform + 1 :]
    with Image.open(io.BytesIO(data)) as image:
        expected = encoded(image.convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, "x.jpg", 64, 3), decode_image(expected, "x.png", 64, 3))


def test_a_phones_photograph_with_a_second_picture_and_a_video_in_its_file_is_the_first() -> None:
    with Image.open(CHINA) as image:
        first = encoded(image, "JPEG")
        several = encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)])
    for data in (several, first + b"\0\0\0\x18ftypmp42" + bytes(HUGE)):
        np.testing.assert_array_equal(decode_image(data, "x.jpg", 64, 3), decode_image(first, "x.jpg", 64, 3))


@pytest.mark.parametrize(("alpha", "value"), [(0, 20), (255, 20), (51, 208)])
def test_a_bmp_whose_alpha_was_never_written_shows_its_colors(alpha: int, value: int) -> None:
    pixels = bytes([20, 20, 20, alpha]) * 32 * 32
    info = struct.pack("<IiiHHIIiiII", 108, 32, 32, 1, 32, 3, len(pixels), 0, 0, 0, 0)  # BITMAPV4HEADER, with masks
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    head = struct.pack("<2sIHHI", b"BM", 122 + len(pixels), 0, 0, 122)
    assert (decode_image(head + info + masks + pixels, "x.bmp", 32, 3) == value).all()


def test_an_animation_and_damaged_transparency_are_still_refused() -> None:
    moving = encoded(PHOTO, save_all=True, append_images=[PHOTO.rotate(90)])
    with pytest.raises(UserError, match="animation"):
        decode_image(with_chunk(moving, METADATA["tEXt"]), "x.png", 32, 3)
    with pytest.raises(UserError, match="damaged"):
        decode_image(with_chunk(encoded(PHOTO), chunk(b"tRNS", b"\0")), "x.png", 32, 3)


GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG's color types


def png(color: int, depth: int, left: list[int], right: list[int], *chunks: bytes) -> bytes:
    """A PNG of 32 x 32 pixels whose halves have the samples `left` and `right`."""
    bits = "".join(format(sample, f"0{depth}b") for pixel in (left, right) for _ in range(16) for sample in pixel)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, depth, color, 0, 0, 0))
    parts = [head, *chunks, chunk(b"IDAT", zlib.compress(row * 32)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def clear(*samples: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))


COLORS = chunk(b"PLTE", bytes([10, 10, 10, 20, 20, 20]))
TRANSPARENT: dict[str, tuple[bytes, int]] = {  # the left half is clear; the value of the right half
    "gray 1": (png(GRAY, 1, [1], [0], clear(1)), 0),
    "gray 1 black": (png(GRAY, 1, [0], [1], clear(0)), 255),
    "gray 2": (png(GRAY, 2, [1], [2], clear(1)), 170),
    "gray 4": (png(GRAY, 4, [9], [3], clear(9)), 51),
    "gray 8": (png(GRAY, 8, [9], [3], clear(9)), 3),
    "gray 16": (png(GRAY, 16, [257], [258], clear(257)), 1),
    "RGB 8": (png(RGB, 8, [1, 2, 3], [1, 1, 1], clear(1, 2, 3)), 1),
    "RGB 16": (png(RGB, 16, [257, 258, 259], [257, 258, 260], clear(257, 258, 259)), 1),
    "palette 1 index": (png(PALETTE, 1, [1], [0], COLORS, chunk(b"tRNS", b"\xff\0")), 10),
    "palette 4 index": (png(PALETTE, 4, [0], [1], COLORS, chunk(b"tRNS", b"\0")), 20),
    "palette 8 bytes": (png(PALETTE, 8, [0], [1], COLORS, chunk(b"tRNS", b"\0\xfe")), 21),
    "gray alpha 8": (png(GRAY_ALPHA, 8, [9, 0], [3, 255]), 3),
    "gray alpha 16": (png(GRAY_ALPHA, 16, [9, 0], [771, 65535]), 3),
    "RGB alpha 8": (png(RGB_ALPHA, 8, [9, 9, 9, 0], [3, 3, 3, 255]), 3),
    "RGB alpha 16": (png(RGB_ALPHA, 16, [9, 9, 9, 0], [771, 771, 771, 65535]), 3),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_of_every_mode_and_depth_is_composited_on_white(kind: str, channels: int) -> None:
    data, value = TRANSPARENT[kind]
    found = decode_image(data, "x.png", 32, channels)
    assert (found[:, :, :16] == 255).all()
    assert (found[:, :, 16:] == value).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_applied_as_viewers_do_and_ignored_by_default(form: str, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    data = encoded(PHOTO, form, exif=exif, quality=90, lossless=True)
    with Image.open(io.BytesIO(data)) as image:
        upright = encoded(ImageOps.exif_transpose(image))
        stored = encoded(Image.fromarray(np.asarray(image)))
    assert read_orientation(data) == value
    for orientation, expected in (("apply", upright), ("ignore", stored)):
        found = decode_image(data, "x", 32, 3, orientation)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, decode_image(expected, "x", 32, 3))


@pytest.mark.parametrize(
    ("exif", "value"),
    [
        (tiff("<", 6), 6),
        (tiff(">", 6), 6),
        (tiff("<", 8, 4), 8),
        (tiff(">", 8, 4), 8),
        (tiff(">", 0), 1),
        (tiff(">", 9), 1),
        (tiff("<", 6)[:-8], 1),
        (b"", 1),
        (b"junk" * 9, 1),
    ],
)
def test_orientation_is_read_in_both_byte_orders_and_damage_means_upright(exif: bytes, value: int) -> None:
    jpeg, pixels = encoded(PHOTO, "JPEG"), encoded(PHOTO)
    assert read_orientation(jpeg[:2] + segment(0xE1, b"Exif\0\0" + exif) + jpeg[2:]) == value
    assert read_orientation(with_chunk(pixels, chunk(b"eXIf", exif))) == value
    assert read_orientation(with_chunk(pixels, chunk(b"eXIf", exif, flip=1))) == 1


def test_prepare_counts_oriented_images_and_a_manifest_says_whether_it_applies_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        PHOTO.save(tmp_path / name / "plain.png")
        PHOTO.save(tmp_path / name / "phone.jpg", exif=exif)
    own: dict[str, Any] = {"source": "folder", "root": str(tmp_path), "min_images": 1}
    ignored = load_params(SMOKE).data.model_copy(update=own)
    applied: Data = ignored.model_copy(update={"orientation": "apply"})
    made = {data.orientation: track("prepare", build_manifest(data)) for data in (ignored, applied)}
    said = "\n2 of them carry an EXIF orientation other than upright, {} (data.orientation)."
    assert made["ignore"].describe().endswith(said.format("ignored, as in ADM"))
    assert made["apply"].describe().endswith(said.format("applied"))
    assert made["ignore"].digest != made["apply"].digest
    for orientation, manifest in made.items():
        write_manifest(tmp_path / "manifest.json", manifest)
        assert ("orientation" in (tmp_path / "manifest.json").read_text()) == (orientation == "apply")
        read = read_manifest(tmp_path / "manifest.json")
        wrong = applied if orientation == "ignore" else ignored
        with pytest.raises(UserError, match=rf"orientation {orientation}, expected .* \(data\.orientation\)"):
            track("check", require_images(read, wrong))
