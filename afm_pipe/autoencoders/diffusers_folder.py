"""Autoencoders of diffusers: their folder, and pretrained ones from a local folder or the Hugging Face Hub.

A folder has the diffusers layout: config.json, with the scaling factor, and diffusion_pytorch_model.safetensors.

Legend: C channels of an image; c, h, w of latents.
"""

import shutil
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.autoencoders.hub import CONFIG, WEIGHTS, download
from afm_pipe.params import LatentSpec, Params
from afm_pipe.params.autoencoders import DiffusersParams
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_json, sha256_file, write_json

KIND_OF_CLASS = {"AutoencoderKL": "kl", "AutoencoderTiny": "tiny"}


class DiffusersAutoencoder(Autoencoder):
    """An autoencoder whose network is one of diffusers, normalized by the scaling factor of its config."""

    network: ClassVar[Any]
    """Its class in diffusers."""
    stages: ClassVar[str]
    """Entry of its config with one value per resolution of the encoder."""
    stochastic: ClassVar[bool]

    def __init__(self, model: Any, image_size: int) -> None:
        """Hold a network for square images of `image_size` pixels, frozen."""
        self.model, config = model.eval().requires_grad_(False), model.config
        side = image_size // 2 ** (len(config[self.stages]) - 1)
        shape = (config.latent_channels, side, side)
        self.spec = LatentSpec(shape, self.stochastic, float(config.scaling_factor))
        self.device = model.device

    @classmethod
    def load(cls, params: Params, folder: Path) -> Self:
        """Load the autoencoder in `folder`. Raises UserError if it is of another class than this kind's, or damaged."""
        name = cls.network.__name__
        require_files(folder, name)
        _require_class(folder, name)
        try:
            model, info = cls.network.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # True needs accelerate
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
            loaded = cls(model, params.data.image_size)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            raise UserError(
                f"Found {folder} unreadable as {name} ({str(error).splitlines()[0]}): make it again."
            ) from None
        wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        if wrong:
            raise UserError(
                f"Found {len(wrong)} missing or unexpected tensors in {folder / WEIGHTS}, the first {wrong[0]}; "
                f"expected those of {folder / CONFIG}: take both files from the same source."
            )
        return loaded

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
        if config.get("shift_factor") or any(config.get(name) is not None for name in ("latents_mean", "latents_std")):
            raise UserError(
                "Found an autoencoder with shift_factor, latents_mean or latents_std, expected only a scaling factor, "
                "as in SD-VAE: use another one."
            )


def fetch_pretrained(params: Params, folder: Path, kind: type[DiffusersAutoencoder]) -> DiffusersAutoencoder:
    """Copy the autoencoder named by autoencoder.pretrained (a local folder or a Hub name) into `folder`; return it.

    The weights are copied unchanged if their sha256 matches. config.json gets the scaling factor of params, or keeps
    its own where params say `measured`. Raises UserError if files are missing, the hash differs, or the autoencoder
    does not match params.
    """
    settings = params.autoencoder
    assert isinstance(settings, DiffusersParams) and settings.pretrained is not None
    local = paths.local(settings.pretrained)
    source = local if local.is_dir() else download(settings.pretrained)
    require_files(source, kind.network.__name__)
    _require_class(source, kind.network.__name__)
    found = sha256_file(source / WEIGHTS)
    if found != settings.sha256:
        raise UserError(
            f"Found {source / WEIGHTS} with sha256 {found}, expected {settings.sha256} (autoencoder.sha256): "
            "replace the file, or correct the hash if these are the weights you want."
        )
    autoencoder = kind.load(params, source)
    autoencoder.check(params)
    with atomic_path(folder / WEIGHTS) as temp:
        shutil.copyfile(source / WEIGHTS, temp)
    factor = settings.scaling_factor
    write_config(source / CONFIG, folder, autoencoder.spec.scaling_factor if factor == "measured" else factor)
    return autoencoder


def write_config(source: Path, folder: Path, scaling_factor: float | None) -> None:
    """Write the config of `source` with a scaling factor into `folder`."""
    write_json(folder / CONFIG, read_json(source) | {"scaling_factor": scaling_factor})


def require_files(folder: Path, name: str) -> None:
    """Raise UserError unless `folder` has the two files of the class `name` of diffusers."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(
                f"Found no {folder / file}, expected {CONFIG} and {WEIGHTS} of a diffusers {name} there: "
                "run `dvc repro autoencoder`, or put them there."
            )


def _require_class(folder: Path, name: str) -> None:
    """Raise UserError if config.json says another class of diffusers than `name`."""
    config = read_json(folder / CONFIG)
    found = config.get("_class_name") if isinstance(config, dict) else config
    if found != name:
        kind = KIND_OF_CLASS.get(found) if isinstance(found, str) else None
        remedy = f"set autoencoder.kind: {kind}" if kind else "use another one"
        raise UserError(
            f"Found {folder / CONFIG} of {str(found)[:60]}, expected {name} as autoencoder.kind "
            f"{KIND_OF_CLASS.get(name, name)} is: {remedy}, or name another folder."
        )
