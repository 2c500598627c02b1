"""Kind kl: diffusers' AutoencoderKL, pretrained or trained on the images.

Its folder has the diffusers layout: config.json, with the scaling factor, and diffusion_pytorch_model.safetensors.

Legend: N images, B batch size; C, H, W channels, height and width of images; c, h, w of latents.
"""

import math
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.autoencoders.hub import CONFIG, WEIGHTS, download
from afm_pipe.autoencoders.kl_training import moments, train_kl
from afm_pipe.data.manifest import read_manifest
from afm_pipe.data.order import stream_generator
from afm_pipe.data.reading import load_images
from afm_pipe.params import LatentSpec, Params
from afm_pipe.params.autoencoders import KLParams
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_json, sha256_file, write_json
from afm_pipe.runtime.progress import Progress

CPU = torch.device("cpu")
MEASURED_IMAGES = 10_000  # enough for a scalar
MEASURING_BATCH = 100


class KLAutoencoder(Autoencoder, kind="kl"):
    """An AutoencoderKL for square images: stochastic latents, normalized by the scaling factor of its config."""

    def __init__(self, model: AutoencoderKL, image_size: int) -> None:
        self.model, config = model.eval().requires_grad_(False), model.config
        side = image_size // 2 ** (len(config.block_out_channels) - 1)
        self.spec = LatentSpec((config.latent_channels, side, side), True, float(config.scaling_factor))
        self.device = model.device

    @classmethod
    def make(cls, params: Params, folder: Path, device: torch.device) -> Generator[Progress, None, None]:
        """Copy the pretrained autoencoder, or train a small one on the images."""
        if _settings(params).pretrained is not None:
            fetch_pretrained(params, folder)
            return
        images = yield from load_images(read_manifest(paths.MANIFEST), params.data)
        trained = yield from train_autoencoder(_settings(params), images, params.seed, device)
        trained.autoencoder.save(folder)
        write_json(folder / "training.json", {"reconstruction_mse": trained.reconstruction_mse})

    @classmethod
    def load(cls, params: Params, folder: Path) -> Self:
        """Load the autoencoder in `folder`. Raises UserError if it is not an AutoencoderKL."""
        _require_files(folder)
        try:
            model, info = AutoencoderKL.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # True needs accelerate
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            raise UserError(
                f"Found {folder} unreadable as AutoencoderKL ({str(error).splitlines()[0]}): make it again."
            ) from None
        wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        if wrong:
            raise UserError(
                f"Found {len(wrong)} missing or unexpected tensors in {folder / WEIGHTS}, the first {wrong[0]}; "
                f"expected those of {folder / CONFIG}: take both files from the same source."
            )
        return cls(model, params.data.image_size)

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, and return itself."""
        self.model.to(device)
        self.device = self.model.device
        return self

    def save(self, folder: Path) -> None:
        """Write config.json and the weights into `folder`, as diffusers does; equal weights give equal bytes."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        with atomic_path(folder / WEIGHTS) as temp:
            save_file(state, temp, metadata={"format": "pt"})
        with atomic_path(folder / CONFIG) as temp:
            temp.write_text(self.model.to_json_string())

    def check(self, params: Params) -> None:
        """Raise UserError unless the autoencoder matches params and normalizes by a scaling factor only."""
        super().check(params)
        config = self.model.config
        for found in (config.in_channels, config.out_channels):
            if found != params.data.channels:
                raise UserError(
                    f"Found an autoencoder of {found} image channels, expected {params.data.channels} (data.channels): "
                    "fix params or use another one."
                )
        if config.shift_factor is not None or config.latents_mean is not None or config.latents_std is not None:
            raise UserError(
                "Found an autoencoder with shift_factor, latents_mean or latents_std, expected only a scaling factor, "
                "as in SD-VAE: use another one."
            )

    def _encode(self, pixels: Tensor) -> Tensor:
        return torch.cat(moments(self.model, pixels), dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample


class TrainedAutoencoder(NamedTuple):
    """A trained autoencoder and its reconstruction error on the training images."""

    autoencoder: KLAutoencoder
    reconstruction_mse: float
    """Mean squared error per pixel value in [-1, 1]."""


def train_autoencoder(
    params: KLParams, images: NDArray[np.uint8], seed: int, device: torch.device = CPU
) -> Generator[Progress, None, TrainedAutoencoder]:
    """Train an autoencoder on `images` (N, C, H, W) uint8 and set its scaling factor.

    Raises UserError if the loss is not finite.
    """
    model = yield from train_kl(params, images, seed, device)
    side, factor = images.shape[2], params.scaling_factor
    if factor == "measured":
        factor = measured_scaling_factor(KLAutoencoder(model, side), images, seed)
    model.register_to_config(scaling_factor=factor)
    trained = KLAutoencoder(model, side)
    return TrainedAutoencoder(trained, reconstruction_mse(trained, images, seed))


def measured_scaling_factor(autoencoder: KLAutoencoder, images: NDArray[np.uint8], seed: int) -> float:
    """Return 1 / standard deviation of posterior samples, over up to 10,000 of the `images` (N, C, H, W) uint8."""
    total, squares, count = 0.0, 0.0, 0
    for encoded, noise, _ in _encoded(autoencoder, images, seed):
        mean, std = encoded.chunk(2, dim=1)
        latent = (mean + std * noise).double()  # (B, c, h, w)
        total += latent.sum().item()
        squares += latent.square().sum().item()
        count += latent.numel()
    variance = squares / count - (total / count) ** 2
    if not 0 < variance < math.inf:
        raise UserError(
            f"Found latents of variance {variance:g}, expected more than 0: use images that differ, or set "
            "autoencoder.scaling_factor to a number."
        )
    return 1 / math.sqrt(variance)


def reconstruction_mse(autoencoder: KLAutoencoder, images: NDArray[np.uint8], seed: int) -> float:
    """Return the mean squared error in [-1, 1] of reconstructing `images` (N, C, H, W) uint8 from posterior samples."""
    total, count = 0.0, 0
    for encoded, noise, pixels in _encoded(autoencoder, images, seed):
        decoded = autoencoder.decode(autoencoder.sample(encoded, noise))  # (B, C, H, W)
        total += (decoded - pixels).double().square().sum().item()
        count += decoded.numel()
    return total / count


def fetch_pretrained(params: Params, folder: Path) -> None:
    """Copy the autoencoder named by autoencoder.pretrained (a local folder or a Hub name) into `folder`.

    The weights are copied unchanged if their sha256 matches; config.json gets the scaling factor of params. Raises
    UserError if files are missing, the hash differs, or the autoencoder does not match params.
    """
    settings = _settings(params)
    assert settings.pretrained is not None
    local = Path(settings.pretrained).expanduser()
    source = local if local.is_dir() else download(settings.pretrained)
    _require_files(source)
    found = sha256_file(source / WEIGHTS)
    if found != settings.sha256:
        raise UserError(
            f"Found {source / WEIGHTS} with sha256 {found}, expected {settings.sha256} (autoencoder.sha256): "
            "replace the file, or correct the hash if these are the weights you want."
        )
    KLAutoencoder.load(params, source).check(params)
    with atomic_path(folder / WEIGHTS) as temp:
        shutil.copyfile(source / WEIGHTS, temp)
    write_json(folder / CONFIG, read_json(source / CONFIG) | {"scaling_factor": settings.scaling_factor})


def _settings(params: Params) -> KLParams:
    assert isinstance(params.autoencoder, KLParams)
    return params.autoencoder


def _require_files(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"Found no {folder / name}, expected {CONFIG} and {WEIGHTS} of a diffusers AutoencoderKL there: "
                "run `dvc repro autoencoder`, or put them there."
            )


def _encoded(
    autoencoder: KLAutoencoder, images: NDArray[np.uint8], seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield encodings, noise and pixels of batches of images that are spread evenly over the data set."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), MEASURED_IMAGES)).round().astype(int)
    random = stream_generator(seed, "autoencoder", "measure")
    spec, device = autoencoder.spec, autoencoder.device
    for indices in np.array_split(chosen, math.ceil(len(chosen) / MEASURING_BATCH)):
        batch = torch.from_numpy(images[indices])
        noise = torch.randn(len(indices), *spec.shape, generator=random).to(device)
        yield autoencoder.encode(batch), noise, spec.to_pixels(batch.to(device))
