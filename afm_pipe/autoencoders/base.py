"""The interface of autoencoders.

The folder of an autoencoder holds its tensors in diffusion_pytorch_model.safetensors, whose sha256 identifies it, and
other files that its kind defines.

Legend: B batch size; C, H, W channels, height and width of images; c, h, w of latents; e channels of the encoding.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from afm_pipe.params import LatentSpec, Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress


class Autoencoder(ABC):
    """Encodes images and decodes latents. A subclass states its kind: `class Mine(Autoencoder, kind="mine")`.

    One without a kind is shared by several kinds.
    """

    kinds: ClassVar[dict[str, type["Autoencoder"]]] = {}

    spec: LatentSpec
    device: torch.device = torch.device("cpu")

    def __init_subclass__(cls, kind: str | None = None) -> None:
        if kind is not None:
            Autoencoder.kinds[kind] = cls

    @classmethod
    @abstractmethod
    def make(cls, params: Params, folder: Path, device: torch.device) -> Generator[Progress, None, None]:
        """Train or fetch the autoencoder that params describe, and write it into `folder`."""

    @classmethod
    @abstractmethod
    def load(cls, params: Params, folder: Path) -> Self:
        """Load the autoencoder in `folder`. Raises UserError if it is not of this kind."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move to a device and return self."""

    def check(self, params: Params) -> None:
        """Raise UserError unless the latent space matches params."""
        for name in ("shape", "stochastic", "image_range"):
            found, expected = getattr(self.spec, name), getattr(params.latent_spec, name)
            if found != expected:
                raise UserError(
                    f"Found an autoencoder with {name} {found} of latents, expected {expected}: fix params or use "
                    "another one."
                )

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, C, H, W) in the spec's `image_range` to (B, e, h, w)."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, h, w), denormalized, to pixels (B, C, H, W) in the spec's `image_range`."""

    @torch.no_grad()
    def encode(self, images: Tensor, precision: Literal["fp32", "bf16"] = "fp32") -> Tensor:
        """Encode `images` (B, C, H, W) uint8 to (B, e, h, w) float32, before normalization.

        The result holds mean and standard deviation if the autoencoder is stochastic, otherwise the latents.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self._encode(self.spec.to_pixels(images.to(self.device))).float()

    def sample(self, encoded: Tensor, noise: Tensor) -> Tensor:
        """Draw normalized latents (B, c, h, w) from `encoded` (B, e, h, w), with `noise` if stochastic."""
        if self.spec.stochastic:
            mean, std = encoded.chunk(2, dim=1)
            encoded = mean + std * noise.to(mean.device)
        return self.spec.normalize(encoded)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized `latents` (B, c, h, w) to pixels (B, C, H, W) float32, in fp32 even under autocast."""
        with torch.autocast(self.device.type, enabled=False):
            pixels = self._decode(self.spec.denormalize(latents.to(self.device, torch.float32)))
        return pixels.clamp(*self.spec.image_range)
