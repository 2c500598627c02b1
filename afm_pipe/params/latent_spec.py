"""What a latent space looks like to everything that stores, draws, generates or decodes latents.

Legend: B images of a batch, c, h, w channels, height and width of a latent, C, H, W of an image.
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
    """Encoding gives a mean and a standard deviation, which training samples from; else it gives the latent itself."""
    scaling_factor: float | None = 1.0
    """Factor on latents that brings them to about unit variance; None in params that leave it to be measured."""
    mean: "Tensor | None" = None  # broadcasts to (c, h, w)
    """Subtracted from latents, element by element, before they are divided by `deviation`."""
    deviation: "Tensor | None" = None  # of the shape of mean
    image_range: tuple[float, float] = (-1.0, 1.0)
    """Pixel values that 0 and 255 stand for."""

    @property
    def encoded_shape(self) -> tuple[int, int, int]:
        """Shape of what encoding gives: mean and standard deviation, one after the other along the channels, or a
        latent."""
        channels, height, width = self.shape
        return (2 * channels if self.stochastic else channels), height, width

    def normalize(self, latents: "Tensor") -> "Tensor":
        """Bring latents (B, c, h, w) of the autoencoder to about zero mean and unit variance."""
        assert self.scaling_factor is not None
        if self.mean is not None and self.deviation is not None:
            latents = (latents - self.mean) / self.deviation
        return latents * self.scaling_factor

    def denormalize(self, latents: "Tensor") -> "Tensor":
        """Undo `normalize`, on the latents' device."""
        assert self.scaling_factor is not None
        latents = latents / self.scaling_factor
        if self.mean is not None and self.deviation is not None:
            latents = latents * self.deviation.to(latents.device) + self.mean.to(latents.device)
        return latents

    def to_pixels(self, images: "Tensor") -> "Tensor":
        """Map images (B, C, H, W) uint8 to float32 in `image_range`."""
        low, high = self.image_range
        return images.float() / (255 / (high - low)) + low

    def to_uint8(self, pixels: "Tensor") -> "Tensor":
        """Quantize images in `image_range` to uint8 by rounding: the values a PNG file holds."""
        low, high = self.image_range
        return ((pixels.float() - low) * (255 / (high - low))).round().clamp(0, 255).byte()
