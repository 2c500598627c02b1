"""The manifest of a data set, the built-in data set, and reading images through it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afm_pipe.data.manifest import Manifest, read_manifest, write_manifest
from afm_pipe.data.reading import build_manifest, image_batches, load_images, read_images, require_images
from afm_pipe.data.sources import materialize
from afm_pipe.params import Data
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.conftest import write_images


def folder_data(root: Path, source: str = "folder", min_images: int = 1) -> Data:
    return Data.model_validate(
        {
            "source": source,
            "root": str(root),
            "image_size": 32,
            "channels": 1,
            "orientation": "ignore",
            "mirror": False,
            "min_images": min_images,
        }
    )


def build(data: Data) -> Manifest:
    return track("prepare", build_manifest(data))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    write_images(tmp_path / "images", per_class=4)
    return folder_data(tmp_path / "images")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "images"
    track("materialize", materialize("mnist5k", root))
    return root


def test_digits_are_written_as_padded_grey_squares_in_class_folders(digits: Path) -> None:
    manifest = build(folder_data(digits, "mnist5k", 5000))
    assert manifest.classes == tuple("0123456789")
    assert np.bincount(manifest.labels).tolist() == [500] * 10
    image = Image.open(digits / "7" / "00003.png")
    assert (image.mode, image.size) == ("L", (32, 32))
    pixels = np.asarray(image)
    assert pixels[2:-2, 2:-2].max() > 200
    assert pixels.sum() == pixels[2:-2, 2:-2].sum()
    # Pinned: the same data set on every machine.
    assert manifest.digest == "898531a5abfb14aa7ff7dec04637ac794b30d1ab7caa502d891fcef7e871a827"


def test_whole_digits_are_left_alone_and_other_files_are_never_deleted(digits: Path, tmp_path: Path) -> None:
    before = (digits / "0" / "00000.png").stat().st_mtime_ns
    track("materialize", materialize("mnist5k", digits))
    assert (digits / "0" / "00000.png").stat().st_mtime_ns == before
    write_images(tmp_path / "mine", per_class=1)
    with pytest.raises(UserError, match=r"class0/000\.png, which is not one of them"):
        track("materialize", materialize("mnist5k", tmp_path / "mine"))
    assert (tmp_path / "mine" / "class0" / "000.png").exists()


def test_a_file_of_the_users_among_the_digits_is_refused(digits: Path) -> None:
    mine = digits / "0" / "mine.png"
    mine.touch()
    with pytest.raises(UserError, match=r"Found 5000 of mnist5k's 5000 .* and 0/mine\.png"):
        track("materialize", materialize("mnist5k", digits))
    mine.unlink()


def test_digits_half_deleted_are_refused(digits: Path, tmp_path: Path) -> None:
    root = shutil.copytree(digits, tmp_path / "half")
    shutil.rmtree(root / "3")
    with pytest.raises(UserError, match="Found 4500 of mnist5k's 5000 images"):
        track("materialize", materialize("mnist5k", root))


def test_digits_that_are_gone_are_written_again(digits: Path, tmp_path: Path) -> None:
    data = folder_data(digits, "mnist5k")
    manifest = build(data)
    digits.rename(tmp_path / "away")
    track("require", require_images(manifest, data))
    assert read_images(manifest, data, [0, 4999]).shape == (2, 1, 32, 32)


def test_manifest_survives_the_round_trip(data: Data, tmp_path: Path) -> None:
    manifest = build(data)
    write_manifest(tmp_path / "manifest.json", manifest)
    again = read_manifest(tmp_path / "manifest.json")
    assert (again.root, again.classes, again.paths, again.sha256, again.digest) == (
        Path(data.root),
        ("class0", "class1", "class2"),
        manifest.paths,
        manifest.sha256,
        manifest.digest,
    )
    assert again.labels.dtype == np.int64
    np.testing.assert_array_equal(again.labels, np.repeat([0, 1, 2], 4))


def test_digest_depends_on_every_byte_name_and_label_but_not_on_the_place(data: Data, tmp_path: Path) -> None:
    root, digest = Path(data.root), build(data).digest
    assert build(folder_data(shutil.copytree(root, tmp_path / "elsewhere"))).digest == digest
    (root / "class0" / "000.png").rename(root / "class0" / "0000.png")
    renamed = build(data).digest
    shutil.copy(root / "class1" / "000.png", root / "class1" / "001.png")
    assert len({digest, renamed, build(data).digest}) == 3


def test_edited_manifest_is_refused(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, build(data))
    path.write_text(path.read_text().replace("class2/003.png", "class2/004.png"))
    with pytest.raises(UserError, match="edited or damaged"):
        read_manifest(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="of format None"):
        read_manifest(path)


def test_all_damaged_files_are_counted_and_ten_are_named(data: Data) -> None:
    for path in list(Path(data.root).rglob("*.png"))[:11]:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="Found 11 of 12 images") as error:
        build(data)
    assert str(error.value).count("damaged (") == 10
    assert str(error.value).endswith("and 1 more")


def test_too_few_images_are_taken_for_a_mistake(data: Data) -> None:
    with pytest.raises(UserError, match="Found 12 images under .*, expected at least 13"):
        build(data.model_copy(update={"min_images": 13}))


def test_batches_come_in_order_however_they_are_cut(data: Data) -> None:
    manifest = build(data)
    whole = track("load", load_images(manifest, data))
    assert whole.shape == (12, 1, 32, 32)
    np.testing.assert_array_equal(whole[5, 0], np.asarray(Image.open(manifest.root / manifest.paths[5])))
    batches = list(image_batches(manifest, data, [range(0, 5), range(5, 10), [11, 0]]))
    np.testing.assert_array_equal(np.concatenate(batches), whole[[*range(10), 11, 0]])


def test_missing_and_changed_images_are_refused_by_name(data: Data) -> None:
    manifest, root = build(data), Path(data.root)
    shutil.copy(root / "class0" / "000.png", root / "class0" / "001.png")
    with pytest.raises(UserError, match=r"class0/001\.png changed since"):
        read_images(manifest, data, [0, 1])
    (root / "class1" / "002.png").unlink()
    with pytest.raises(UserError, match=r"Found 1 of 12 images missing .* class1/002\.png"):
        track("require", require_images(manifest, data))
