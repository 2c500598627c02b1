"""`sample` and `export` write the images that evaluation measures."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from afm_pipe import pipeline
from afm_pipe.autoencoders import load_autoencoder
from afm_pipe.cli.app import app
from afm_pipe.evaluation.reference import build_reference
from afm_pipe.models.model_files import load_tensors
from afm_pipe.params import Imported
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import read_json, write_json
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.sampler import Sampler
from tests.evaluation.painter import manifest_of
from tests.sampling.test_requests import project  # noqa: F401 (fixture)

SAMPLES = 23  # no whole number of batches of 6, nor of 10 classes
OVERRIDES = (f"evaluate.samples={SAMPLES}", "reference.classifier.epochs=1", "reference.thumbnails=40")


def afm(*words: str) -> Result:
    overrides = [word for override in OVERRIDES for word in ("--set", override)]
    return CliRunner().invoke(app, [*words, *overrides])


@pytest.fixture(scope="module")
def measured(project: Path) -> np.ndarray:  # noqa: F811
    """The images (N, H, W) that `afm-pipe evaluate one` measures."""
    before, seen, generate = Path.cwd(), [], Sampler.images

    def watched(*args: Any) -> Any:
        images = generate(*args)
        seen.append(images.numpy().copy())
        return images

    os.chdir(project)
    try:
        params = load_params(overrides=OVERRIDES)
        images = np.random.default_rng(0).integers(0, 256, (60, 1, 32, 32)).astype(np.uint8)
        labels, names = np.sort(np.arange(60) % 10), [f"digit {i}" for i in range(10)]
        vae = load_autoencoder(params, paths.AUTOENCODER)
        track("reference", build_reference(params, manifest_of(labels, names), images, vae, paths.REFERENCE))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, "images", watched)
            done = afm("evaluate", "one")
        assert done.exit_code == 0, done.output
        assert read_json(paths.metrics("one"))["protocol"]["samples"] == SAMPLES
    finally:
        os.chdir(before)
    return np.concatenate(seen)[:SAMPLES, 0]  # the last call draws the nearest images


def test_kept_images_are_those_that_evaluation_measures(
    project: Path,  # noqa: F811
    measured: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    assert afm("sample", "one").exit_code == 0
    folder = paths.samples("one") / "images"
    assert not folder.exists()
    assert afm("sample", "one", "--set", "sample.keep_images=true").exit_code == 0
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(SAMPLES)]
    assert len({image.tobytes() for image in measured}) == SAMPLES
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), measured)


def test_npz_for_adms_evaluator_holds_what_evaluation_measures(
    project: Path,  # noqa: F811
    measured: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    out = tmp_path / "one.npz"
    done = afm("export", "one", "--format", "adm-npz", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert f"{SAMPLES} samples of one, shuffled" in done.output
    with np.load(out, allow_pickle=False) as file:
        pixels, labels = file["arr_0"], file["arr_1"]
    assert pixels.shape == (SAMPLES, 32, 32, 3)
    index = {image.tobytes(): i for i, image in enumerate(measured)}
    order = [index[image[..., 0].tobytes()] for image in pixels]
    assert order == np.random.default_rng(load_params().evaluate.seed).permutation(SAMPLES).tolist()
    assert [i % 10 for i in order] == labels.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["one.npz"]


@pytest.fixture
def summary(project: Path, measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:  # noqa: F811
    """The summary of the reference, in a copy of the measured project as the working directory."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return read_json(paths.REFERENCE / "summary.json")


def test_images_for_other_evaluators_are_in_the_class_shares_of_the_reference(summary: dict[str, Any]) -> None:
    write_json(paths.REFERENCE / "summary.json", summary | {"class_counts": [14, *[1] * 9]})
    assert afm("export", "one", "--format", "adm-npz", "--out", "one.npz").exit_code == 0
    with np.load("one.npz", allow_pickle=False) as file:
        assert np.bincount(file["arr_1"]).tolist() == [14, *[1] * 9]
    write_json(paths.REFERENCE / "summary.json", summary | {"classes": list("abcdefghij")})
    done = afm("export", "one", "--format", "adm-npz", "--out", "one.npz")
    assert "Found 'digit 0' as class 0 of 10 in models/one, expected 'a' of 10" in done.output


def test_kept_images_are_drawn_again_in_other_class_shares_and_where_they_are_gone(summary: dict[str, Any]) -> None:
    def drawn() -> list[bytes]:
        assert afm("sample", "one", "--set", "sample.keep_images=true").exit_code == 0
        return [file.read_bytes() for file in sorted((paths.samples("one") / "images").iterdir())]

    equal = drawn()
    write_json(paths.REFERENCE / "summary.json", summary | {"class_counts": [14, *[1] * 9]})
    assert drawn() != equal
    write_json(paths.REFERENCE / "summary.json", summary)
    assert drawn() == equal
    shutil.rmtree(paths.samples("one") / "images")
    assert drawn() == equal


def test_imported_weights_without_class_names_are_measured_only_where_numbers_name_the_classes(
    summary: dict[str, Any],
) -> None:
    params = load_params(overrides=OVERRIDES)
    torch.save(load_tensors(paths.model("one") / "generator.safetensors"), "plain.pth")
    pipeline.import_weights(params, "plain", Imported(file="plain.pth"))
    done = afm("evaluate", "plain")
    assert "Found '0' as class 0 of 10 in models/plain, expected 'digit 0' of 10 as in reference" in done.output
    write_json(paths.REFERENCE / "summary.json", summary | {"classes": list("0123456789")})
    done = afm("evaluate", "plain")
    assert done.exit_code == 0, done.output
    assert "Not checked: whether the classes of models/plain, which holds no names, are those of" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "--out", "x.zip"], "Found --out x.zip, expected the name of a file that ends in .npz"),
        (["none", "--out", "x.npz"], "Found no models/none/config.json"),
    ],
)
def test_wrong_npz_request_is_explained(
    project: Path,  # noqa: F811
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    done = afm("export", *words, "--format", "adm-npz")
    assert done.exit_code == 1
    assert message in done.stderr
    assert not Path(words[-1]).exists()
