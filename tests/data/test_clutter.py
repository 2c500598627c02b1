"""Every entry under the root is an image that counts, known clutter that is skipped and counted, or an error."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from afm_pipe.data.listing import list_images
from afm_pipe.data.manifest import Manifest
from afm_pipe.data.reading import build_manifest
from afm_pipe.data.sources import materialize
from afm_pipe.data.tars import index_tar
from afm_pipe.params import Data
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.conftest import SMOKE, write_images

APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X"  # head of an AppleDouble file
CLUTTER = {
    "__MACOSX/class0/._000.png": APPLE,
    ".DS_Store": b"\0\0\0\1Bud1",
    "class0/.DS_Store": b"\0\0\0\1Bud1",
    "class0/._000.png": APPLE,
    "class0/._001.png": APPLE,
    "class1/Thumbs.db": b"\xd0\xcf\x11\xe0",
    "class1/desktop.ini": b"[.ShellClassInfo]",
    "class1/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg": b"thumb",
    "class1/.ipynb_checkpoints/000-checkpoint.png": b"png",
    "$RECYCLE.BIN/S-1-5/x.png": b"png",
    "lost+found/x.png": b"png",
    "class0/000.png:Zone.Identifier": b"[ZoneTransfer]",
    "class2/001.png:Zone.Identifier": b"[ZoneTransfer]",
    "class2/.@__thumb/000.png": b"thumb",
    "@Recycle/x.png": b"png",
    "Network Trash Folder/x.png": b"png",
    ".apdisk": b"<?xml",
    "LICENSE": b"MIT",
    "labels.csv": b"a,b",
}
SKIPPED = (
    "12 images of 3 classes under {root}; skipped 19: 2 '*:Zone.Identifier', 2 '.DS_Store', 2 '._*', "
    "1 '$RECYCLE.BIN', 1 '.@__thumb', 1 '.apdisk', 1 '.ipynb_checkpoints', 1 '@Recycle', 1 '@eaDir', 1 'LICENSE', "
    "1 'Network Trash Folder', 1 'Thumbs.db', 1 '__MACOSX', 1 'desktop.ini', 1 'labels.csv', 1 'lost+found'."
)


def data(root: Path, source: str = "folder") -> Data:
    from afm_pipe.params.file import load_params

    own = {"source": source, "root": str(root), "min_images": 1}
    return load_params(SMOKE).data.model_copy(update=own)


def prepared(root: Path, source: str = "folder") -> Manifest:
    return track("prepare", build_manifest(data(root, source)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", per_class=4)
    return tmp_path / "images"


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def packed(root: Path) -> Path:
    path = root.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(root, arcname=".")
    return path


def test_known_clutter_changes_nothing_and_is_counted(root: Path) -> None:
    digest = prepared(root).digest
    put(root, CLUTTER)
    found = prepared(root)
    assert found.digest == digest
    assert found.describe() == SKIPPED.format(root=root)


def test_a_real_tar_of_a_cluttered_folder_counts_alike(root: Path) -> None:
    digest = prepared(root).digest
    put(root, CLUTTER)
    found = prepared(packed(root), "tar")
    assert found.digest == digest
    assert found.describe() == SKIPPED.format(root=packed(root))


def test_clutter_among_the_built_in_digits_is_no_mistake(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    put(root, {".DS_Store": b"x", "lost+found/x": b"x"})  # alone, as on a fresh volume
    track("materialize", materialize("mnist5k", root))
    assert (root / ".DS_Store").read_bytes() == (root / "lost+found" / "x").read_bytes() == b"x"
    put(root, {"3/Thumbs.db": b"x"})
    track("materialize", materialize("mnist5k", root))
    found = prepared(root, "mnist5k")
    assert (found.num_images, found.skipped) == (5000, {".DS_Store": 1, "Thumbs.db": 1, "lost+found": 1})


def test_dangling_links_are_named(root: Path) -> None:
    for link, words in (
        ("class9", "Found class9 under .*, a link that leads nowhere"),
        ("class0/link.png", r"Found class0/link\.png under .*, a link that leads nowhere"),
        (".DS_Store2", r"Found \.DS_Store2 under .*, a link that leads nowhere"),
        ("README.md", r"Found README\.md under .*, a link that leads nowhere"),
        *((name, f"Found {name} under .*, a link that leads nowhere") for name in ("train", "val", "__MACOSX")),
        *((name, f"Found {name} under .*, a link that leads nowhere") for name in (".DS_Store", "class0/Thumbs.db")),
    ):
        (root / link).symlink_to("/no/such/place")
        with pytest.raises(UserError, match=words):
            prepared(root)
        (root / link).unlink()
    (root / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="Found loop under .*, a link that leads nowhere"):
        prepared(root)


@pytest.mark.parametrize("name", ["val", "Test", ".git", "labels.csv", "train/class0/._000.png", "train/.cache"])
def test_dangling_links_beside_and_in_train_are_named_too(name: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    root.rename(tmp_path / "whole" / "train")
    (tmp_path / "whole" / name).symlink_to("/no/such/place")
    with pytest.raises(UserError, match=f"Found {name.removeprefix('train/')} under .*, a link that leads nowhere"):
        prepared(tmp_path / "whole")


def test_a_dangling_link_train_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to("/no/such/place")
    with pytest.raises(UserError, match="Found train under .*, a link that leads nowhere"):
        prepared(tmp_path)
    (tmp_path / "digits").symlink_to("/no/such/place")
    with pytest.raises(UserError, match="Found .*digits, a link that leads nowhere"):
        track("materialize", materialize("mnist5k", tmp_path / "digits"))


def test_links_that_lead_somewhere_count(root: Path) -> None:
    (root / "class0" / "link.png").symlink_to(root / "class1" / "000.png")
    (root / "class3").symlink_to(root / "class1")
    found = prepared(root)
    assert (found.num_images, found.classes) == (17, ("class0", "class1", "class2", "class3"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".cats/000.png", r"Found \.cats under"),
        ("class0/.hidden.png", r"Found class0/\.hidden\.png under"),
        ("class3.zip", r"Found class3\.zip under"),
        ("class3.tar", r"Found class3\.tar under"),
        ("class0/more.zip", r"Found class0/more\.zip under"),
        ("x.gif", r"Found x\.gif under"),
        ("class0/x.tiff", r"Found class0/x\.tiff under"),
        ("class0/deep/000.png", "Found class0/deep under"),
        ("stray.jpg", r"Found stray\.jpg directly under"),
    ],
)
def test_what_would_vanish_is_named(name: str, words: str, root: Path) -> None:
    put(root, {name: b"x"})
    with pytest.raises(UserError, match=words):
        list_images(root)


@pytest.mark.parametrize("name", ["\x1b[2Jx.txt", "two\nlines.txt", "\udcff.txt"])
def test_names_that_would_control_a_terminal_are_shown_escaped(name: str, root: Path) -> None:
    (root / "class0" / name).touch()
    with pytest.raises(UserError) as error:
        list_images(root)
    assert f"Found 'class0/{ascii(name)[1:-1]}' under" in str(error.value)


@pytest.mark.parametrize("name", [".cats/000.png", "class0/.hidden.png"])
def test_what_would_vanish_from_a_tar_is_named(name: str, root: Path) -> None:
    put(root, {name: b"x"})
    with pytest.raises(UserError, match=f"Found {name.removesuffix('/000.png')}"):
        track("index", index_tar(packed(root)))


def test_an_empty_class_folder_of_a_tar_is_an_error_as_it_is_on_disk(root: Path) -> None:
    (root / "class3").mkdir()
    for check in (lambda: list_images(root), lambda: track("index", index_tar(packed(root)))):
        with pytest.raises(UserError, match="Found no image of class class3 under"):
            check()


def test_splits_next_to_train_are_skipped_and_other_folders_are_named(root: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    root.rename(whole / "train")
    put(whole, {"val/class0/x.png": b"x", "test/y.png": b"y", "README.md": b"z"})
    assert prepared(whole).skipped == {"README.md": 1, "test": 1, "val": 1}
    put(whole, {"extra/000.png": b"x"})
    with pytest.raises(UserError, match="Found extra next to .*train, expected the class folders in train"):
        prepared(whole)


WHOLE = {  # entries next to the class folders of train, and in them
    "counted": (
        {"train/README.md": b"x", "train/labels.csv": b"x", "val/class0/x.png": b"x", "val/.DS_Store": b"x"},
        "",
    ),
    "clutter": ({"train/__MACOSX/x": b"x", "train/class0/Thumbs.db": b"x", "LICENSE": b"x", ".git/x/y": b"x"}, ""),
    "a class beside": ({"class9/x.png": b"x"}, "Found class9 next to .*train, expected"),
    "a hidden class": ({"train/.cats/x.png": b"x"}, r"Found \.cats under .*train, expected"),
    "a text in a class": ({"train/class0/a.txt": b"x"}, r"Found class0/a\.txt under .*train, expected"),
    "a file named as a split": ({"val": b"x"}, "Found val next to"),
    "an image beside": ({"x.png": b"x"}, r"Found x\.png next to"),
    "a folder in a class": ({"train/class0/deep/x.png": b"x"}, "Found class0/deep under"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_folder_with_train_and_its_tar_are_judged_alike(case: str, root: Path, tmp_path: Path) -> None:
    files, words = WHOLE[case]
    whole = tmp_path / "whole"
    whole.mkdir()
    root.rename(whole / "train")
    digest = prepared(whole).digest
    put(whole, files)
    if words:
        for place, source in ((whole, "folder"), (packed(whole), "tar")):
            with pytest.raises(UserError, match=words):
                prepared(place, source)
        return
    found, same = prepared(whole), prepared(packed(whole), "tar")
    assert found.digest == same.digest == digest
    assert found.skipped == same.skipped
    assert len(found.skipped) == len(files) - (case == "counted")  # val with its clutter is one


def test_a_zip_that_a_mac_made_is_unpacked_into_a_data_set(root: Path, tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("L", (32, 32)).save(image, "PNG")
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for name in ("cat/1.png", "dog/1.png"):
            archive.writestr(name, image.getvalue())
            archive.writestr(f"__MACOSX/{name.replace('/', '/._')}", APPLE)
    zipfile.ZipFile(tmp_path / "mac.zip").extractall(tmp_path / "unpacked")
    found = prepared(tmp_path / "unpacked")
    assert (found.classes, found.skipped) == (("cat", "dog"), {"__MACOSX": 1})
