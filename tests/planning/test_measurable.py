"""What later stages need of the images is checked before the first of them runs."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.data.manifest import Manifest
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.planning.measurable import require_measurable
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from tests.conftest import SMOKE

ENOUGH = ("evaluate.samples=2000", "study.samples=2000", "reference.thumbnails=1001")


def manifest(counts: Sequence[int], same: bool = False) -> Manifest:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"class{label}" for label in range(len(counts)))
    hashes = tuple(hashlib.sha256(b"" if same else bytes(str(i), "ascii")).hexdigest() for i in range(len(labels)))
    return Manifest(Path(), names, tuple(map(str, labels)), labels, hashes, "digest")


def params_with(*overrides: str) -> Params:
    return load_params(SMOKE, overrides)


@pytest.mark.parametrize(
    ("counts", "overrides", "words"),
    [
        ([1] * 1000, ENOUGH, ["no class with two different images among 1000 images of 1000 classes"]),
        (
            [2] * 500,
            (),
            [
                "evaluate.samples 200 for 500 classes, expected at least 1000",
                "study.samples 200 for 500 classes, expected at least 1000",
                "reference.thumbnails 200 for 500 classes, expected at least 501",
            ],
        ),
        ([1], (), ["1 images, expected at least 4: add images", "no class with two different images"]),
        ([3], ("reference.thumbnails=2",), ["3 images, expected at least 4", "reference.thumbnails 2 for 1 classes"]),
        ([9, 1], ("reference.class_shares=equal",), ["1 images of class 'class1', and so of each class"]),
    ],
    ids=["1000 x 1", "500 x 2", "one", "three", "a class of one in equal shares"],
)
def test_everything_that_is_missing_is_named_at_once(
    counts: list[int], overrides: Sequence[str], words: list[str]
) -> None:
    with pytest.raises(UserError, match="Found what later stages cannot work with") as caught:
        require_measurable(params_with(*overrides), manifest(counts))
    assert all(f"\n  {each}" in str(caught.value) for each in words)
    assert str(caught.value).count("\n") == len(words)


def test_data_without_any_variation_are_refused() -> None:
    with pytest.raises(UserError, match="no class with two different images among 40 images of 2 classes"):
        require_measurable(params_with(), manifest([20, 20], same=True))


@pytest.mark.parametrize(
    ("counts", "overrides", "lines"),
    [
        ([500] * 10, (), []),
        ([2] * 500, ENOUGH, ["Measured roughly: variance and accuracy of 500 classes of fewer than 10 images."]),
        (
            [500, 20, 4, 1],
            (),
            [
                "Not measured: accuracy on held-out images and variance of 1 classes of one image.",
                "Measured roughly: variance and accuracy of 1 classes of fewer than 10 images.",
            ],
        ),
        ([500, 20], ("reference.class_shares=equal",), ["Statistics in equal class shares are of 40 of 520 images."]),
    ],
)
def test_what_few_images_leave_unmeasured_is_said(
    counts: list[int], overrides: Sequence[str], lines: list[str]
) -> None:
    found = require_measurable(params_with(*overrides), manifest(counts))
    assert [line for line in found if "probe" not in line and "updates" not in line] == lines


def test_the_probe_says_how_many_classes_it_sees() -> None:
    lines = require_measurable(params_with(*ENOUGH), manifest([2] * 500))
    assert "The monitor's probe sees 20 of 500 classes (train.monitor.probe.samples 40)." in lines


def test_runs_of_few_updates_are_named() -> None:
    few = "Few updates: 79 of s4, since an epoch has 157 images"
    runs = ("runs={s4: {seed: 0, size: s4, batch_size: 4, phases: [{until_epoch: 2}]}}", "guided={}", "tables={}")
    lines = require_measurable(params_with(*runs), manifest([100, 57]))
    assert any(line.startswith(few) for line in lines)
    lines = require_measurable(params_with(*runs), manifest([300, 100]))
    assert not any("updates" in line for line in lines)


@pytest.fixture
def write(project: Path) -> Callable[[int, int], Any]:
    """Return a function that writes images and says what `afm-pipe prepare` answers."""

    def prepare(classes: int, per_class: int, *words: str) -> Any:
        for label in range(classes):
            folder = Path("images") / f"{label:04d}"
            folder.mkdir(parents=True)
            for index in range(per_class):
                Image.new("L", (8, 8), (label + 7 * index) % 256).save(folder / f"{index}.png")
        overrides = ["data.source=folder", "data.root=images", "data.min_images=1"]
        paths.PARAMS.write_text(SMOKE.read_text())
        return CliRunner().invoke(app, ["prepare", *[w for o in overrides for w in ("--set", o)]])

    return prepare


def test_prepare_stops_before_it_writes_a_manifest_that_no_stage_can_use(write: Callable[[int, int], Any]) -> None:
    done = write(30, 1)
    assert done.exit_code == 1
    assert "no class with two different images among 30 images of 30 classes" in done.output
    assert not paths.MANIFEST.exists()


def test_a_dry_run_says_what_prepare_says_of_params_changed_since(write: Callable[[int, int], Any]) -> None:
    assert write(3, 2).exit_code == 0
    words = [*("train", "t4", "--dry-run", "--set", "data.root=images", "--set")]
    done = CliRunner().invoke(app, [*words, "reference.thumbnails=3"])
    assert "reference.thumbnails 3 for 3 classes, expected at least 4: raise it" in done.output
    done = CliRunner().invoke(app, [*words, "reference.thumbnails=4"])
    assert done.exit_code == 0 and "Measured roughly: variance and accuracy of 3 classes" in done.output
