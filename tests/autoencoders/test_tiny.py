"""Kind tiny: a pretrained AutoencoderTiny, from fetching to an exported pipeline."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from afm_pipe import pipeline
from afm_pipe.autoencoders import load_autoencoder
from afm_pipe.autoencoders.diffusers_folder import fetch_pretrained
from afm_pipe.autoencoders.hub import CONFIG, WEIGHTS
from afm_pipe.autoencoders.tiny import TinyAutoencoder
from afm_pipe.data.images import center_crop
from afm_pipe.data.latents import Latents
from afm_pipe.data.manifest import read_manifest
from afm_pipe.data.reading import build_manifest, read_images
from afm_pipe.distributed.launch import Launch
from afm_pipe.evaluation.measures import psnr, squared_errors
from afm_pipe.models.exports import TAESD_LICENSE
from afm_pipe.params import Imported, Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, sha256_file
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.requests import Request
from tests.assets import CLOTHING, TAESD, TAESD_SHA256, needs_clothing, needs_taesd
from tests.autoencoders.parts import tiny_vae
from tests.conftest import DISCS, ROOT, SMOKE, write_images

SMALL = "{kind: tiny, latent_channels: 4, downsample: 4, scaling_factor: %s, pretrained: %s, sha256: %s}"
PRETRAINED = (f"autoencoder.pretrained={TAESD}", "autoencoder.scaling_factor=1.0")
LAUNCH = Launch(device="cpu")


def untrained(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """Write an untrained AutoencoderTiny of gray images, 4 pixels a latent, as diffusers does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
        blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
        AutoencoderTiny(**{"in_channels": 1, "out_channels": 1, **widths, **blocks, **fields}).save_pretrained(folder)
    return folder


def small_params(pretrained: Path, scaling_factor: object = 1.0, sha256: str | None = None) -> Params:
    kind = SMALL % (scaling_factor, pretrained, sha256 or sha256_file(pretrained / WEIGHTS))
    sizes = ("evaluate.samples=30", "evaluate.kid_subset_size=10", "reference.classifier.epochs=1")
    phases = ("train.batch_size=8", "runs.t4.phases=[{until_epoch: 1}]")
    return load_params(SMOKE, [*DISCS[:2], f"autoencoder={kind}", "data.mirror=true", *phases, *sizes])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("tiny") / "vae")


@pytest.fixture(scope="module")
def project(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project in which every stage has run with a measured scaling factor, as the working directory."""
    before, folder, params = Path.cwd(), tmp_path_factory.mktemp("project"), small_params(weights, "measured")
    os.chdir(folder)
    write_images(folder / "data" / "images", classes=2, per_class=15)
    pipeline.prepare(params)
    for stage in (pipeline.autoencoder, pipeline.encode, pipeline.reference):
        stage(params, LAUNCH)
    for stage in (pipeline.train, pipeline.sample, pipeline.evaluate):
        stage(params, "t4", LAUNCH)
    yield folder
    os.chdir(before)


@pytest.fixture
def params(weights: Path) -> Params:
    return small_params(weights, "measured")


def real_images() -> Tensor:
    manifest = read_manifest(paths.MANIFEST)
    data = load_params(SMOKE, DISCS[:2]).data
    return torch.from_numpy(read_images(manifest, data, range(manifest.num_images)))


def test_latents_of_both_mirrors_are_those_of_diffusers_over_their_deviation(project: Path, params: Params) -> None:
    theirs = AutoencoderTiny.from_pretrained(str(paths.AUTOENCODER), low_cpu_mem_usage=False)
    images = real_images().float() / 127.5 - 1
    with torch.no_grad():
        expected = torch.stack([theirs.encode(side).latents for side in (images, images.flip(-1))], dim=1)
    with h5py.File(paths.LATENTS) as file:
        stored = torch.from_numpy(file["latents"][:]).float()
    assert stored.shape == (30, 2, 4, 8, 8)
    torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-3)  # float16
    drawn = Latents.open(paths.LATENTS, params).draw(torch.arange(30), torch.Generator())
    assert drawn.std().item() == pytest.approx(1, abs=0.05)
    assert theirs.config.scaling_factor == pytest.approx(1 / expected[:, 0].std().item(), rel=1e-3)


def test_weights_are_copied_byte_for_byte(project: Path, weights: Path) -> None:
    assert paths.AUTOENCODER_WEIGHTS.read_bytes() == (weights / WEIGHTS).read_bytes()
    assert sorted(path.name for path in paths.AUTOENCODER.iterdir()) == [CONFIG, WEIGHTS]


def test_samples_and_tables_say_who_decoded_them(
    project: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.sample(params, "t4", LAUNCH, request(project / "grid.png"))
    assert "t4: decoded by TAESD." in capsys.readouterr().out
    assert read_json(paths.metrics("t4"))["protocol"]["decoder"] == "TAESD"
    assert load_params(SMOKE).autoencoder.decoder is None


def request(grid: Path) -> Request:
    return Request(grid=grid, per_class=1)


def test_psnr_of_reconstructions_is_reported_both_ways(project: Path, params: Params) -> None:
    summary, vae = read_json(paths.REFERENCE / "summary.json"), load_autoencoder(params, paths.AUTOENCODER)
    images = real_images()
    rebuilt = vae.spec.to_uint8(vae.decode(vae.spec.normalize(vae.encode(images))))
    mse = (images.double() - rebuilt.double()).square().mean(dim=(1, 2, 3)).numpy()
    assert summary["psnr_reconstruction"] == pytest.approx(np.mean(10 * np.log10(255**2 / mse)), abs=1e-3)
    assert summary["psnr_of_mse_reconstruction"] == pytest.approx(10 * np.log10(255**2 / mse.mean()), abs=1e-3)
    assert summary["psnr_of_mse_reconstruction"] < summary["psnr_reconstruction"]


def test_psnr_against_closed_forms() -> None:
    black, gray = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
    gray[1] = 255
    each, of_mse = psnr(squared_errors(black, gray))
    assert each == pytest.approx((20 * np.log10(5) + 0) / 2)
    assert of_mse == pytest.approx(-10 * np.log10((1 / 25 + 1) / 2))
    assert psnr(squared_errors(black, black)) == (None, None)


def test_exported_pipeline_decodes_with_it(project: Path, params: Params) -> None:
    pipeline.export("t4", "diffusers", project / "exported", params)
    vae = project / "exported" / "vae"
    assert (vae / WEIGHTS).read_bytes() == paths.AUTOENCODER_WEIGHTS.read_bytes()
    assert (vae / "LICENSE").read_text() == TAESD_LICENSE
    assert "Ollin Boer Bohan" in TAESD_LICENSE
    card = (project / "exported" / "README.md").read_text()
    assert "| decoder | AutoencoderTiny (TAESD), MIT License: vae/LICENSE |" in card
    assert "| decoded by | TAESD |" in card
    assert "(TAESD: `vae/LICENSE`)" in card
    pipe = DiffusionPipeline.from_pretrained(
        str(project / "exported"), custom_pipeline=str(project / "exported"), trust_remote_code=True
    )
    assert type(pipe.vae) is AutoencoderTiny
    theirs = pipe([0, 1], seed=3, output_type="pt").images
    latents = pipe([0, 1], seed=3, output_type="latent").images
    torch.testing.assert_close(load_autoencoder(params, paths.AUTOENCODER).decode(latents), theirs, rtol=0, atol=1e-5)


def test_an_imported_generator_is_decoded_by_it(project: Path, params: Params) -> None:
    pipeline.export("t4", "released", project / "out.pth")
    names = project / "classes.txt"
    names.write_text("class0\nclass1\n")
    pipeline.import_weights(params, "back", Imported(file=str(project / "out.pth"), classes=str(names)))
    pipeline.sample(params, "back", LAUNCH, request(project / "back.png"))
    pipeline.sample(params, "t4", LAUNCH, request(project / "again.png"))
    assert (project / "back.png").read_bytes() == (project / "again.png").read_bytes()


def test_a_file_of_the_other_kind_is_refused_before_it_is_read(
    weights: Path, smoke_params: Params, tmp_path: Path
) -> None:
    kl = tmp_path / "kl"
    tiny_vae().save(kl)
    (kl / WEIGHTS).write_bytes(b"never read")
    with pytest.raises(UserError, match=r"of AutoencoderKL, expected AutoencoderTiny .* set autoencoder.kind: kl"):
        fetch_pretrained(small_params(kl), tmp_path / "made", TinyAutoencoder)
    assert not (tmp_path / "made").exists()
    with pytest.raises(UserError, match=r"of AutoencoderTiny, expected AutoencoderKL .* set autoencoder.kind: tiny"):
        load_autoencoder(smoke_params, weights)
    other = Path(shutil.copytree(weights, tmp_path / "other"))
    (other / CONFIG).write_text(json.dumps({"_class_name": "AutoencoderDC"}))
    with pytest.raises(UserError, match=r"of AutoencoderDC, expected AutoencoderTiny .* use another one"):
        load_autoencoder(small_params(weights), other)


def test_truncated_and_foreign_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(weights, tmp_path / "cut"))
    (cut / WEIGHTS).write_bytes((weights / WEIGHTS).read_bytes()[:-100])
    expected = sha256_file(weights / WEIGHTS)
    with pytest.raises(UserError, match=f"with sha256 {sha256_file(cut / WEIGHTS)}, expected {expected}"):
        fetch_pretrained(small_params(cut, sha256=expected), tmp_path / "made", TinyAutoencoder)
    with pytest.raises(UserError, match="unreadable as AutoencoderTiny"):
        fetch_pretrained(small_params(cut), tmp_path / "made", TinyAutoencoder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_channels": 16}, r"shape \(16, 8, 8\) of latents, expected \(4, 8, 8\)"),
        ({"in_channels": 3}, "3 image channels, expected 1"),
        ({"shift_factor": 0.5}, "with shift_factor"),
    ],
)
def test_another_latent_space_than_params_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = untrained(tmp_path / "vae", **fields)
    with pytest.raises(UserError, match=message):
        fetch_pretrained(small_params(folder), tmp_path / "made", TinyAutoencoder)
    assert not (tmp_path / "made").exists()


def test_latents_of_another_network_or_kind_are_refused(project: Path, params: Params, tmp_path: Path) -> None:
    other = untrained(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made with an autoencoder of sha256"):
        Latents.open(paths.LATENTS, params, sha256_file(other / WEIGHTS))
    with pytest.raises(UserError, match=r"with latents, expected what autoencoder\.kind kl stores"):
        Latents.open(paths.LATENTS, load_params(SMOKE, [*DISCS[:2], "data.mirror=true"]))


def test_params_need_weights_and_their_hash(weights: Path) -> None:
    for field in ("pretrained", "sha256"):
        with pytest.raises(UserError, match=f"autoencoder.{field}"):
            load_params(SMOKE, [f"autoencoder={SMALL % (1.0, weights, '0' * 64)}", f"autoencoder.{field}=null"])


@needs_taesd
@needs_clothing
def test_taesd_on_photographs_is_that_of_diffusers(tmp_path: Path) -> None:
    params = photo_params()
    fetch_pretrained(params, tmp_path / "vae", TinyAutoencoder)
    vae, images = load_autoencoder(params, tmp_path / "vae"), photographs(params, 100)
    theirs = AutoencoderTiny.from_pretrained(str(TAESD), low_cpu_mem_usage=False, torch_dtype=torch.float32).eval()
    errors = []
    for batch in images.split(50):
        ours = vae.decode(vae.sample(vae.encode(batch), torch.empty(0)))
        with torch.no_grad():
            expected = theirs.decode(theirs.encode(batch.float() / 127.5 - 1).latents).sample.clamp(-1, 1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        errors.append(squared_errors(batch, vae.spec.to_uint8(ours)))
    each, of_mse = psnr(torch.cat(errors))
    assert each is not None and 23 < each < 24.5
    assert of_mse is not None and 21.5 < of_mse < each


@needs_taesd
def test_taesd_is_the_network_of_its_hash() -> None:
    assert sha256_file(TAESD / WEIGHTS) == TAESD_SHA256
    assert sum(tensor.numel() for tensor in load_file(TAESD / WEIGHTS).values()) == 2_445_063


def photo_params() -> Params:
    return load_params(ROOT / "profiles" / "photos64.yaml", [f"data.root={CLOTHING}", *PRETRAINED])


def photographs(params: Params, count: int) -> Tensor:
    """Return photographs (N, 3, 64, 64) spread over the set."""
    manifest = track("prepare", build_manifest(params.data))
    chosen = np.linspace(0, manifest.num_images - 1, count).astype(int)
    return torch.from_numpy(read_images(manifest, params.data, chosen.tolist()))


JPEGS = 20
ORIENTATIONS = range(1, 9)


def scene(index: int, width: int, height: int) -> Image.Image:
    """Return a smooth color scene with edges: gradients, a disc, a stripe, and a little grain."""
    random = np.random.default_rng(index)
    y, x = np.mgrid[:height, :width] / max(height, width)
    tint = random.uniform(40, 215, (2, 3))
    pixels = tint[0] + (tint[1] - tint[0]) * (x * random.uniform(0.3, 1) + y * random.uniform(0.3, 1))[..., None]
    pixels += 25 * np.sin(2 * np.pi * (x * random.uniform(2, 6) + y * random.uniform(2, 6)))[..., None]
    center, color = random.uniform(0.25, 0.6, 2), random.uniform(0, 255, (2, 3))
    pixels[(x - center[0]) ** 2 + (y - center[1]) ** 2 < 0.03] = color[0]
    pixels[np.abs(x - y * random.uniform(0.3, 1) - 0.1) < 0.03] = color[1]
    return Image.fromarray((pixels + random.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8))


def write_jpegs(folder: Path) -> None:
    """Write JPEGs as cameras and scanners do: every EXIF orientation, CMYK, gray, large, small, wide and tall."""
    sizes = [(640, 480), (480, 640), (4000, 3000), (300, 260), (1600, 400), (257, 1200)]
    for index in range(JPEGS):
        image = scene(index, *sizes[index % len(sizes)])
        exif = Image.Exif()
        exif[0x0112] = ORIENTATIONS[index % 8]
        image = image.convert({3: "CMYK", 9: "L", 15: "CMYK"}.get(index, "RGB"))
        path = folder / f"class{index % 2}" / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92, exif=exif, progressive=index % 5 == 4)


@pytest.mark.slow
@needs_taesd
def test_jpegs_of_any_kind_go_through_taesd_at_256_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jpegs(tmp_path / "images")
    settings = ["data.source=folder", f"data.root={tmp_path / 'images'}", "data.image_size=256", "data.min_images=20"]
    params = load_params(ROOT / "profiles" / "photos64.yaml", [*PRETRAINED, *settings, "data.orientation=apply"])
    manifest = track("prepare", build_manifest(params.data))
    assert manifest.oriented == sum(ORIENTATIONS[index % 8] != 1 for index in range(JPEGS))
    fetch_pretrained(params, tmp_path / "vae", TinyAutoencoder)
    vae, images = (
        load_autoencoder(params, tmp_path / "vae"),
        torch.from_numpy(read_images(manifest, params.data, range(JPEGS))),
    )
    turned = scene(1, 480, 640).transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # of orientation 2
    upright = np.asarray(center_crop(turned, 256)).astype(int)
    place = manifest.paths.index("class1/01.jpg")
    assert np.abs(images[place].permute(1, 2, 0).numpy().astype(int) - upright).mean() < 4  # JPEG's loss
    rebuilt = []
    for batch in images.split(5):
        rebuilt.append(vae.spec.to_uint8(vae.decode(vae.sample(vae.encode(batch), torch.empty(0)))))
    each, of_mse = psnr(squared_errors(images, torch.cat(rebuilt)))
    with capsys.disabled():
        print(
            f"\nPSNR of {JPEGS} JPEGs at 256 pixels through TAESD: {each:.2f} dB, {of_mse:.2f} dB from the mean error."
        )
    assert each is not None and each > 24
