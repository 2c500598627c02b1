"""Kind representation: the feature map of a frozen encoder, from its normalization to samples of a run.

Most tests use a small random network with EfficientNet-Lite0's layout; those of the real networks need their packages.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afm_pipe import pipeline
from afm_pipe.autoencoders import encoders, load_autoencoder
from afm_pipe.autoencoders.decoder import Decoder, build_decoder
from afm_pipe.autoencoders.encoders import TIMM_MODELS, Encoder
from afm_pipe.autoencoders.representation import RepresentationAutoencoder, measured_normalization
from afm_pipe.data.latents import Latents
from afm_pipe.data.manifest import read_manifest
from afm_pipe.data.reading import read_images
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.planning.plan import Machine, plan_text
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, sha256_file
from afm_pipe.runtime.progress import track
from tests.conftest import DISCS, SMOKE, write_images

EFFICIENTNET = encoders.efficientnet_lite0
LAUNCH = Launch(device="cpu")
TRAIN = "{widths: [16, 8, 8, 8], noise: 0.0, lr: 2.0e-3, batch_size: 8, updates: %d}"
KIND = "autoencoder={kind: representation, encoder: %s, layer: %d, input_size: %d, sha256: %s, train: %s}"


class StandIn(nn.Module):
    """Strides and channels of EfficientNet-Lite0's first five blocks, in single convolutions of random weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0, self._swish = nn.Conv2d(3, 32, 3, 2, 1), nn.Identity(), nn.ReLU6()
        shapes = ((32, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1))
        self._blocks = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in shapes)


def stand_in(seed: int = 0) -> tuple[Any, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StandIn().eval(), str(seed) * 64


def small_params(*more: str, updates: int = 60) -> Params:
    kind = KIND % ("efficientnet_lite0", 5, 64, "null", TRAIN % updates)
    sizes = ("evaluate.samples=30", "evaluate.kid_subset_size=10", "reference.classifier.epochs=1")
    size = ("data.image_size=64", "data.mirror=true", "train.size=t1", "study.base.size=t1")
    phases = ("train.batch_size=8", "runs.t4.phases=[{until_epoch: 1}]")
    return load_params(SMOKE, [*DISCS[:2], kind, *size, *phases, *sizes, *more])


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "efficientnet_lite0", lambda otherwise: stand_in())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project in which every stage has run, as the working directory."""
    before, folder, params = Path.cwd(), tmp_path_factory.mktemp("project"), small_params()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoders, "efficientnet_lite0", lambda otherwise: stand_in())
        write_images(folder / "data" / "images", classes=2, per_class=15)
        pipeline.prepare(params)
        for stage in (pipeline.autoencoder, pipeline.encode, pipeline.reference):
            stage(params, LAUNCH)
        for each in (pipeline.train, pipeline.sample, pipeline.evaluate):
            each(params, "t4", LAUNCH)
    yield folder
    os.chdir(before)


def real_images() -> Tensor:
    manifest = read_manifest(paths.MANIFEST)
    return torch.from_numpy(read_images(manifest, small_params().data, range(manifest.num_images)))


def maps_of(images: Tensor) -> Tensor:
    """Feature maps (N, c, h, w), in a few lines of their own."""
    network, x = stand_in()[0], images.float().expand(-1, 3, -1, -1) / 127.5 - 1
    with torch.no_grad():
        x = network._conv_stem(x).clamp(0, 6)
        for block in network._blocks:
            x = block(x)
    return x


def test_latents_are_maps_normalized_per_element_over_both_mirrors(project: Path) -> None:
    images = real_images()
    expected = torch.stack([maps_of(side) for side in (images, images.flip(-1))], dim=1)  # (N, 2, c, h, w)
    with h5py.File(paths.LATENTS) as file:
        stored = torch.from_numpy(file["latents"][:]).float()
        mean, deviation = file["mean"][:], file["deviation"][:]
    assert stored.shape == (30, 2, 40, 8, 8)
    torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-3)  # float16
    each = expected.flatten(0, 1).double()
    np.testing.assert_allclose(mean, each.mean(0), atol=1e-5)
    std = each.std(0, correction=0)
    np.testing.assert_allclose(deviation, std.clamp(min=0.01 * std.mean()), rtol=1e-4)
    drawn = Latents.open(paths.LATENTS, small_params()).draw(torch.arange(30), torch.Generator())
    assert drawn.std().item() == pytest.approx(1, abs=0.1)


def test_an_element_that_does_not_vary_is_not_amplified() -> None:
    class Halved(nn.Module):
        name, shift = "halved", torch.zeros(1)

        def forward(self, pixels: Tensor) -> Tensor:
            return torch.cat([pixels, torch.full_like(pixels, 3.0)], dim=1)

    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    mean, std = track("normalization", measured_normalization(Halved(), images, mirror=False))  # type: ignore[arg-type]
    assert mean[1].eq(3).all() and (std[1] / std[0].mean()).allclose(torch.tensor(0.005), rtol=1e-3)
    with pytest.raises(UserError, match="feature maps of halved that are equal"):
        track("normalization", measured_normalization(Halved(), images[:1], mirror=False))  # type: ignore[arg-type]


def test_the_decoder_learns_to_reconstruct(project: Path) -> None:
    learned = read_json(paths.AUTOENCODER / "training.json")["reconstruction_mse"]
    images = real_images()
    blank = (images.double() / 127.5 - 1).var(dim=0, correction=0).mean().item()  # of the mean image
    assert learned < blank / 2
    summary = read_json(paths.REFERENCE / "summary.json")
    assert summary["psnr_of_mse_reconstruction"] == pytest.approx(-10 * np.log10(learned / 4), abs=0.3)


def test_training_repeats_bit_by_bit_and_depends_on_the_seed(project: Path, tmp_path: Path) -> None:
    made = []
    for number, seed in enumerate((0, 0, 1)):
        params = small_params(f"seed={seed}", "autoencoder.train.noise=0.5", updates=2)
        track("autoencoder", RepresentationAutoencoder.make(params, tmp_path / str(number), torch.device("cpu")))
        made.append(sha256_file(tmp_path / str(number) / paths.AUTOENCODER_WEIGHTS.name))
    assert made[0] == made[1] != made[2]


def test_a_run_is_trained_sampled_and_evaluated(project: Path) -> None:
    described = read_json(paths.model("t4") / "config.json")
    assert (described["model"]["channels"], described["model"]["latent_size"]) == (40, 8)
    assert (paths.samples("t4") / "grid.png").is_file()
    assert read_json(paths.metrics("t4"))["protocol"]["samples"] == 30


def test_export_to_diffusers_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match="of RepresentationAutoencoder, expected AutoencoderKL or AutoencoderTiny"):
        pipeline.export("t4", "diffusers", project / "exported")
    pipeline.export("t4", "safetensors", project / "exported.safetensors")


def test_decoding_needs_no_encoder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "efficientnet_lite0", lambda otherwise: pytest.fail("it was loaded"))
    loaded = load_autoencoder(small_params(), paths.AUTOENCODER)
    assert loaded.decode(torch.randn(2, 40, 8, 8)).shape == (2, 1, 64, 64)


def test_another_encoder_is_refused_before_any_image_is_encoded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "efficientnet_lite0", lambda otherwise: stand_in(1))
    params = small_params()
    loaded = load_autoencoder(params, paths.AUTOENCODER)
    with pytest.raises(UserError, match="efficientnet_lite0 with sha256 1111.*, expected 0000.*, with which"):
        loaded.check(params)
    making = RepresentationAutoencoder.make(
        small_params(f"autoencoder.sha256='{'3' * 64}'"), project / "never", torch.device("cpu")
    )
    with pytest.raises(UserError, match=r"sha256 1111.*, expected 3333.* \(autoencoder.sha256\)"):
        next(making)
    assert not (project / "never").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("autoencoder.layer=4",), r"with layer 5, expected 4 \(autoencoder.layer\)"),
        (("autoencoder.train.widths=[16, 8, 8, 16]",), r"tensors of other names or shapes .* the first decoder\.1"),
    ],
)
def test_an_autoencoder_of_other_params_is_refused(change: tuple[str, ...], message: str, project: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_autoencoder(small_params(*change), paths.AUTOENCODER)


def test_another_kind_and_damaged_weights_are_refused(project: Path, smoke_params: Params, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of RepresentationAutoencoder, expected AutoencoderKL"):
        load_autoencoder(smoke_params, paths.AUTOENCODER)
    whole, config = paths.AUTOENCODER_WEIGHTS, (paths.AUTOENCODER / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(UserError, match="Found no .*safetensors"):
        load_autoencoder(small_params(), tmp_path)
    (tmp_path / whole.name).write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_autoencoder(small_params(), tmp_path)
    save_file(load_file(whole) | {"std": torch.zeros(40, 8, 8)}, tmp_path / whole.name)
    with pytest.raises(UserError, match="a deviation not above 0"):
        load_autoencoder(small_params(), tmp_path)


def test_maps_that_do_not_fit_are_refused_by_params() -> None:
    for change, message in (
        ("autoencoder.layer=17", "expected a layer from 1 to 16, the blocks of efficientnet_lite0; found 17"),
        ("autoencoder.input_size=60", "an input_size that is a multiple of 8, the stride of layer 5 of .*; found 60"),
        ("autoencoder.layer=11", "found a map of 4 x 4 .* and 4 widths, which make 32 pixels"),
        ("autoencoder.input_size=72", "found a map of 9 x 9"),
        ("autoencoder.encoder=resnet", "autoencoder.encoder: found 'resnet', expected 'efficientnet_lite0'"),
        ("train.size=t2", None),
    ):
        if message is None:
            assert small_params(change).latent_shape == (40, 8, 8)
            continue
        with pytest.raises(UserError, match=message):
            small_params(change)


def dinov2_params(name: str, input_size: int, image_size: int, sha256: str) -> Params:
    kind = KIND % (name, 12, input_size, sha256, TRAIN.replace("16, 8, 8, 8", "16, 8, 8, 8, 8") % 2)
    return load_params(SMOKE, [*DISCS[:2], kind, f"data.image_size={image_size}", "data.mirror=true", "train.size=t1"])


def test_plan_says_how_many_terabytes_dinov2_latents_take() -> None:
    params = dinov2_params("dinov2_vitb14", 224, 256, "'" + "0" * 64 + "'")
    assert params.latent_shape == (768, 16, 16)
    machine = Machine("h100", 8, 0.4, "bf16")
    text = track("plan", plan_text(params, ["t4"], machine, 1_281_167, 1000))
    assert "latents.h5 of 768 x 16 x 16: 1 TB with mirrors, 0.5 TB without; data.mirror: false halves" in text
    small = track("plan", plan_text(load_params(SMOKE), ["t4"], machine, 1_281_167, 1000))
    assert "TB" not in small.replace("TB/s", "")


def test_missing_and_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="expected `sha256` of dinov2_vits14.safetensors, found null"):
        dinov2_params("dinov2_vits14", 56, 64, "null")
    with pytest.raises(UserError, match=r"Found no .*dinov2_vits14.safetensors, expected .* put timm's model"):
        Encoder("dinov2_vits14", 12, 56, "0" * 64)
    path = tmp_path / "dinov2_vits14.safetensors"
    path.write_bytes(b"other weights")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(encoders, "load_file", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=f"with sha256 {found}, expected .* sha256 000"):
        Encoder("dinov2_vits14", 12, 56, "0" * 64)


def test_dinov2_weights_for_larger_images_fit_and_those_of_another_network_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path))
    full = timm.create_model(TIMM_MODELS["dinov2_vits14"], pretrained=False, num_classes=0)  # of 518 pixels
    path = tmp_path / "dinov2_vits14.safetensors"
    save_file(full.state_dict(), path)
    encoder = Encoder("dinov2_vits14", 12, 56, sha256_file(path))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    maps = encoder(images)
    assert maps.shape == (2, 384, 4, 4)
    resized = torch.nn.functional.interpolate(images, (56, 56), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    tokens = encoder.network.forward_features((resized - mean) / std)[:, 1:]
    torch.testing.assert_close(maps, tokens.transpose(1, 2).reshape(maps.shape), rtol=1e-4, atol=1e-4)
    half = {name: tensor for name, tensor in full.state_dict().items() if not name.startswith("blocks.11.")}
    save_file(half, path)
    with pytest.raises(UserError, match="that does not fit vit_small_patch14_dinov2"):
        Encoder("dinov2_vits14", 12, 56, sha256_file(path))


def test_efficientnets_maps_are_those_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(encoders, "efficientnet_lite0", EFFICIENTNET)
    from afm_pipe.params.encoders import ENCODERS

    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for layer, (channels, stride) in enumerate(ENCODERS["efficientnet_lite0"].maps, start=1):
        found = Encoder("efficientnet_lite0", layer, 64, None)(images)
        assert found.shape == (1, channels, 64 // stride, 64 // stride)
    network = encoders.efficientnet_lite0("")[0]
    last = network._swish(network._bn1(network._conv_head(found)))
    torch.testing.assert_close(last, network.extract_features(images), rtol=1e-5, atol=1e-5)
    gray = Encoder("efficientnet_lite0", 5, 64, None)
    torch.testing.assert_close(gray(images[:, :1]), gray(images[:, :1].expand(-1, 3, -1, -1)))


def test_decoder_starts_as_convolutions_and_doubles_per_width() -> None:
    first, again = (build_decoder(5, (12, 8, 6), 3, seed=3) for _ in range(2))
    assert isinstance(first, Decoder)
    assert first(torch.randn(2, 5, 4, 4)).shape == (2, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_generator_of_more_channels_than_width_has_a_wide_final_layer() -> None:
    from afm_pipe.models.generator import Generator
    from afm_pipe.params.sizes import SIZES

    def rank(channels: int) -> int:
        torch.manual_seed(0)
        generator = Generator(SIZES["t1"], channels, 4, 2)
        nn.init.normal_(generator.final_layer.linear.weight)
        with torch.no_grad():
            out = generator(torch.randn(40, channels, 4, 4), torch.arange(40) % 2)
        return int(torch.linalg.matrix_rank(out.permute(0, 2, 3, 1).reshape(-1, channels), rtol=1e-4))

    assert rank(128) <= 128 and "final_layer.hidden.weight" not in Generator(SIZES["t1"], 128, 4, 2).state_dict()
    assert rank(200) > 128
