"""Listing of a data set: one folder per class, each with image files.

Nothing vanishes. Every entry under the root, in a folder as in a tar archive, is one of three:

    an image that counts  CLASS/IMAGE, by its extension; links to files and to folders count as what they lead to
    passed over           by a name that CLUTTER lists; a text beside the class folders (BESIDE, DOCUMENTS); a split
                          beside train/ (SPLITS); `prepare` says how many, by name
    an error              everything else, named: dangling links, hidden class folders, archives, folders within a class
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from os import DirEntry, scandir
from pathlib import Path
from typing import NamedTuple

from afm_pipe.runtime.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CLUTTER = (  # what systems and tools leave behind; patterns in lower case
    *("__macosx", ".ds_store", "._*", ".localized", ".spotlight-v100", ".trashes", ".fseventsd"),  # macOS
    *(".temporaryitems", ".appledouble", "icon\r"),
    *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
    *("$recycle.bin", "system volume information"),
    *(".directory", ".trash", ".trash-*", ".thumbnails", "lost+found", ".nfs*"),  # Linux
    *("@eadir", "#recycle", "#snapshot", ".snapshot", ".snapshots"),  # network storage
    *(".git", ".gitignore", ".gitattributes", ".gitkeep", ".keep", ".dvc", ".dvcignore", ".cache", ".huggingface"),
    *(".ipynb_checkpoints", ".idea", ".vscode"),
)
DOCUMENTS = {"readme", "license", "licence", "copying", "citation", "authors", "notice", "changelog"}
BESIDE = {".md", ".rst", ".txt", ".csv", ".tsv", ".json", ".yaml", ".yml", ".xml", ".html", ".pdf"}
SPLITS = {"val", "valid", "validation", "test", "dev", "eval"}


class Listing(NamedTuple):
    """Classes and images in plain string order, as in torchvision's ImageFolder."""

    classes: list[str]
    images: list[tuple[str, int]]
    """(CLASS/IMAGE, label)."""
    passed_over: list[str] = []
    """Paths of entries that do not count."""


def list_images(root: Path) -> Listing:
    """List the class folders of `root` and their images, and what is passed over.

    `root` may hold the class folders or, as ImageNet's, a folder `train` of them (see `class_root`). Raises UserError
    on a missing or empty root, an empty class folder, and everything that is neither an image nor passed over.
    """
    if not root.is_dir():
        raise UserError(f"Found no folder {root}, expected one folder of images per class in it: check data.root.")
    passed_over: list[str] = []
    names: dict[str, list[str]] = {}
    strays: list[str] = []
    for entry in _entries(root):
        if is_clutter(entry.name):
            passed_over.append(entry.name)
        elif not _leads_to(entry, folder=True) or entry.name.startswith("."):
            known = is_beside(entry.name) and _leads_to(entry, folder=False)
            (passed_over if known else strays).append(entry.name)
        else:
            images = names.setdefault(entry.name, [])
            for inner in _entries(root / entry.name):
                path = f"{entry.name}/{inner.name}"
                if is_clutter(inner.name):
                    passed_over.append(path)
                elif is_image(inner.name) and _leads_to(inner, folder=False):
                    images.append(inner.name)
                else:
                    strays.append(path)
    return checked_listing(names, root, strays, passed_over)


def class_root(root: Path) -> Path:
    """Return the folder of the class folders: root/train where that holds folders, as in ImageNet, else root."""
    train = root / "train"
    if not train.is_dir():
        return root
    inside = any(_leads_to(entry, folder=True) and not is_clutter(entry.name) for entry in _entries(train))
    return train if inside else root


def beside_train(root: Path) -> list[str]:
    """Return what lies beside root/train and is passed over. Raises UserError on anything but splits and texts."""
    entries = [entry for entry in _entries(root) if entry.name != "train"]
    folders = {entry.name for entry in entries if not _leads_to(entry, folder=False)}
    names = [entry.name for entry in entries]
    strays = [
        name
        for name in names
        if not (is_clutter(name) or name.lower() in SPLITS if name in folders else is_clutter(name) or is_beside(name))
    ]
    if strays:
        raise UserError(
            f"Found {first_of(strays)} beside {root / 'train'}, expected the class folders in train and at most "
            f"{', '.join(sorted(SPLITS))} beside it: move the rest away, or name the classes' folder in data.root."
        )
    return names


def checked_listing(
    names: Mapping[str, Sequence[str]], root: Path, strays: Sequence[str] = (), passed_over: Iterable[str] = ()
) -> Listing:
    """Return the listing of image names by class; `strays` are paths that neither count nor are passed over.

    Raises UserError where there is no class, a class is empty, or there are strays.
    """
    more = f"; {first_of(strays)} is neither an image in a class folder nor passed over" if strays else ""
    if not names:
        raise UserError(f"Found no class under {root}, expected {root}/CLASS/IMAGE: check data.root{more}.")
    classes = sorted(names)
    inside = {path.partition("/")[0] for path in strays if not path.rpartition("/")[2].startswith(".")}
    empty = [name for name in classes if not names[name] and name not in inside]
    if empty:
        raise UserError(
            f"Found no image of class {first_of(empty)} under {root}, expected at least one: add images, or remove "
            f"it{more}."
        )
    if strays:
        raise UserError(_explained(sorted(strays), root))
    images = [(f"{name}/{image}", label) for label, name in enumerate(classes) for image in sorted(names[name])]
    return Listing(classes, images, sorted(passed_over))


def is_clutter(name: str) -> bool:
    """Tell whether a name is on the list of known clutter, in any case of letters."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in CLUTTER)


def is_beside(name: str) -> bool:
    """Tell whether a file beside the class folders is passed over: a text that describes the data."""
    return not name.startswith(".") and (Path(name).suffix.lower() in BESIDE or name.lower() in DOCUMENTS)


def is_image(name: str) -> bool:
    """Tell whether a file in a class folder counts, by its name."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


def count_by_name(passed_over: Iterable[str]) -> dict[str, int]:
    """Return how many paths there are of each last name, the most frequent first."""
    counts: dict[str, int] = {}
    for path in passed_over:
        name = path.rpartition("/")[2]
        name = "._*" if name.startswith("._") else name
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def first_of(names: Sequence[str]) -> str:
    """Return the first three names, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _explained(strays: list[str], root: Path) -> str:
    """Return what is wrong with entries that do not count: dangling links, images outside a class, other files."""
    dangling = [path for path in strays if os.path.islink(root / path) and not os.path.exists(root / path)]
    if dangling:
        return (
            f"Found {first_of(dangling)} under {root}, a link that leads nowhere: restore what it leads to, or "
            "remove it."
        )
    stray = [name for name in strays if "/" not in name and is_image(name)]
    if stray:
        return (
            f"Found {first_of(stray)} directly under {root}, expected images inside class folders only: move them to "
            f"{root}/CLASS/."
        )
    return (
        f"Found {first_of(strays)} under {root}, expected class folders with only files ending in "
        f"{', '.join(sorted(EXTENSIONS))}: move the rest away, or convert them."
    )


def _entries(folder: Path) -> list[DirEntry[str]]:
    with scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _leads_to(entry: DirEntry[str], folder: bool) -> bool:
    """Tell whether an entry is, or links to, a folder or a regular file; a link that leads nowhere is neither."""
    try:
        return entry.is_dir() if folder else entry.is_file()
    except OSError:  # a loop of links
        return False
