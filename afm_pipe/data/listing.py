"""List a data set: one folder per class, each with image files.

No entry disappears silently. In a folder as in a tar archive, every entry under the root is one of:

    image    CLASS/IMAGE with a known extension; links are followed
    skipped  a name in CLUTTER, a document next to the class folders (DOCUMENT_TYPES, DOCUMENTS), or a split next to
             train/ (SPLITS); `prepare` prints how many there are of each name. A dangling link is never skipped
    error    everything else, named in the message: dangling links, hidden class folders, archives, nested folders
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from os import DirEntry, scandir
from pathlib import Path
from typing import Any, NamedTuple

from afm_pipe.runtime.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CLUTTER = (  # files of operating systems and tools; patterns in lower case
    *("__macosx", ".ds_store", "._*", ".localized", ".spotlight-v100", ".trashes", ".fseventsd"),  # macOS
    *(".temporaryitems", ".appledouble", "icon\r", ".documentrevisions-v100", ".volumeicon.icns", ".apdisk"),
    *("network trash folder", "temporary items"),
    *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
    *("$recycle.bin", "recycler", "system volume information", "picasa.ini", ".picasa.ini", "*:zone.identifier"),
    *(".directory", ".trash", ".trash-*", ".thumbnails", "lost+found", ".nfs*", ".fuse_hidden*", ".~lock.*"),  # Linux
    *(".nomedia", ".dropbox", ".dropbox.attr", ".dropbox.cache", ".stfolder", ".stversions", ".sync"),  # phones, sync
    *("@eadir", "#recycle", "#snapshot", ".snapshot", ".snapshots", "@recycle", ".@__thumb"),  # network storage
    *(".git", ".gitignore", ".gitattributes", ".gitkeep", ".keep", ".dvc", ".dvcignore", ".cache", ".huggingface"),
    *(".svn", ".hg"),
    *(".ipynb_checkpoints", ".idea", ".vscode"),
)
DOCUMENTS = {"readme", "license", "licence", "copying", "citation", "authors", "notice", "changelog"}
DOCUMENT_TYPES = {".md", ".rst", ".txt", ".csv", ".tsv", ".json", ".yaml", ".yml", ".xml", ".html", ".pdf"}
SPLITS = {"val", "valid", "validation", "test", "dev", "eval"}


FILE, SPECIAL, DANGLING = "a file", "a pipe or a device", "a link that leads nowhere"
CLASS_FOLDERS = "class folders"

Tree = Mapping[str, Any]  # the entries of a folder by name: a Tree for a folder, any other value for a file


class Listing(NamedTuple):
    """Classes and images, sorted as strings, as in torchvision's ImageFolder."""

    classes: list[str]
    images: list[tuple[str, int]]
    """(CLASS/IMAGE, label)."""
    skipped: list[str] = []
    """Paths of skipped entries."""
    base: str = ""
    """The folder under the root that holds the class folders: `train` as in ImageNet, or empty for the root itself."""


def list_images(root: Path) -> Listing:
    """List the class folders of `root` or `root/train`, their images, and skipped entries.

    Raises UserError for a missing or empty root, an empty class folder, and any entry that is neither an image nor
    skipped.
    """
    if not root.is_dir():
        raise UserError(f"Found no folder {root}, expected one folder of images per class in it: check data.root.")
    tree = _scan(root)
    if _holds_classes(tree.get("train"), lambda: _scan(root / "train")):
        return list_tree(tree | {"train": _scan_classes(root / "train")}, root)
    return list_tree(_scan_classes(root), root)


def list_tree(tree: Tree, root: Path, layout: str = CLASS_FOLDERS) -> Listing:
    """List the classes of a tree of entries, on disk or in an archive; `root` and `layout` appear in errors.

    Raises UserError as `list_images` does.
    """
    skipped: list[str] = []
    base = ""
    if _holds_classes(tree.get("train"), lambda: tree["train"]):
        skipped = _next_to_train(tree, root)
        base, tree, root = "train", tree["train"], root / "train"
    names: dict[str, list[str]] = {}
    strays: dict[str, Any] = {}
    for name, entry in tree.items():
        if _is_skipped(name, entry) or (is_document(name) and _is_file(entry)):
            skipped.append(name)
        elif not isinstance(entry, Mapping) or name.startswith("."):
            strays[name] = entry
        else:
            images = names.setdefault(name, [])
            for inner, leaf in entry.items():
                path = f"{name}/{inner}"
                if _is_skipped(inner, leaf):
                    skipped.append(path)
                elif is_image(inner) and _is_file(leaf):
                    images.append(inner)
                else:
                    strays[path] = leaf
    _check(names, strays, root, layout)
    classes = sorted(names)
    listed = [(f"{name}/{image}", label) for label, name in enumerate(classes) for image in sorted(names[name])]
    return Listing(classes, listed, sorted(skipped), base)


def _holds_classes(train: Any, entries: Callable[[], Tree]) -> bool:
    """Return whether the entry `train` holds the class folders, as in ImageNet, and is not itself a class."""
    return isinstance(train, Mapping) and any(
        isinstance(entry, Mapping) and not is_clutter(name) for name, entry in entries().items()
    )


def _next_to_train(tree: Tree, root: Path) -> list[str]:
    """Return the entries next to root/train, all skipped. Raises UserError for any but splits and documents."""
    others = {name: entry for name, entry in tree.items() if name != "train"}
    strays = {
        name: entry
        for name, entry in others.items()
        if not _is_skipped(name, entry)
        and not (name.lower() in SPLITS if isinstance(entry, Mapping) else is_document(name) and _is_file(entry))
    }
    _refuse_dangling(strays, root)
    if strays:
        raise UserError(
            f"Found {first_of(sorted(strays))} next to {root / 'train'}, expected the class folders in train and at "
            f"most {', '.join(sorted(SPLITS))} next to it: move the rest away, or set data.root to the folder of the "
            "classes."
        )
    return list(others)


def _check(names: Mapping[str, Sequence[str]], strays: Tree, root: Path, layout: str) -> None:
    """Raise UserError if there is no class, a class is empty, or an entry is neither an image nor skipped."""
    _refuse_dangling(strays, root)
    stray = sorted(strays)
    more = f"; {first_of(stray)} is neither an image in a class folder nor skipped" if stray else ""
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
            f"Found {first_of(dangling)} under {root}, a link that leads nowhere: restore its target, or remove it."
        )


def _is_skipped(name: str, entry: Any) -> bool:
    return is_clutter(name) and entry != DANGLING


def _is_file(entry: Any) -> bool:
    return not isinstance(entry, Mapping) and entry not in (SPECIAL, DANGLING)


def is_clutter(name: str) -> bool:
    """Return whether a name matches CLUTTER, ignoring case."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in CLUTTER)


def is_document(name: str) -> bool:
    """Return whether a file next to the class folders is skipped, as a document that describes the data."""
    return not name.startswith(".") and (Path(name).suffix.lower() in DOCUMENT_TYPES or name.lower() in DOCUMENTS)


def is_image(name: str) -> bool:
    """Return whether a file in a class folder is an image, by its name."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


def count_by_name(skipped: Iterable[str]) -> dict[str, int]:
    """Return how many paths have each file name, the most frequent first."""
    counts: dict[str, int] = {}
    for path in skipped:
        name = path.rpartition("/")[2]
        mark = ":Zone.Identifier"  # Windows marks every downloaded file
        name = "._*" if name.startswith("._") else f"*{mark}" if name.lower().endswith(mark.lower()) else name
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def first_of(names: Sequence[str]) -> str:
    """Return the first three names and the number of others; names that would control a terminal are escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _scan(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder; its subfolders are not read."""
    with scandir(folder) as entries:
        return {entry.name: _kind(entry) for entry in sorted(entries, key=lambda entry: entry.name)}


def _scan_classes(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder of class folders, and the entries of those."""
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
