"""The reader of the latents file: it refuses what is incomplete, damaged or made with other settings."""

import copy as copying
import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from afm_pipe.data.latents import Latents
from afm_pipe.data.latents_format import CLASSES, DONE, LABELS, MOMENTS, read_provenance
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from benchmarks.inputs import latents_file
from tests.autoencoders.parts import changed, in_child

NUM_IMAGES = 60
VERSION_0_1 = Path(__file__).with_name("latents-0.1.h5")  # six images and their mirrors, encoded by afm-pipe 0.1


@pytest.fixture(scope="module")
def whole(discs: Path) -> Path:
    return discs / "data" / "latents.h5"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.h5"
    path.write_bytes(whole.read_bytes())
    return path


def test_a_file_of_version_0_1_is_read_as_it_is() -> None:
    latents = Latents.open(VERSION_0_1, autoencoder_sha256="a" * 64)
    assert (latents.num_images, latents.num_mirrors, latents.classes) == (6, 2, ("a", "b"))
    assert (latents.latent_shape, latents.spec.stochastic, latents.spec.scaling_factor) == ((2, 2, 2), True, 0.7)
    assert latents.fingerprint() == "f049750f9b8b96ab5a42ef9a419181ff14abd1fb6033e6e7ba518a9520667990"
    assert read_provenance(VERSION_0_1) == latents.provenance

    drawn = latents.draw(torch.tensor([4, 0, 5]), torch.Generator().manual_seed(7))
    first = [-0.910753071308136, 0.12522871792316437, 0.10196863859891891, -0.3560347557067871]
    np.testing.assert_allclose(drawn.flatten()[:4], first, rtol=1e-6)
    assert drawn.double().sum().item() == pytest.approx(8.896584026515484, rel=1e-6)


@pytest.mark.parametrize("kept", [0, 10, 600, 2_000, -1])
def test_file_cut_short_is_refused(kept: int, copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"copy\.h5 cut short.*dvc repro encode"):
        Latents.open(copy)


def test_missing_and_partial_files_are_refused(copy: Path) -> None:
    with pytest.raises(UserError, match="Found no .*none.h5"):
        Latents.open(copy.with_name("none.h5"))
    with h5py.File(copy, "r+") as file:
        file[DONE][3] = False
    with pytest.raises(UserError, match="partial, with 59 of 60"):
        Latents.open(copy)


def replace(path: Path, name: str, **options: object) -> None:
    with h5py.File(path, "r+") as file:
        data = file[name][:]
        del file[name]
        file.create_dataset(name, **({"data": data} | options))


def test_other_layouts_types_and_shapes_are_refused(copy: Path) -> None:
    original = copy.read_bytes()
    for name, options, message in [
        (MOMENTS, {"chunks": (1, 1, 8, 8, 8)}, "expected one contiguous"),
        (MOMENTS, {"dtype": "f4"}, "Found moments of float32"),
        (
            MOMENTS,
            {"data": np.zeros((NUM_IMAGES, 8, 8, 8), "f2")},
            r"Found moments of float16 and shape \(60, 8, 8, 8\)",
        ),
        (LABELS, {"data": np.zeros(3, "i8")}, "another shape than the 60 images"),
        (LABELS, {"data": np.full(NUM_IMAGES, 3)}, "labels outside the 3 classes"),
        (CLASSES, {"data": np.array([b"only"])}, "labels outside the 1 classes"),
    ]:
        copy.write_bytes(original)
        replace(copy, name, **options)
        with pytest.raises(UserError, match=message):
            Latents.open(copy)


def test_moments_of_another_file_are_refused(whole: Path, copy: Path) -> None:
    original = copy.read_bytes()
    with h5py.File(copy, "r+") as file:
        del file[MOMENTS]
        file[MOMENTS] = h5py.ExternalLink(str(whole), MOMENTS)
    with pytest.raises(UserError, match="without a data set moments of its own"):
        Latents.open(copy)

    copy.write_bytes(original)
    virtual = h5py.VirtualLayout((NUM_IMAGES, 1, 8, 8, 8), "f2")
    virtual[:] = h5py.VirtualSource(str(whole), MOMENTS, (NUM_IMAGES, 1, 8, 8, 8))
    with h5py.File(copy, "r+") as file:
        del file[MOMENTS]
        file.create_virtual_dataset(MOMENTS, virtual)
    with pytest.raises(UserError, match="expected one contiguous"):
        Latents.open(copy)


def test_latents_of_another_autoencoder_or_other_params_are_refused(whole: Path, discs_params: Params) -> None:
    params = discs_params
    with pytest.raises(UserError, match=f"sha256 [0-9a-f]{{64}}, expected {'b' * 64}"):
        Latents.open(whole, params, "b" * 64)
    for other, message in [
        (changed(params, "data", image_size=64), "with image_size 32, expected 64"),
        (changed(params, "data", orientation="apply"), "with orientation ignore, expected apply"),
        (changed(params, "autoencoder", latent_channels=8), r"shape \(4, 8, 8\), expected \(8, 8, 8\)"),
        (changed(params, "autoencoder", scaling_factor=0.18215), r"with scaling_factor \d.*, expected 0.18215"),
        (changed(params, "encode", precision="bf16"), "with precision fp32, expected bf16"),
    ]:
        with pytest.raises(UserError, match=message):
            Latents.open(whole, other)


def test_reader_survives_pickling_and_forking(whole: Path) -> None:
    latents = Latents.open(whole)
    expected = latents.read([3, 20], [0, 0])
    content = pickle.dumps(latents)
    assert len(content) < 5_000  # by path, not by content
    assert torch.equal(pickle.loads(content).read([3, 20], [0, 0]), expected)

    def read() -> None:
        assert torch.equal(latents.read([3, 20], [0, 0]), expected)

    assert in_child(read) == 0


def test_rows_the_kernel_has_dropped_are_read_again(tmp_path: Path) -> None:
    latents = latents_file(tmp_path / "latents.h5", 600, (4, 8, 8))  # rows of 1 KB, that begin anywhere in a page
    with h5py.File(latents.path) as file:
        expected = file["moments"][:].astype(np.float32)[:, 0]
    indices = np.random.default_rng(0).permutation(600)
    for dropped in (False, True):
        if dropped:
            with latents.path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = copying.copy(latents).read(indices, np.zeros(600, np.int64))
        np.testing.assert_array_equal(found, expected[indices])


def test_fingerprint_follows_the_provenance(whole: Path, copy: Path) -> None:
    assert Latents.open(copy).fingerprint() == Latents.open(whole).fingerprint()
    with h5py.File(copy, "r+") as file:
        file.attrs["manifest_digest"] = "0" * 64
    assert Latents.open(copy).fingerprint() != Latents.open(whole).fingerprint()
