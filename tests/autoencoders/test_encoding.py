"""Encoding: what it stores, and that it survives being killed at any moment."""

import os
import resource
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from afm_pipe.autoencoders import encoding
from afm_pipe.autoencoders.encoding import encode_dataset
from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.data.latents import Latents
from afm_pipe.data.latents_format import DONE, MOMENTS
from afm_pipe.data.manifest import Manifest
from afm_pipe.data.reading import build_manifest, load_images
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.autoencoders.parts import SHA256, changed, in_child, tiny_vae, unfinished
from tests.conftest import write_images

NUM_IMAGES = 21  # 3 batches of 8, the last padded


@pytest.fixture(scope="module")
def params(smoke_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Params:
    root = tmp_path_factory.mktemp("data") / "images"
    write_images(root, classes=3, per_class=NUM_IMAGES // 3)
    data = changed(smoke_params, "data", source="folder", root=str(root), min_images=1)
    return changed(data, "encode", batch_size=8)


@pytest.fixture(scope="module")
def manifest(params: Params) -> Manifest:
    return track("prepare", build_manifest(params.data))


@pytest.fixture(scope="module")
def vae() -> KLAutoencoder:
    return tiny_vae()


@pytest.fixture(scope="module")
def whole(params: Params, manifest: Manifest, vae: KLAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    track("encode", encode_dataset(params, manifest, vae, SHA256, folder / "latents.h5", folder / "work"))
    assert unfinished(folder / "work") == []
    return folder / "latents.h5"


def test_moments_are_the_autoencoders(whole: Path, params: Params, manifest: Manifest, vae: KLAutoencoder) -> None:
    latents = Latents.open(whole, params, SHA256)
    images = torch.from_numpy(track("load", load_images(manifest, params.data)))
    encoded = vae.encode(images)
    indices = torch.tensor([20, 0, 7, 0])
    found = latents.read(indices, torch.zeros(4, dtype=torch.int64))
    assert found.shape == (4, 8, 8, 8)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, encoded[indices], rtol=2e-3, atol=1e-4)  # float16
    assert (latents.num_images, latents.num_classes, latents.num_mirrors) == (NUM_IMAGES, 3, 1)
    assert latents.latent_shape == (4, 8, 8)
    assert latents.spec.scaling_factor == 0.7
    assert latents.classes == manifest.classes
    np.testing.assert_array_equal(latents.labels, manifest.labels)


def test_mirrored_images_are_encoded_not_flipped_latents(
    params: Params, manifest: Manifest, vae: KLAutoencoder, tmp_path: Path
) -> None:
    mirrored = changed(params, "data", mirror=True)
    path = tmp_path / "latents.h5"
    track("encode", encode_dataset(mirrored, manifest, vae, SHA256, path, tmp_path / "work"))
    latents = Latents.open(path, mirrored, SHA256)
    images = torch.from_numpy(track("load", load_images(manifest, params.data)))
    for mirror, side in enumerate([images, images.flip(-1)]):
        found = latents.read(np.arange(NUM_IMAGES), np.full(NUM_IMAGES, mirror))
        torch.testing.assert_close(found, vae.encode(side), rtol=2e-3, atol=1e-4)
    with pytest.raises(UserError, match="with mirror true, expected false"):
        Latents.open(path, params)


def test_file_is_one_contiguous_uncompressed_block_with_its_provenance(whole: Path, manifest: Manifest) -> None:
    with h5py.File(whole) as file:
        assert file[MOMENTS].dtype == np.float16
        assert file[MOMENTS].shape == (NUM_IMAGES, 1, 8, 8, 8)
        assert file[MOMENTS].chunks is None
        assert file[DONE][:].all()
    assert Latents.open(whole).provenance == {
        "format_version": "1",
        "vae_sha256": SHA256,
        "scaling_factor": "0.7",
        "crop": "adm",
        "input_range": "[-1, 1]",
        "image_size": "32",
        "channels": "1",
        "mirror": "false",
        "precision": "fp32",
        "batch_size": "8",
        "image_count": str(NUM_IMAGES),
        "manifest_digest": manifest.digest,
    }


def test_encoding_killed_at_any_step_ends_in_the_same_bytes(
    whole: Path, params: Params, manifest: Manifest, vae: KLAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, work = tmp_path / "latents.h5", tmp_path / "work"
    real_mark = encoding._RowWriter.mark

    def encode(moment: str) -> None:
        def mark(self: encoding._RowWriter) -> None:
            if moment == "before marking":
                os.kill(os.getpid(), signal.SIGKILL)
            real_mark(self)
            if moment == "after marking":
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(encoding._RowWriter, "mark", mark)
        for tick in encode_dataset(params, manifest, vae, SHA256, path, work):
            if moment == "at once" or (moment == "after a batch" and tick.done and not tick.facts):
                os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encoding, "SECONDS_BETWEEN_SYNCS", 0.0)
    for moment in ["at once", "before marking", "after marking", "before marking", "after a batch"]:
        assert in_child(lambda: encode(moment)) == -signal.SIGKILL  # noqa: B023
        assert not path.exists()
    ticks = list(encode_dataset(params, manifest, vae, SHA256, path, work))
    assert (ticks[0].done, ticks[0].facts) == (16, "resumed")
    assert path.read_bytes() == whole.read_bytes()
    assert unfinished(work) == []


def test_every_forward_pass_has_the_full_batch_size(
    params: Params, manifest: Manifest, vae: KLAutoencoder, tmp_path: Path
) -> None:
    sizes = []
    hook = vae.model.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    track("encode", encode_dataset(params, manifest, vae, SHA256, tmp_path / "latents.h5", tmp_path / "work"))
    hook.remove()
    assert sizes == [8, 8, 8]


def test_two_encodings_in_one_folder_are_refused(
    params: Params, manifest: Manifest, vae: KLAutoencoder, tmp_path: Path
) -> None:
    first, second = (encode_dataset(params, manifest, vae, SHA256, tmp_path / "latents.h5", tmp_path) for _ in range(2))
    next(first)
    with pytest.raises(UserError, match="expected a free folder"):
        next(second)
    first.close()


def test_partial_file_of_other_provenance_is_neither_resumed_nor_removed(
    whole: Path, params: Params, manifest: Manifest, vae: KLAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SECONDS_BETWEEN_SYNCS", 0.0)
    path, work = tmp_path / "latents.h5", tmp_path / "work"
    interrupted = encode_dataset(params, manifest, tiny_vae(1), "b" * 64, path, work)
    assert [next(interrupted).done for _ in range(3)] == [0, 8, 16]
    interrupted.close()
    (other,) = unfinished(work)
    before = other.read_bytes()
    ticks = list(encode_dataset(params, manifest, vae, SHA256, path, work))
    assert ticks[0].done == 0
    assert path.read_bytes() == whole.read_bytes()
    assert unfinished(work) == [other]
    assert other.read_bytes() == before


def test_non_finite_moments_stop_the_encoding_and_name_the_image(
    params: Params, manifest: Manifest, tmp_path: Path
) -> None:
    vae = tiny_vae()
    vae.model.quant_conv.weight *= 1e9  # beyond float16
    with pytest.raises(UserError, match=r"class0/000\.png not finite"):
        track("encode", encode_dataset(params, manifest, vae, SHA256, tmp_path / "latents.h5", tmp_path / "work"))
    assert not (tmp_path / "latents.h5").exists()


@pytest.mark.parametrize(("limit", "ticks_before"), [(3_000, 0), (15_000, 0), (15_000, 1), (20_000, 2)])
def test_full_disk_is_a_user_error_and_encoding_goes_on_when_there_is_room(
    limit: int,
    ticks_before: int,
    whole: Path,
    params: Params,
    manifest: Manifest,
    vae: KLAutoencoder,
    tmp_path: Path,
) -> None:
    path, work = tmp_path / "latents.h5", tmp_path / "work"

    def encode() -> None:
        ticks = encode_dataset(params, manifest, vae, SHA256, path, work)
        for _ in range(ticks_before):
            next(ticks)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(UserError, match="run the same command again to resume"):
            list(ticks)

    assert in_child(encode) == 0
    assert not path.exists()
    list(encode_dataset(params, manifest, vae, SHA256, path, work))
    assert path.read_bytes() == whole.read_bytes()
