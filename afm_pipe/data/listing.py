"""Listing of a data set: one folder per class, each with image files.

Nothing vanishes. Every entry under the root, in a folder as in a tar archive, is one of three:

    an image that counts  CLASS/IMAGE, by its extension; links to files and to folders count as what they lead to
    passed over           by a name that CLUTTER lists; a text beside the class folders (BESIDE, DOCUMENTS); a split
                          beside train/ (SPLITS); `prepare` says how many, by name. A dangling link never is
    an error              everything else, named: dangling links, hidden class folders, archives, folders within a class
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from os import DirEntry, scandir
from pathlib import Path
from typing import Any, NamedTuple

from afm_pipe.runtime.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CLUTTER = (  # what systems and tools leave behind; patterns in lower case
    *("__macosx", ".ds_store", "._*", ".localized", ".spotlight-v100", ".trashes", ".fseventsd"),  # macOS
    *(".temporaryitems", ".appledouble", "icon\r", ".documentrevisions-v100", ".volumeicon.icns"),
    *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
    *("$recycle.bin", "recycler", "system volume information", "picasa.ini", ".picasa.ini"),
    *(".directory", ".trash", ".trash-*", ".thumbnails", "lost+found", ".nfs*", ".fuse_hidden*", ".~lock.*"),  # Linux
    *(".nomedia", ".dropbox", ".dropbox.attr", ".dropbox.cache", ".stfolder", ".stversions", ".sync"),  # phones, sync
    *("@eadir", "#recycle", "#snapshot", ".snapshot", ".snapshots"),  # network storage
    *(".git", ".gitignore", ".gitattributes", ".gitkeep", ".keep", ".dvc", ".dvcignore", ".cache", ".huggingface"),
    *(".svn", ".hg"),
    *(".ipynb_checkpoints", ".idea", ".vscode"),
)
DOCUMENTS = {"readme", "license", "licence", "copying", "citation", "authors", "notice", "changelog"}
BESIDE = {".md", ".rst", ".txt", ".csv", ".tsv", ".json", ".yaml", ".yml", ".xml", ".html", ".pdf"}
SPLITS = {"val", "valid", "validation", "test", "dev", "eval"}


FILE, SPECIAL, DANGLING = "a file", "a pipe or a device", "a link that leads nowhere"
CLASS_FOLDERS = "class folders"

Tree = Mapping[str, Any]  # of a folder: its entries by name; a folder is again a Tree, a file anything else


class Listing(NamedTuple):
    """Classes and images in plain string order, as in torchvision's ImageFolder."""

    classes: list[str]
    images: list[tuple[str, int]]
    """(CLASS/IMAGE, label)."""
    passed_over: list[str] = []
    """Paths of entries that do not count."""
    base: str = ""
    """Folder of the class folders under the root: `train` as in ImageNet, or the root itself."""


def list_images(root: Path) -> Listing:
    """List the class folders of `root`, or of its folder `train`, and their images, and what is passed over.

    Raises UserError on a missing or empty root, an empty class folder, and everything that is neither an image nor
    passed over.
    """
    if not root.is_dir():
        raise UserError(f"Found no folder {root}, expected one folder of images per class in it: check data.root.")
    tree = _scan(root)
    if _holds_classes(tree.get("train"), lambda: _scan(root / "train")):
        return list_tree(tree | {"train": _scan_classes(root / "train")}, root)
    return list_tree(_scan_classes(root), root)


def list_tree(tree: Tree, root: Path, layout: str = CLASS_FOLDERS) -> Listing:
    """List the classes of a tree of entries, whether on disk or in an archive; `root` and `layout` are for errors.

    Raises UserError as `list_images` does.
    """
    passed_over: list[str] = []
    base = ""
    if _holds_classes(tree.get("train"), lambda: tree["train"]):
        passed_over = _beside_train(tree, root)
        base, tree, root = "train", tree["train"], root / "train"
    names: dict[str, list[str]] = {}
    strays: dict[str, Any] = {}
    for name, entry in tree.items():
        if _is_passed_over(name, entry) or (is_beside(name) and _is_file(entry)):
            passed_over.append(name)
        elif not isinstance(entry, Mapping) or name.startswith("."):
            strays[name] = entry
        else:
            images = names.setdefault(name, [])
            for inner, leaf in entry.items():
                path = f"{name}/{inner}"
                if _is_passed_over(inner, leaf):
                    passed_over.append(path)
                elif is_image(inner) and _is_file(leaf):
                    images.append(inner)
                else:
                    strays[path] = leaf
    _check(names, strays, root, layout)
    classes = sorted(names)
    listed = [(f"{name}/{image}", label) for label, name in enumerate(classes) for image in sorted(names[name])]
    return Listing(classes, listed, sorted(passed_over), base)


def _holds_classes(train: Any, entries: Callable[[], Tree]) -> bool:
    """Tell whether an entry `train` is the folder of the class folders, as in ImageNet, rather than a class."""
    return isinstance(train, Mapping) and any(
        isinstance(entry, Mapping) and not is_clutter(name) for name, entry in entries().items()
    )


def _beside_train(tree: Tree, root: Path) -> list[str]:
    """Return what lies beside root/train and is passed over. Raises UserError on anything but splits and texts."""
    others = {name: entry for name, entry in tree.items() if name != "train"}
    strays = {
        name: entry
        for name, entry in others.items()
        if not _is_passed_over(name, entry)
        and not (name.lower() in SPLITS if isinstance(entry, Mapping) else is_beside(name) and _is_file(entry))
    }
    _refuse_dangling(strays, root)
    if strays:
        raise UserError(
            f"Found {first_of(sorted(strays))} beside {root / 'train'}, expected the class folders in train and at "
            f"most {', '.join(sorted(SPLITS))} beside it: move the rest away, or name the classes' folder in data.root."
        )
    return list(others)


def _check(names: Mapping[str, Sequence[str]], strays: Tree, root: Path, layout: str) -> None:
    """Raise UserError where there is no class, a class is empty, or an entry neither counts nor is passed over."""
    _refuse_dangling(strays, root)
    stray = sorted(strays)
    more = f"; {first_of(stray)} is neither an image in a class folder nor passed over" if stray else ""
    if not names:
        raise UserError(f"Found no class under {root}, expected {root}/CLASS/IMAGE: check data.root{more}.")
    inside = {path.partition("/")[0] for path in stray if not path.rpartition("/")[2].startswith(".")}
    empty = [name for name in sorted(names) if not names[name] and name not in inside]
    if empty:
        raise UserError(
            f"Found no image of class {first_of(empty)} under {root}, expected at least one: add images, or remove "
            f"it{more}."
        )
    outside = [name for name in stray if "/" not in name and is_image(name)]
    if outside:
        raise UserError(
            f"Found {first_of(outside)} directly under {root}, expected images inside class folders only: move them "
            f"to {root}/CLASS/."
        )
    if stray:
        raise UserError(
            f"Found {first_of(stray)} under {root}, expected {layout} with only files ending in "
            f"{', '.join(sorted(EXTENSIONS))}: move the rest away, or convert them."
        )


def _refuse_dangling(strays: Tree, root: Path) -> None:
    dangling = sorted(name for name, entry in strays.items() if entry == DANGLING)
    if dangling:
        raise UserError(
            f"Found {first_of(dangling)} under {root}, a link that leads nowhere: restore what it leads to, or "
            "remove it."
        )


def _is_passed_over(name: str, entry: Any) -> bool:
    return is_clutter(name) and entry != DANGLING


def _is_file(entry: Any) -> bool:
    return not isinstance(entry, Mapping) and entry not in (SPECIAL, DANGLING)


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


def _scan(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder; folders within are not read."""
    with scandir(folder) as entries:
        return {entry.name: _kind(entry) for entry in sorted(entries, key=lambda entry: entry.name)}


def _scan_classes(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder of class folders, with those within them."""
    return {
        name: _scan(folder / name) if isinstance(entry, Mapping) and not is_clutter(name) else entry
        for name, entry in _scan(folder).items()
    }


def _kind(entry: DirEntry[str]) -> Any:
    try:
        if entry.is_dir():
            return {}
        if entry.is_file():
            return FILE
    except OSError:  # a loop of links
        return DANGLING
    return DANGLING if entry.is_symlink() and not os.path.exists(entry.path) else SPECIAL
