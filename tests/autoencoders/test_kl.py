"""Kind kl: training, its folder, pretrained weights, moments and decoding."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from afm_pipe.autoencoders import load_autoencoder
from afm_pipe.autoencoders.diffusers_folder import fetch_pretrained
from afm_pipe.autoencoders.hub import CONFIG, WEIGHTS
from afm_pipe.autoencoders.kl import KLAutoencoder, TrainedAutoencoder, train_autoencoder
from afm_pipe.autoencoders.measuring import reconstruction_mse
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file
from afm_pipe.runtime.progress import track


def discs(count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    centres = random.uniform(8, 24, (count, 2, 1, 1))
    return ((((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2) < 36) * 255).astype(np.uint8)[:, None]


IMAGES = discs(64)


def with_autoencoder(params: Params, **fields: object) -> Params:
    return params.model_copy(update={"autoencoder": params.autoencoder.model_copy(update=fields)})


def train(params: Params, seed: int, **fields: object) -> TrainedAutoencoder:
    training = params.autoencoder.train.model_copy(update={"updates": 30, "batch_size": 16} | fields)
    changed = with_autoencoder(params, train=training).autoencoder
    return track("autoencoder", train_autoencoder(changed, IMAGES, seed))


@pytest.fixture(scope="module")
def trained(smoke_params: Params) -> TrainedAutoencoder:
    return train(smoke_params, 0)


@pytest.fixture(scope="module")
def folder(trained: TrainedAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "autoencoder"
    trained.autoencoder.save(path)
    return path


def test_training_learns_to_give_images_back(trained: TrainedAutoencoder, smoke_params: Params) -> None:
    untrained = train(smoke_params, 0, updates=1)
    assert trained.reconstruction_mse < 0.5 * untrained.reconstruction_mse


def test_training_depends_on_the_seed_alone(
    trained: TrainedAutoencoder, smoke_params: Params, folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    train(smoke_params, 0).autoencoder.save(tmp_path / "again")
    assert torch.equal(state, torch.get_rng_state())
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert train(smoke_params, 1, updates=1).reconstruction_mse != train(smoke_params, 0, updates=1).reconstruction_mse


def test_kl_weight_pulls_moments_to_the_standard_normal(smoke_params: Params) -> None:
    free, pulled = (train(smoke_params, 0, kl_weight=weight).autoencoder for weight in (0.0, 10.0))
    batch = torch.from_numpy(IMAGES)
    distances = []
    for vae in (free, pulled):
        mean, std = vae.encode(batch).chunk(2, dim=1)
        distances.append((mean.square() + std.square() - 1 - 2 * std.log()).mean().item())
    assert distances[1] < 0.2 * distances[0]


def test_diverging_training_stops_with_advice(smoke_params: Params) -> None:
    with pytest.raises(UserError, match=r"lower autoencoder\.train\.lr"):
        train(smoke_params, 0, lr=1e20)


def test_measured_scaling_factor_gives_latents_unit_variance(trained: TrainedAutoencoder, smoke_params: Params) -> None:
    vae = trained.autoencoder
    noise = torch.randn(len(IMAGES), *vae.spec.shape, generator=torch.Generator().manual_seed(5))
    sampled = vae.sample(vae.encode(torch.from_numpy(IMAGES)), noise)
    assert sampled.std().item() == pytest.approx(1, abs=0.02)
    fixed = with_autoencoder(smoke_params, scaling_factor=0.25)
    assert train(fixed, 0, updates=1).autoencoder.spec.scaling_factor == 0.25


def test_moments_are_those_of_diffusers_on_inputs_from_minus_one_to_one(trained: TrainedAutoencoder) -> None:
    vae, batch = trained.autoencoder, torch.from_numpy(IMAGES[:4])
    posterior = vae.model.encode((batch.double() / 255 * 2 - 1).float()).latent_dist
    mean, std = vae.encode(batch).chunk(2, dim=1)
    assert mean.shape == std.shape == (4, 4, 8, 8)
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std, rtol=1e-4, atol=1e-5)
    low_mean, low_std = vae.encode(batch, "bf16").chunk(2, dim=1)
    assert low_mean.dtype == low_std.dtype == torch.float32
    assert 0 < (low_mean - mean).abs().max() < 0.1 * mean.abs().max()


def test_decoding_undoes_the_scaling_in_fp32_and_clamps(trained: TrainedAutoencoder) -> None:
    vae = trained.autoencoder
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        images = vae.decode(latents)
    assert images.dtype == torch.float32
    assert images.shape == (2, 1, 32, 32)
    torch.testing.assert_close(images, vae.model.decode(latents / vae.model.config.scaling_factor).sample.clamp(-1, 1))
    assert vae.decode(latents * 1000).abs().max() <= 1


def test_folder_is_plain_diffusers(trained: TrainedAutoencoder, folder: Path, smoke_params: Params) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    theirs = AutoencoderKL.from_pretrained(str(folder), low_cpu_mem_usage=False)
    ours = load_autoencoder(smoke_params, folder)
    for name, value in trained.autoencoder.model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
        assert torch.equal(value, ours.model.state_dict()[name])
    assert theirs.config.scaling_factor == ours.spec.scaling_factor == trained.autoencoder.spec.scaling_factor
    assert ours.spec.shape == trained.autoencoder.spec.shape == (4, 8, 8)
    assert not ours.model.training
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())
    assert reconstruction_mse(ours, IMAGES, 0) == trained.reconstruction_mse


def test_bad_folders_are_refused_by_name(folder: Path, smoke_params: Params, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Found no .*config\.json"):
        load_autoencoder(smoke_params, tmp_path / "none")

    cut = Path(shutil.copytree(folder, tmp_path / "cut"))
    (cut / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UserError, match="unreadable as AutoencoderKL"):
        load_autoencoder(smoke_params, cut)

    fewer = Path(shutil.copytree(folder, tmp_path / "fewer"))
    state = load_file(folder / WEIGHTS)
    del state["encoder.conv_in.weight"]
    save_file(state, fewer / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"encoder\.conv_in\.weight"):
        load_autoencoder(smoke_params, fewer)

    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps(config | {"latent_channels": 8}))
    with pytest.raises(UserError, match="unreadable as AutoencoderKL"):
        load_autoencoder(smoke_params, other)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("autoencoder", {"latent_channels": 16}, r"shape \(4, 8, 8\) of latents, expected \(16, 8, 8\)"),
        ("autoencoder", {"downsample": 8}, r"shape \(4, 8, 8\) of latents, expected \(4, 4, 4\)"),
        ("data", {"channels": 3}, r"1 image channels, expected 3"),
    ],
)
def test_autoencoder_of_other_shape_than_params_is_refused(
    section: str, fields: dict[str, int], message: str, trained: TrainedAutoencoder, smoke_params: Params
) -> None:
    trained.autoencoder.check(smoke_params)
    changed = smoke_params.model_copy(update={section: getattr(smoke_params, section).model_copy(update=fields)})
    with pytest.raises(UserError, match=message):
        trained.autoencoder.check(changed)


def test_pretrained_weights_are_copied_byte_for_byte_with_the_scaling_factor_of_params(
    folder: Path, smoke_params: Params, tmp_path: Path
) -> None:
    sha256 = sha256_file(folder / WEIGHTS)
    params = with_autoencoder(smoke_params, pretrained=str(folder), sha256=sha256, scaling_factor=0.5)
    fetch_pretrained(params, tmp_path / "vae", KLAutoencoder)
    assert sha256_file(tmp_path / "vae" / WEIGHTS) == sha256
    assert load_autoencoder(params, tmp_path / "vae").spec.scaling_factor == 0.5


def test_pretrained_weights_of_another_hash_are_refused_before_they_are_read(
    folder: Path, smoke_params: Params, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    (bad / WEIGHTS).write_bytes(b"no safetensors at all")
    params = with_autoencoder(
        smoke_params, pretrained=str(bad), sha256=sha256_file(folder / WEIGHTS), scaling_factor=0.5
    )
    found, expected = sha256_file(bad / WEIGHTS), sha256_file(folder / WEIGHTS)
    with pytest.raises(UserError, match=f"with sha256 {found}, expected {expected}"):
        fetch_pretrained(params, tmp_path / "vae", KLAutoencoder)
    assert not (tmp_path / "vae").exists()
    (bad / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"Found no .*{WEIGHTS}"):
        fetch_pretrained(params, tmp_path / "vae", KLAutoencoder)


@pytest.mark.parametrize("name", ["nobody/nothing", "../no/such/folder"])
def test_pretrained_name_without_network_is_one_error_at_once(
    name: str, smoke_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    params = with_autoencoder(smoke_params, pretrained=name, sha256="0" * 64, scaling_factor=0.5)
    with pytest.raises(UserError, match=r"set autoencoder\.pretrained to its path") as error:
        fetch_pretrained(params, tmp_path / "vae", KLAutoencoder)
    assert name in str(error.value)
