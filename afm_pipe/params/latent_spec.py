"""The description of a latent space, for all code that stores, draws, generates or decodes latents.

Legend: B batch size; c, h, w channels, height and width of a latent; C, H, W of an image.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LatentSpec:
    """Shape and normalization of an autoencoder's latents, and the range of its images."""

    shape: tuple[int, int, int]  # (c, h, w)
    stochastic: bool
    """Whether the encoder outputs a mean and a standard std to sample from, rather than the latent itself."""
    scaling_factor: float | None = 1.0
    """Factor on latents that gives them about unit variance; None where params say `measured`."""
    mean: "Tensor | None" = None  # broadcasts to (c, h, w)
    """Subtracted elementwise from latents before they are divided by `std`."""
    std: "Tensor | None" = None  # same shape as mean
    image_range: tuple[float, float] = (-1.0, 1.0)
    """Pixel values that 0 and 255 map to."""

    @property
    def encoded_shape(self) -> tuple[int, int, int]:
        """Shape of the encoder's output: mean and standard std, concatenated along channels, or the latent."""
        channels, height, width = self.shape
        return (2 * channels if self.stochastic else channels), height, width

    def normalize(self, latents: "Tensor") -> "Tensor":
        """Normalize the autoencoder's latents (B, c, h, w) to about zero mean and unit variance, on their device."""
        assert self.scaling_factor is not None
        if self.mean is not None and self.std is not None:
            latents = (latents - self.mean.to(latents.device)) / self.std.to(latents.device)
        return latents * self.scaling_factor

    def denormalize(self, latents: "Tensor") -> "Tensor":
        """Undo `normalize`, on the latents' device."""
        assert self.scaling_factor is not None
        latents = latents / self.scaling_factor
        if self.mean is not None and self.std is not None:
            latents = latents * self.std.to(latents.device) + self.mean.to(latents.device)
        return latents

    def to_pixels(self, images: "Tensor") -> "Tensor":
        """Map images (B, C, H, W) uint8 to float32 in `image_range`."""
        low, high = self.image_range
        return images.float() / (255 / (high - low)) + low

    def to_uint8(self, pixels: "Tensor") -> "Tensor":
        """Quantize images in `image_range` to uint8 by rounding: the values a PNG file holds."""
        low, high = self.image_range
        return ((pixels.float() - low) * (255 / (high - low))).round().clamp(0, 255).byte()
