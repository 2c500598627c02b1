"""Samples on request at the command line: classes, seeds, files, interpolations."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from diffusers import AutoencoderKL
from PIL import Image
from typer.testing import CliRunner

from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.cli.app import app
from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator, save_model
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.sampling.requests import choose_classes
from afm_pipe.sampling.sampler import Sampler, slerp
from tests.conftest import SMOKE

SIDE, GAP = 32, 2
FLOWERS = ["red rose", "white rose", "tulip", "Oak", "crane", "crane", "7"]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with untrained weights: models one (1 step), two (2 steps), free (any number), and an autoencoder."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae: Any = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8, 16, 32), norm_num_groups=8, **blocks)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(20)  # an untrained decoder gives nearly the same gray for everything
    vae.register_to_config(scaling_factor=0.5)
    KLAutoencoder(vae, 32).save(folder / paths.AUTOENCODER)
    for name, nfe in (("one", 1), ("two", 2), ("free", "any")):
        config = ModelConfig(
            size="t4", channels=4, latent_size=8, num_classes=10, nfe=nfe, form="direct" if nfe == 1 else "residual"
        )
        generator = build_generator(config)
        with torch.no_grad():
            for weight in generator.parameters():
                weight.normal_(std=0.1)
        described = {"model": config.model_dump(), "scaling_factor": 0.5, "classes": [f"digit {i}" for i in range(10)]}
        described["images_seen"] = 0
        save_model(
            folder / paths.model(name),
            {"generator": generator, "discriminator": build_discriminator(config)},
            described,
        )
    (folder / "params.yaml").write_text(SMOKE.read_text().replace("micro_batch: 50", "micro_batch: 6"))
    return folder


@pytest.fixture
def run(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(project)
    return lambda *words: CliRunner().invoke(app, ["sample", *(w.replace("OUT", str(tmp_path)) for w in words)])


def images(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"]


def test_without_options_the_grid_and_strips_of_the_report_are_drawn(run: Run) -> None:
    assert run("one").exit_code == 0
    sheet = Image.open(paths.samples("one") / "grid.png")
    assert sheet.size == (2 * (SIDE + GAP) + GAP, 10 * (SIDE + GAP) + GAP)
    strips = Image.open(paths.samples("one") / "interpolation.png")
    assert strips.size == (9 * (SIDE + GAP) + GAP, 5 * (SIDE + GAP) + GAP)


def test_chosen_classes_are_rows_and_speed_is_printed(run: Run, tmp_path: Path) -> None:
    done = run("one", "--classes", "3, digit 7", "--seed", "5", "--per-class", "4", "--grid", "OUT/a.png")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "a.png").size == (4 * (SIDE + GAP) + GAP, 2 * (SIDE + GAP) + GAP)
    assert "8 images of 2 classes in 1 step." in done.output
    assert "ms for one latent (batch 1, 1 step, median" in done.output
    assert "images/s" in done.output


def test_an_image_is_the_same_in_every_file_and_for_every_count(run: Run, tmp_path: Path) -> None:
    run("one", "--count", "17", "--seed", "5", "--npz", "OUT/all.npz", "--images", "OUT/all", "--grid", "OUT/all.png")
    run("one", "--count", "4", "--seed", "5", "--npz", "OUT/few.npz")
    whole = images(tmp_path / "all.npz")
    assert whole.shape == (17, SIDE, SIDE, 1)
    assert len({image.tobytes() for image in whole}) == 17
    assert np.array_equal(images(tmp_path / "few.npz"), whole[:4])
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == [f"{i:06d}.png" for i in range(17)]
    for index, name in enumerate(names):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "all" / name)), whole[index, ..., 0])
    sheet = np.asarray(Image.open(tmp_path / "all.png"))
    assert np.array_equal(sheet[GAP : GAP + SIDE, GAP : GAP + SIDE], whole[0, ..., 0])


def test_classes_come_in_turn_and_labels_are_kept(run: Run, tmp_path: Path) -> None:
    run("one", "--classes", "9,2", "--count", "5", "--npz", "OUT/a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["labels"].tolist() == [9, 2, 9, 2, 9]
    first = (tmp_path / "a.npz").read_bytes()
    run("one", "--classes", "9,2", "--count", "5", "--npz", "OUT/a.npz")
    assert (tmp_path / "a.npz").read_bytes() == first
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


def test_strips_begin_and_end_with_the_images_of_their_seeds(run: Run, tmp_path: Path) -> None:
    done = run("one", "--classes", "1,2", "--interpolate", "3,9,4", "--frames", "4", "--npz", "OUT/a.npz")
    assert done.exit_code == 0, done.output
    strips = images(tmp_path / "a.npz").reshape(2, 7, SIDE, SIDE).astype(int)
    for row, label in enumerate((1, 2)):
        for frame, seed in ((0, 3), (3, 9), (6, 4)):
            run("one", "--classes", str(label), "--seed", str(seed), "--count", "1", "--npz", "OUT/end.npz")
            end = images(tmp_path / "end.npz")[0, ..., 0].astype(int)
            assert np.abs(strips[row, frame] - end).max() <= 1  # another place in the batch may round otherwise
    assert not np.array_equal(strips[0, 1], strips[0, 0])


def test_noise_between_seeds_stays_on_the_sphere() -> None:
    first, second = (torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    second = second * first.norm() / second.norm()
    assert torch.allclose(slerp(first, second, 0.0), first)
    assert torch.allclose(slerp(first, second, 1.0), second)
    middle = slerp(first, second, 0.5)
    assert middle.norm() == pytest.approx(first.norm().item(), rel=1e-5)
    assert torch.dist(middle, first).item() == pytest.approx(torch.dist(middle, second).item(), rel=1e-5)
    assert torch.equal(slerp(first, first, 0.3), first)


def test_any_step_generator_takes_the_requested_steps(run: Run, tmp_path: Path) -> None:
    for steps in ("1", "3"):
        done = run("free", "--count", "2", "--steps", steps, "--npz", f"OUT/{steps}.npz")
        assert done.exit_code == 0, done.output
    assert "2 images of 2 classes in 3 steps." in done.output
    assert not np.array_equal(images(tmp_path / "1.npz"), images(tmp_path / "3.npz"))
    assert run("two", "--count", "2", "--npz", "OUT/two.npz").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["two", "--steps", "1", "--count", "1", "--grid", "OUT/a.png"],
            "Found 1 steps, expected 2, for which the generator is trained",
        ),
        (["one", "--classes", "1"], "Found no output for the samples"),
        (["one", "--classes", "10", "--grid", "OUT/a.png"], "Found class 10, expected a number below 10"),
        (["one", "--classes", "digt 3", "--grid", "OUT/a.png"], "Found no class 'digt 3', expected a number below 10"),
        (["one", "--count", "0", "--grid", "OUT/a.png"], "Found --count 0, expected at least 1"),
        (["one", "--count", "1", "--per-class", "1", "--grid", "OUT/a.png"], "both --per-class and --count"),
        (["one", "--interpolate", "1", "--grid", "OUT/a.png"], "Found --interpolate 1, expected two seeds or more"),
        (["one", "--interpolate", "1,2", "--seed", "1", "--grid", "OUT/a.png"], "Found --interpolate with --seed"),
        (["one", "--interpolate", "1,2", "--frames", "1", "--grid", "OUT/a.png"], "Found --frames 1, expected"),
        (["one", "--count", "1", "--grid", "OUT/a.jpg"], "ends in .png"),
        (["one", "--count", "1", "--images", "models"], "expected a new folder, or one that holds only"),
    ],
)
def test_wrong_request_is_explained_and_draws_nothing(
    run: Run, tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "latency", lambda *_: pytest.fail("it sampled"))
    done = run(*words)
    assert done.exit_code == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_classes_are_found_by_name_or_number() -> None:
    assert choose_classes("tulip,0, OAK ,3", FLOWERS) == [2, 0, 3, 3]
    assert choose_classes("7", FLOWERS) == [6]  # a name comes before a number
    with pytest.raises(UserError, match="did you mean red rose, white rose"):
        choose_classes("rose", FLOWERS)
    with pytest.raises(UserError, match=r"Found 2 classes named 'crane', expected one: use number 4 or 5\."):
        choose_classes("crane", FLOWERS)


def test_files_stay_unchanged_when_drawing_fails(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.npz").write_text("precious")

    def fail(*_: Any) -> Any:
        raise UserError("Found a non-finite latent.")

    monkeypatch.setattr(Sampler, "images", fail)
    assert run("one", "--count", "9", "--npz", "OUT/a.npz", "--grid", "OUT/a.png", "--images", "OUT/a").exit_code == 1
    assert (tmp_path / "a.npz").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
