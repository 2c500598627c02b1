"""A second kind, defined here alone, goes through every stage: normalized pixels, deterministic."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from afm_pipe import pipeline
from afm_pipe.autoencoders import load_autoencoder
from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.data.latents import Latents
from afm_pipe.data.latents_format import LATENTS, MOMENTS
from afm_pipe.data.manifest import read_manifest
from afm_pipe.data.reading import load_images
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Data, LatentSpec, Params
from afm_pipe.params.autoencoders import AutoencoderParams
from afm_pipe.params.file import load_params
from afm_pipe.planning.plan import latents_bytes
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, write_json
from afm_pipe.runtime.progress import Progress, track
from tests.conftest import DISCS, SMOKE, write_images

OVERRIDES = (
    *DISCS[:2],
    "autoencoder={kind: pixels}",
    "data.image_size=16",
    "train.batch_size=8",
    "runs.t4.phases=[{until_epoch: 1}]",
    "reference.classifier.epochs=1",
    "evaluate.samples=30",
    "evaluate.kid_subset_size=10",
)
LAUNCH = Launch(device="cpu")


@pytest.fixture(scope="module")
def params() -> Iterator[Params]:
    """Params of the kind, which is registered while they are in use."""

    class PixelParams(AutoencoderParams):
        kind: Literal["pixels"]

        def latent_spec(self, data: Data) -> LatentSpec:
            return LatentSpec((data.channels, data.image_size, data.image_size), False, image_range=(0.0, 1.0))

    class Pixels(Autoencoder, kind="pixels"):
        def __init__(self, mean: Tensor, std: Tensor) -> None:
            self.spec = LatentSpec(tuple(mean.shape), False, mean=mean, std=std, image_range=(0.0, 1.0))

        @classmethod
        def make(cls, params: Params, folder: Path, device: torch.device) -> Generator[Progress, None, None]:
            images = yield from load_images(read_manifest(paths.MANIFEST), params.data)
            pixels = torch.from_numpy(images).float() / 255
            moments = {"mean": pixels.mean(0), "std": pixels.std(0).clamp(min=0.05)}
            folder.mkdir()
            save_file(moments, folder / paths.AUTOENCODER_WEIGHTS.name)
            write_json(folder / "config.json", {"_class_name": "Pixels"})

        @classmethod
        def load(cls, params: Params, folder: Path) -> Self:
            return cls(**load_file(folder / paths.AUTOENCODER_WEIGHTS.name))

        def to(self, device: torch.device | str) -> Self:
            return self

        def _encode(self, pixels: Tensor) -> Tensor:
            return pixels

        def _decode(self, latents: Tensor) -> Tensor:
            return latents

    yield load_params(SMOKE, OVERRIDES)
    del AutoencoderParams.kinds["pixels"], Autoencoder.kinds["pixels"]


@pytest.fixture(scope="module")
def project(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project in which every stage has run, as the working directory."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("pixels")
    os.chdir(folder)
    write_images(folder / "data" / "images", classes=2, per_class=15)
    pipeline.prepare(params)
    for stage in (pipeline.autoencoder, pipeline.encode, pipeline.reference):
        stage(params, LAUNCH)
    for stage in (pipeline.train, pipeline.sample, pipeline.evaluate):
        stage(params, "t4", LAUNCH)
    yield folder
    os.chdir(before)


def images_of(params: Params) -> Tensor:
    return torch.from_numpy(track("read", load_images(read_manifest(paths.MANIFEST), params.data)))


def test_latents_alone_are_stored_in_half_the_bytes_of_moments(project: Path, params: Params) -> None:
    with h5py.File(paths.LATENTS) as file:
        assert MOMENTS not in file
        assert file[LATENTS].shape == (30, 1, 1, 16, 16)
        assert file[LATENTS].nbytes == latents_bytes(params, 30) == 30 * 16 * 16 * 2


def test_draws_are_normalized_latents_that_decode_to_the_images(project: Path, params: Params) -> None:
    latents, images = Latents.open(paths.LATENTS, params), images_of(params)
    drawn = latents.draw(torch.arange(30), torch.Generator())
    assert abs(drawn.mean()) < 1e-3
    assert drawn.std(0).max().item() == pytest.approx(1, abs=0.01)
    pixels = load_autoencoder(params, paths.AUTOENCODER)
    assert torch.equal(pixels.spec.to_uint8(pixels.decode(drawn)), images)
    assert torch.equal(latents.draw(torch.arange(30), torch.Generator().manual_seed(1)), drawn)  # no noise in them


def test_reconstructions_are_the_images(project: Path) -> None:
    assert (paths.REFERENCE / "real.png").read_bytes() == (paths.REFERENCE / "reconstructed.png").read_bytes()
    assert read_json(paths.REFERENCE / "summary.json")["fd_classifier_reconstruction"] == pytest.approx(0, abs=1e-3)


def test_a_run_is_trained_sampled_and_evaluated(project: Path) -> None:
    described = read_json(paths.model("t4") / "config.json")
    assert described["model"]["channels"] == 1
    assert described["model"]["latent_size"] == 16
    grid = np.asarray(Image.open(paths.samples("t4") / "grid.png"))
    assert grid.std() > 0
    assert read_json(paths.metrics("t4"))["protocol"]["samples"] == 30


def test_export_to_diffusers_needs_an_autoencoder_kl(project: Path) -> None:
    with pytest.raises(UserError, match="of Pixels, expected AutoencoderKL or AutoencoderTiny"):
        pipeline.export("t4", "diffusers", project / "exported")
    pipeline.export("t4", "safetensors", project / "exported.safetensors")


def test_an_autoencoder_of_another_latent_space_is_refused(project: Path, params: Params) -> None:
    pixels = load_autoencoder(params, paths.AUTOENCODER)
    pixels.check(params)
    larger = params.model_copy(update={"data": params.data.model_copy(update={"image_size": 32})})
    with pytest.raises(UserError, match=r"shape \(1, 16, 16\) of latents, expected \(1, 32, 32\)"):
        pixels.check(larger)


def test_latents_of_another_kind_are_refused(project: Path, params: Params) -> None:
    kl = load_params(SMOKE, [*OVERRIDES[:2], *OVERRIDES[3:]])
    with pytest.raises(UserError, match="with latents, expected what autoencoder.kind kl stores"):
        Latents.open(paths.LATENTS, kl)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("mean", np.zeros((1, 8, 8), "f4"), "mean or deviation of another shape"),
        ("mean", np.full((1, 16, 16), np.nan, "f4"), "not finite"),
        ("deviation", np.zeros((1, 16, 16), "f4"), "not above 0"),
        ("deviation", None, "without a data set deviation of its own"),
    ],
)
def test_damaged_normalization_is_refused(name: str, values: Any, message: str, project: Path, tmp_path: Path) -> None:
    path = tmp_path / "latents.h5"
    path.write_bytes(paths.LATENTS.read_bytes())
    with h5py.File(path, "r+") as file:
        del file[name]
        if values is not None:
            file[name] = values
    with pytest.raises(UserError, match=message):
        Latents.open(path)
