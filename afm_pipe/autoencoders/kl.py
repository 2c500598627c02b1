"""The autoencoder between images and latents: diffusers' AutoencoderKL, trained here or taken from outside.

A folder of one holds config.json (with the scaling factor) and diffusion_pytorch_model.safetensors.

Legend: N images, B images of a batch, C image channels, H, W image sides, c, h, w the same of latents.
"""

import math
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from afm_pipe.data.order import Order, stream_generator
from afm_pipe.params import Autoencoder, AutoencoderTraining, Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_json, sha256_file, write_json
from afm_pipe.runtime.progress import Progress

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
UPDATES_PER_TICK = 10
MEASURED_IMAGES = 10_000  # enough for a scalar; all of a small data set
MEASURING_BATCH = 100


class TrainedAutoencoder(NamedTuple):
    """A trained autoencoder, and how well it gives its training images back."""

    autoencoder: AutoencoderKL
    reconstruction_mse: float
    """Mean squared error per pixel value in [-1, 1]."""


def train_autoencoder(
    params: Autoencoder, images: NDArray[np.uint8], seed: int, device: torch.device = CPU
) -> Generator[Progress, None, TrainedAutoencoder]:
    """Train a KL autoencoder on `images` (N, C, H, W) uint8, set its scaling factor; return it in eval mode.

    Loss: squared error per pixel value + kl_weight * KL summed over a latent / pixel values of an image; Adam, lr
    linearly to 0. Raises UserError when params name no training or the loss is not finite.
    """
    if params.train is None:
        raise UserError("Found autoencoder.train null, expected its settings: fill them in, or set pretrained.")
    train = params.train
    vae = _untrained(params, train, images.shape[1], images.shape[2], seed).to(device).train()
    adam = torch.optim.Adam(vae.parameters(), lr=train.lr)
    order = Order(len(images), seed, "autoencoder")
    noise = stream_generator(seed, "autoencoder", "noise")
    num_values = math.prod(images.shape[1:])
    for update in range(train.updates):
        indices = order.indices(update * train.batch_size, train.batch_size)  # (B,)
        batch = _to_signed(torch.from_numpy(images[indices.numpy()]).to(device))  # (B, C, H, W)
        mean, std = _moments(vae, batch)  # (B, c, h, w) each
        latent = mean + std * torch.randn(mean.shape, generator=noise).to(device)
        reconstruction = mse_loss(vae.decode(latent).sample, batch)
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum() / len(batch)
        loss = reconstruction + train.kl_weight * kl / num_values
        if not math.isfinite(loss.item()):
            raise UserError(f"Found loss {loss.item()} at autoencoder update {update}: lower autoencoder.train.lr.")
        adam.param_groups[0]["lr"] = train.lr * (1 - update / train.updates)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if (update + 1) % UPDATES_PER_TICK == 0 or update + 1 == train.updates:
            yield Progress(update + 1, train.updates, "updates", f"mse {reconstruction.item():.4f}, kl {kl.item():.1f}")
    vae.eval().requires_grad_(False)
    factor = params.scaling_factor
    vae.register_to_config(
        scaling_factor=measured_scaling_factor(vae, images, seed) if factor == "measured" else factor
    )
    return TrainedAutoencoder(vae, reconstruction_mse(vae, images, seed))


def measured_scaling_factor(vae: AutoencoderKL, images: NDArray[np.uint8], seed: int) -> float:
    """Return 1 / standard deviation of posterior samples over `images` (N, C, H, W) uint8, at most 10,000 of them."""
    total, squares, count = 0.0, 0.0, 0
    for batch, noise in _measured(vae, images, seed):
        latent = sample_latent(*encode_moments(vae, batch, "fp32"), noise, 1.0).double()  # (B, c, h, w)
        total, squares, count = (
            total + latent.sum().item(),
            squares + latent.square().sum().item(),
            count + latent.numel(),
        )
    return 1 / math.sqrt(squares / count - (total / count) ** 2)


def reconstruction_mse(vae: AutoencoderKL, images: NDArray[np.uint8], seed: int) -> float:
    """Return the mean squared error, in [-1, 1], of `images` (N, C, H, W) uint8 decoded from posterior samples."""
    factor = vae.config.scaling_factor
    total, count = 0.0, 0
    for batch, noise in _measured(vae, images, seed):
        decoded = decode(vae, sample_latent(*encode_moments(vae, batch, "fp32"), noise, factor))  # (B, C, H, W)
        total += (decoded - _to_signed(batch.to(vae.device))).double().square().sum().item()
        count += decoded.numel()
    return total / count


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor, precision: Literal["fp32", "bf16"]) -> tuple[Tensor, Tensor]:
    """Encode `images` (B, C, H, W) uint8 to the mean and standard deviation of their latents, (B, c, h, w) float32."""
    with torch.autocast(vae.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return _moments(vae, _to_signed(images.to(vae.device)))


def sample_latent(mean: Tensor, std: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Draw latents (B, c, h, w) of about unit variance from their moments and standard normal `noise`."""
    return (mean + std * noise.to(mean.device)) * scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode scaled `latents` (B, c, h, w) to images (B, C, H, W) float32 in [-1, 1], in fp32 whatever the caller's."""
    with torch.autocast(vae.device.type, enabled=False):
        latents = latents.to(vae.device, torch.float32) / vae.config.scaling_factor
        images: Tensor = vae.decode(latents).sample
    return images.clamp(-1, 1)


def save_autoencoder(vae: AutoencoderKL, folder: Path) -> None:
    """Write config.json and the weights into `folder`, as diffusers does; the same weights give the same bytes."""
    state = {name: value.detach().cpu().contiguous() for name, value in vae.state_dict().items()}
    with atomic_path(folder / WEIGHTS) as aside:
        save_file(state, aside, metadata={"format": "pt"})
    with atomic_path(folder / CONFIG) as aside:
        aside.write_text(vae.to_json_string())


def load_autoencoder(folder: Path, device: torch.device = CPU) -> AutoencoderKL:
    """Load an autoencoder for use: fp32, eval mode, no gradients. Raises UserError when the folder is not one."""
    _require_files(folder)
    try:
        vae, info = AutoencoderKL.from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # True asks for accelerate
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
            f"Found {len(wrong)} tensors missing or too many in {folder / WEIGHTS}, the first {wrong[0]}; "
            f"expected those of {folder / CONFIG}: take both files from one place."
        )
    return vae.to(device).eval().requires_grad_(False)


def autoencoder_sha256(folder: Path) -> str:
    """Return the identity of an autoencoder: the sha256 of its weights file."""
    _require_files(folder)
    return sha256_file(folder / WEIGHTS)


def check_autoencoder(vae: AutoencoderKL, params: Params) -> None:
    """Raise UserError unless the autoencoder has the shapes that params say and maps latents by a factor alone."""
    config = vae.config
    checks = [
        ("autoencoder.latent_channels", config.latent_channels, params.autoencoder.latent_channels),
        ("autoencoder.downsample", 2 ** (len(config.block_out_channels) - 1), params.autoencoder.downsample),
        ("data.channels", config.in_channels, params.data.channels),
        ("data.channels", config.out_channels, params.data.channels),
    ]
    for name, found, expected in checks:
        if found != expected:
            raise UserError(
                f"Found an autoencoder with {name} {found}, expected {expected}: mend params or take another."
            )
    if config.shift_factor is not None or config.latents_mean is not None or config.latents_std is not None:
        raise UserError(
            "Found an autoencoder with shift_factor, latents_mean or latents_std, expected a scaling factor alone, "
            "as SD-VAE has: take another."
        )


def fetch_pretrained(params: Params, folder: Path) -> AutoencoderKL:
    """Copy the autoencoder that autoencoder.pretrained names (a local folder or a hub name) into `folder`; return it.

    Weights are copied byte for byte once their sha256 is the expected one; the scaling factor of params goes into
    config.json. Raises UserError naming file, found and expected hash and where to put the files, or what does not fit.
    """
    wanted = params.autoencoder
    if wanted.pretrained is None or wanted.sha256 is None:
        raise UserError("Found autoencoder.pretrained null, expected a folder or hub name: set it, or train one.")
    if wanted.scaling_factor == "measured":
        raise UserError(
            "Found autoencoder.scaling_factor measured with pretrained weights, expected the number that goes with "
            "them: set it (0.18215 for SD-VAE)."
        )
    local = Path(wanted.pretrained).expanduser()
    source = local if local.is_dir() else _download(wanted.pretrained)
    _require_files(source)
    found = sha256_file(source / WEIGHTS)
    if found != wanted.sha256:
        raise UserError(
            f"Found {source / WEIGHTS} with sha256 {found}, expected {wanted.sha256} (autoencoder.sha256): "
            "replace the file, or correct the hash if these are the weights you mean."
        )
    vae = load_autoencoder(source)
    check_autoencoder(vae, params)
    vae.register_to_config(scaling_factor=wanted.scaling_factor)
    with atomic_path(folder / WEIGHTS) as aside:
        shutil.copyfile(source / WEIGHTS, aside)
    write_json(folder / CONFIG, read_json(source / CONFIG) | {"scaling_factor": wanted.scaling_factor})
    return vae


def _download(name: str) -> Path:
    """Fetch the two files of a hub repository into the hub's own cache; return the folder there."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    remedy = (
        f"download {CONFIG} and {WEIGHTS} on a machine with network, put them into one folder, "
        "and set autoencoder.pretrained to its path"
    )
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or not _reachable(huggingface_hub.constants.ENDPOINT)
    try:
        files = [
            Path(huggingface_hub.hf_hub_download(name, file, local_files_only=offline)) for file in (CONFIG, WEIGHTS)
        ]
    except HFValidationError:
        raise UserError(
            f"Found no folder {name} (autoencoder.pretrained), which is no hub name either: {remedy}."
        ) from None
    except LocalEntryNotFoundError:
        why = f"{huggingface_hub.constants.ENDPOINT} is out of reach" if offline else "the download failed"
        raise UserError(
            f"Found no folder {name} (autoencoder.pretrained), nor {WEIGHTS} of that name in the hub cache, "
            f"and {why}: {remedy}."
        ) from None
    except OSError as error:
        raise UserError(
            f"Found the hub unable to give {name} (autoencoder.pretrained): {str(error).splitlines()[0]} "
            f"Check the name, or {remedy}."
        ) from None
    return files[1].parent


def _reachable(endpoint: str) -> bool:
    """Ask once, through the user's proxies; the hub's client would try for 23 seconds."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the client may know other certificates
    except OSError:
        return False
    return True


def _require_files(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"Found no {folder / name}, expected {CONFIG} and {WEIGHTS} of a diffusers AutoencoderKL there: "
                "run `dvc repro autoencoder`, or put them there."
            )


def _untrained(params: Autoencoder, train: AutoencoderTraining, channels: int, side: int, seed: int) -> AutoencoderKL:
    levels = len(train.block_out_channels)
    with torch.random.fork_rng(devices=[]):  # modules initialise themselves from the global state
        torch.manual_seed(seed)
        return AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=train.block_out_channels,
            layers_per_block=train.layers_per_block,
            latent_channels=params.latent_channels,
            norm_num_groups=train.norm_groups,
            sample_size=side,
            mid_block_add_attention=train.mid_attention,
        )


def _measured(vae: AutoencoderKL, images: NDArray[np.uint8], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of (images, noise of their latents' shape), spread evenly over the data set."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), MEASURED_IMAGES)).round().astype(int)
    random = stream_generator(seed, "autoencoder", "measure")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = images.shape[2] // factor, images.shape[3] // factor
    for indices in np.array_split(chosen, math.ceil(len(chosen) / MEASURING_BATCH)):
        shape = (len(indices), vae.config.latent_channels, height, width)
        yield torch.from_numpy(images[indices]), torch.randn(shape, generator=random)


def _moments(vae: AutoencoderKL, batch: Tensor) -> tuple[Tensor, Tensor]:
    posterior: Any = vae.encode(batch).latent_dist
    return posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()  # clamped by diffusers to [-30, 20]


def _to_signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
