"""The latents file: encoding that survives being killed, and a reader that refuses what is not whole or not ours."""

import copy as copying
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from afm_pipe.autoencoders import encoding
from afm_pipe.autoencoders.encoding import encode_dataset
from afm_pipe.autoencoders.kl import encode_moments
from afm_pipe.data.latents import CLASSES, DONE, LABELS, MOMENTS, Latents
from afm_pipe.data.manifest import Manifest, build_manifest, load_images
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from benchmarks.inputs import latents_file
from tests.conftest import write_images

SHA256 = "a" * 64
NUM_IMAGES = 21  # 3 batches of 8, the last padded


def changed(params: Params, section: str, **fields: object) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=fields)})


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            mid_block_add_attention=False,
            scaling_factor=0.7,
        )
    return vae.eval().requires_grad_(False)


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
def vae() -> AutoencoderKL:
    return tiny_vae()


@pytest.fixture(scope="module")
def whole(params: Params, manifest: Manifest, vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    track("encode", encode_dataset(params, manifest, vae, SHA256, folder / "latents.h5", folder / "work"))
    assert unfinished(folder / "work") == []
    return folder / "latents.h5"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.h5"
    path.write_bytes(whole.read_bytes())
    return path


def unfinished(work_dir: Path) -> list[Path]:
    return [path for path in work_dir.iterdir() if path.name != "lock"]


def in_child(work: Callable[[], None]) -> int | None:
    """Run `work` in a forked process; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_moments_are_the_autoencoders(whole: Path, params: Params, manifest: Manifest, vae: AutoencoderKL) -> None:
    latents = Latents.open(whole, params, SHA256)
    images = torch.from_numpy(track("load", load_images(manifest, params.data)))
    mean, std = encode_moments(vae, images, "fp32")
    indices = torch.tensor([20, 0, 7, 0])
    found_mean, found_std = latents.moments(indices, torch.zeros(4, dtype=torch.int64))
    assert found_mean.shape == (4, 4, 8, 8)
    assert found_mean.dtype == found_std.dtype == torch.float32
    torch.testing.assert_close(found_mean, mean[indices], rtol=2e-3, atol=1e-4)  # float16
    torch.testing.assert_close(found_std, std[indices], rtol=2e-3, atol=1e-4)
    assert (latents.num_images, latents.num_classes, latents.num_mirrors) == (NUM_IMAGES, 3, 1)
    assert latents.latent_shape == (4, 8, 8)
    assert latents.scaling_factor == 0.7
    assert latents.classes == manifest.classes
    np.testing.assert_array_equal(latents.labels, manifest.labels)


def test_mirrored_images_are_encoded_not_flipped_latents(
    params: Params, manifest: Manifest, vae: AutoencoderKL, tmp_path: Path
) -> None:
    mirrored = changed(params, "data", mirror=True)
    path = tmp_path / "latents.h5"
    track("encode", encode_dataset(mirrored, manifest, vae, SHA256, path, tmp_path / "work"))
    latents = Latents.open(path, mirrored, SHA256)
    images = torch.from_numpy(track("load", load_images(manifest, params.data)))
    for mirror, side in enumerate([images, images.flip(-1)]):
        mean, _ = latents.moments(np.arange(NUM_IMAGES), np.full(NUM_IMAGES, mirror))
        torch.testing.assert_close(mean, encode_moments(vae, side, "fp32")[0], rtol=2e-3, atol=1e-4)
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
    whole: Path, params: Params, manifest: Manifest, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, work = tmp_path / "latents.h5", tmp_path / "work"
    real_mark = encoding._mark

    def encode(moment: str) -> None:
        def mark(*arguments: object) -> None:
            if moment == "before marking":
                os.kill(os.getpid(), signal.SIGKILL)
            real_mark(*arguments)
            if moment == "after marking":
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(encoding, "_mark", mark)
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
    params: Params, manifest: Manifest, vae: AutoencoderKL, tmp_path: Path
) -> None:
    sizes = []
    hook = vae.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    track("encode", encode_dataset(params, manifest, vae, SHA256, tmp_path / "latents.h5", tmp_path / "work"))
    hook.remove()
    assert sizes == [8, 8, 8]


def test_two_encodings_in_one_folder_are_refused(
    params: Params, manifest: Manifest, vae: AutoencoderKL, tmp_path: Path
) -> None:
    first, second = (encode_dataset(params, manifest, vae, SHA256, tmp_path / "latents.h5", tmp_path) for _ in range(2))
    next(first)
    with pytest.raises(UserError, match="expected it free"):
        next(second)
    first.close()


def test_partial_file_of_other_provenance_is_started_again(
    whole: Path, params: Params, manifest: Manifest, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SECONDS_BETWEEN_SYNCS", 0.0)
    path, work = tmp_path / "latents.h5", tmp_path / "work"
    interrupted = encode_dataset(params, manifest, tiny_vae(1), "b" * 64, path, work)
    assert [next(interrupted).done for _ in range(3)] == [0, 8, 16]
    interrupted.close()
    assert len(unfinished(work)) == 1
    ticks = list(encode_dataset(params, manifest, vae, SHA256, path, work))
    assert ticks[0].done == 0
    assert path.read_bytes() == whole.read_bytes()
    assert unfinished(work) == []


def test_non_finite_moments_stop_the_encoding_and_name_the_image(
    params: Params, manifest: Manifest, tmp_path: Path
) -> None:
    vae = tiny_vae()
    vae.quant_conv.weight *= 1e9  # beyond float16
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
    vae: AutoencoderKL,
    tmp_path: Path,
) -> None:
    path, work = tmp_path / "latents.h5", tmp_path / "work"

    def encode() -> None:
        ticks = encode_dataset(params, manifest, vae, SHA256, path, work)
        for _ in range(ticks_before):
            next(ticks)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(UserError, match="it goes on where it stopped"):
            list(ticks)

    assert in_child(encode) == 0
    assert not path.exists()
    list(encode_dataset(params, manifest, vae, SHA256, path, work))
    assert path.read_bytes() == whole.read_bytes()


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
    with pytest.raises(UserError, match="partial, with 20 of 21"):
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
            r"Found moments of float16 and shape \(21, 8, 8, 8\)",
        ),
        (LABELS, {"data": np.zeros(3, "i8")}, "another shape than the 21 images"),
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


def test_latents_of_another_autoencoder_or_other_params_are_refused(whole: Path, params: Params) -> None:
    with pytest.raises(UserError, match=f"sha256 {SHA256}, expected the one of {'b' * 64}"):
        Latents.open(whole, params, "b" * 64)
    for other, message in [
        (changed(params, "data", image_size=64), "with image_size 32, expected 64"),
        (changed(params, "autoencoder", latent_channels=8), r"shape \(4, 8, 8\), expected \(8, 8, 8\)"),
        (changed(params, "autoencoder", scaling_factor=0.18215), "with scaling_factor 0.7, expected 0.18215"),
        (changed(params, "encode", precision="bf16"), "with precision fp32, expected bf16"),
    ]:
        with pytest.raises(UserError, match=message):
            Latents.open(whole, other, SHA256)


def test_reader_survives_pickling_and_forking(whole: Path) -> None:
    latents = Latents.open(whole)
    expected, _ = latents.moments([3, 20], [0, 0])
    content = pickle.dumps(latents)
    assert len(content) < 5_000  # by path, not by content
    assert torch.equal(pickle.loads(content).moments([3, 20], [0, 0])[0], expected)

    def read() -> None:
        assert torch.equal(latents.moments([3, 20], [0, 0])[0], expected)

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
        mean, std = copying.copy(latents).moments(indices, np.zeros(600, np.int64))
        np.testing.assert_array_equal(torch.cat([mean, std], 1), expected[indices])


def test_fingerprint_follows_the_provenance(whole: Path, copy: Path) -> None:
    assert Latents.open(copy).fingerprint() == Latents.open(whole).fingerprint()
    with h5py.File(copy, "r+") as file:
        file.attrs["manifest_digest"] = "0" * 64
    assert Latents.open(copy).fingerprint() != Latents.open(whole).fingerprint()
