"""Held-out images are in no file that anything is trained on or compared with."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from afm_pipe import pipeline
from afm_pipe.cli.app import app
from afm_pipe.data.held_out import hold_out, read_held_out, write_held_out
from afm_pipe.data.manifest import Manifest, read_manifest, write_manifest
from afm_pipe.data.reading import build_manifest, load_images
from afm_pipe.distributed.launch import Launch
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.evaluation.thumbnails import Thumbnails
from afm_pipe.params import HeldOut
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.conftest import DISCS, SMOKE, write_images
from tests.data.test_manifest import folder_data

QUARTER = HeldOut(share=0.25, root=None)


def split(root: Path, settings: HeldOut | None = QUARTER) -> tuple[Manifest, Manifest | None]:
    data = folder_data(root)
    return track("hold out", hold_out(track("prepare", build_manifest(data)), settings, data))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", per_class=20)
    return tmp_path / "images"


def test_a_share_of_each_class_leaves_the_images_to_train_on(images: Path) -> None:
    kept, held = split(images)
    assert held is not None
    assert np.bincount(held.labels).tolist() == [5] * 3 and np.bincount(kept.labels).tolist() == [15] * 3
    assert not {*kept.paths} & {*held.paths} and not {*kept.sha256} & {*held.sha256}
    assert len({*kept.paths, *held.paths}) == 60
    assert len({kept.digest, held.digest, split(images, None)[0].digest}) == 3


def test_the_choice_rests_on_bytes_and_not_on_names_or_other_images(images: Path) -> None:
    _, before = split(images)
    assert before is not None
    for index, path in enumerate(sorted((images / "class1").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed-{index:03}.png"))
    shutil.rmtree(images / "class2")
    _, after = split(images)
    assert after is not None
    chosen = [{sha for sha, label in zip(m.sha256, m.labels, strict=True) if label == 1} for m in (before, after)]
    assert chosen[0] == chosen[1]


def test_copies_of_a_held_out_image_are_held_out_too(images: Path) -> None:
    _, held = split(images)
    assert held is not None
    shutil.copy(images / held.paths[0], images / "class2" / "copy.png")  # even in another class
    kept, again = split(images)
    assert again is not None
    assert "class2/copy.png" in again.paths and not {*kept.sha256} & {*again.sha256}


def test_none_held_out_leaves_the_manifest_as_it_was(images: Path, tmp_path: Path) -> None:
    kept, held = split(images, None)
    assert held is None
    write_manifest(tmp_path / "as-listed.json", track("prepare", build_manifest(folder_data(images))))
    write_manifest(tmp_path / "kept.json", kept)
    assert (tmp_path / "kept.json").read_bytes() == (tmp_path / "as-listed.json").read_bytes()
    write_held_out(tmp_path / "held_out.json", None)
    assert read_held_out(tmp_path / "held_out.json", None) is None
    with pytest.raises(UserError, match="Found no held-out images in .*run `dvc repro prepare`"):
        read_held_out(tmp_path / "held_out.json", QUARTER)


def test_another_folder_is_held_out_without_the_images_that_are_trained_on(images: Path, tmp_path: Path) -> None:
    val = tmp_path / "val"
    for label in range(3):
        (val / f"class{label}").mkdir(parents=True)
        for index in range(4):  # 0 is a training image, the others are new
            with Image.open(images / f"class{label}" / "007.png") as image:
                image.rotate(90 * index).save(val / f"class{label}" / f"{index}.png")
    kept, held = split(images, HeldOut(share=None, root=str(val)))
    assert held is not None
    assert kept.num_images == 60 and held.root == val and not {*kept.sha256} & {*held.sha256}
    assert held.num_images == 9
    write_held_out(tmp_path / "held_out.json", held)
    read = read_held_out(tmp_path / "held_out.json", HeldOut(share=None, root=str(val)))
    assert read is not None and read.paths == held.paths
    (val / "class2").rename(val / "class3")
    with pytest.raises(UserError, match="Found 'class3' as class 2 of 3 in .*val, expected 'class2'"):
        split(images, HeldOut(share=None, root=str(val)))


def test_a_class_of_one_image_is_trained_on(images: Path) -> None:
    for path in sorted((images / "class0").iterdir())[1:]:
        path.unlink()
    kept, held = split(images)
    assert held is not None
    assert np.bincount(kept.labels).tolist() == [1, 15, 15] and np.bincount(held.labels).tolist() == [0, 5, 5]


def test_a_class_whose_images_are_all_held_out_is_refused(images: Path) -> None:
    for path in sorted((images / "class0").iterdir())[1:]:
        shutil.copy(sorted((images / "class0").iterdir())[0], path)
    with pytest.raises(UserError, match="Found no image of class 'class0' to train on .* or set held_out to null"):
        split(images)


@pytest.mark.parametrize("value", ["{share: 0.1, root: val}", "{share: null, root: null}", "{share: 1.0, root: null}"])
def test_params_give_a_share_or_a_root(value: str) -> None:
    with pytest.raises(UserError, match="held_out"):
        load_params(SMOKE, [f"held_out={value}"])


def test_no_stage_learns_from_held_out_images(project: Path) -> None:
    """From the folder to the reference: latents, thumbnails, statistics and the feature classifier lack them."""
    write_images(project / "data" / "images")
    params = load_params(SMOKE, [*DISCS, "held_out={share: 0.4, root: null}", "evaluate.samples=30"])
    params = params.model_copy(update={"tables": {}})
    launch = Launch(device="cpu")
    pipeline.prepare(params)
    for stage in (pipeline.autoencoder, pipeline.encode, pipeline.reference):
        stage(params, launch)
    manifest, held = read_manifest(paths.MANIFEST), read_held_out(paths.HELD_OUT, params.held_out)
    assert held is not None and (manifest.num_images, held.num_images) == (36, 24)
    with h5py.File(paths.LATENTS) as file:
        assert len(file["labels"]) == 36 and file.attrs["manifest_digest"] == manifest.digest
    summary = json.loads((paths.REFERENCE / "summary.json").read_text())
    assert (summary["images"], summary["thumbnails"], summary["manifest"]) == (36, 36, manifest.digest)
    assert (summary["held_out"]["images"], summary["held_out"]["in_shares"]) == (24, 24)
    assert summary["held_out"]["manifest"] == held.digest
    stored = Thumbnails.load(paths.REFERENCE / "thumbnails.npz").images.numpy()
    for image in track("read", load_images(held, params.data)):
        assert not (stored == image).all(axis=(1, 2, 3)).any()
    evaluator = Evaluator(params, paths.REFERENCE)
    assert evaluator.held_out is not None
    assert evaluator.held_out[0].features.shape[0] == 24 and evaluator.references[0].count == 36


def test_doctor_knows_held_out_images(project: Path) -> None:
    write_images(project / "data" / "images")
    shutil.copy(SMOKE, "params.yaml")
    text = Path("params.yaml").read_text().replace("held_out: null", "held_out: {share: 0.4, root: null}")
    Path("params.yaml").write_text(
        text.replace("source: mnist5k", "source: folder").replace("min_images: 1000", "min_images: 60")
    )
    pipeline.prepare(load_params())
    found = CliRunner().invoke(app, ["doctor"]).output
    assert "ok   data: data/manifest.json lists the 36 images" in found
    (project / "data" / "images" / "class0" / "new.png").write_bytes(b"")
    assert "Found 1 more images under data/images" in " ".join(CliRunner().invoke(app, ["doctor"]).output.split())
