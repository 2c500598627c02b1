"""The photographs of clothes: an archive known by its hash, read in place."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from afm_pipe.data.reading import build_manifest, compare_images, read_images
from afm_pipe.data.sources import CLOTHING_SHA256
from afm_pipe.params import Data
from afm_pipe.params.file import load_params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file
from afm_pipe.runtime.progress import track
from tests.assets import CLOTHING, needs_clothing
from tests.conftest import ROOT, write_images

COUNTS = {
    "dress": 288,
    "hat": 149,
    "longsleeve": 576,
    "outwear": 246,
    "pants": 559,
    "shirt": 345,
    "shoes": 297,
    "shorts": 257,
    "skirt": 136,
    "t-shirt": 928,
}


def data(root: Path) -> Data:
    return load_params(ROOT / "profiles" / "photos64.yaml", [f"data.root={root}"]).data


@needs_clothing
def test_photographs_are_read_in_place_with_their_classes() -> None:
    settings = data(CLOTHING)
    manifest = track("prepare", build_manifest(settings))
    assert dict(zip(manifest.classes, np.bincount(manifest.labels).tolist(), strict=True)) == COUNTS
    assert read_images(manifest, settings, [0, 3780]).shape == (2, 3, 64, 64)
    compare_images(manifest, settings)


@needs_clothing
def test_a_changed_archive_is_refused_before_it_is_read(tmp_path: Path) -> None:
    changed = Path(shutil.copyfile(CLOTHING, tmp_path / "clothing96.tar"))
    content = bytearray(changed.read_bytes())
    content[1_000_000] ^= 1  # inside a photograph: the archive is still one
    changed.write_bytes(content)
    with pytest.raises(UserError, match=f"with sha256 {sha256_file(changed)}, expected {CLOTHING_SHA256}"):
        track("prepare", build_manifest(data(changed)))


def test_a_missing_archive_and_another_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Found no file .* expected clothing96.tar there: see docs/photographs.md"):
        track("prepare", build_manifest(data(tmp_path / "clothing96.tar")))
    with pytest.raises(UserError, match=r"Found no file"):  # a folder
        track("prepare", build_manifest(data(tmp_path)))
    write_images(tmp_path / "images", per_class=2)
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "images", ".")
    with pytest.raises(UserError, match="set data.source: tar or folder for other photographs"):
        track("prepare", build_manifest(data(tmp_path / "other.tar")))
