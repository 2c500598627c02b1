"""Listing of a data set: one folder per class, each with image files."""

from collections.abc import Mapping, Sequence
from os import DirEntry, scandir
from pathlib import Path
from typing import NamedTuple

from afm_pipe.runtime.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Listing(NamedTuple):
    """Classes and images in plain string order, as in torchvision's ImageFolder."""

    classes: list[str]
    images: list[tuple[str, int]]
    """(CLASS/IMAGE, label)."""


def list_images(root: Path) -> Listing:
    """List the class folders of `root` and their images; hidden files are ignored.

    Raises UserError on a missing or empty root, images beside the class folders, an empty class folder, a folder within
    a class folder, and files of unknown extension.
    """
    if not root.is_dir():
        raise UserError(f"Found no folder {root}, expected one folder of images per class in it: check data.root.")
    entries = _visible(root)
    stray = [entry.name for entry in entries if not entry.is_dir() and Path(entry.name).suffix.lower() in EXTENSIONS]
    if stray:
        raise UserError(
            f"Found {first_of(sorted(stray))} directly under {root}, expected images inside class folders only: "
            f"move them to {root}/CLASS/."
        )
    files = {entry.name: _visible(root / entry.name) for entry in entries if entry.is_dir()}
    special = [f"{name}/{file.name}" for name in files for file in files[name] if not file.is_file()]  # a pipe blocks
    return checked_listing({name: [file.name for file in files[name]] for name in files}, root, special)


def class_root(root: Path) -> Path:
    """Return the folder of the class folders: root/train where that holds folders, as in ImageNet, else root."""
    train = root / "train"
    return train if train.is_dir() and any(entry.is_dir() for entry in _visible(train)) else root


def checked_listing(names: Mapping[str, Sequence[str]], root: Path, special: Sequence[str] = ()) -> Listing:
    """Return the listing of image names by class. `special` are the paths that are not regular files.

    Raises UserError where there is no class, a class is empty, or a file is not an image by its name.
    """
    if not names:
        raise UserError(f"Found no class under {root}, expected {root}/CLASS/IMAGE: check data.root.")
    classes = sorted(names)
    images = [(f"{name}/{image}", label) for label, name in enumerate(classes) for image in sorted(names[name])]
    unknown = [path for path, _ in images if path in special or Path(path).suffix.lower() not in EXTENSIONS]
    if unknown:
        raise UserError(
            f"Found {first_of(unknown)} under {root}, expected only files ending in {', '.join(sorted(EXTENSIONS))}: "
            "move the rest away, or convert them."
        )
    empty = [name for name in classes if not names[name]]
    if empty:
        raise UserError(
            f"Found no image of class {first_of(empty)} under {root}, expected at least one: add images, or remove it."
        )
    return Listing(classes, images)


def first_of(names: Sequence[str]) -> str:
    """Return the first three names, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _visible(folder: Path) -> list[DirEntry[str]]:
    with scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
