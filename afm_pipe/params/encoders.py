"""Pretrained encoders whose feature maps can be latents: the shape of the map after each of their layers."""

from typing import NamedTuple


class FeatureMap(NamedTuple):
    """Channels of a feature map, and input pixels per element of it along a side."""

    channels: int
    stride: int


class Encoder(NamedTuple):
    """The maps of an encoder after its layers 1, 2, ..., and where its weights come from."""

    maps: tuple[FeatureMap, ...]
    weights: str | None
    """File in the weights folder, as timm distributes it; None: the weights come with a pip package."""


def _stages(*stages: tuple[int, int, int]) -> tuple[FeatureMap, ...]:
    """Return the maps of stages (layers, channels, stride)."""
    return tuple(FeatureMap(channels, stride) for layers, channels, stride in stages for _ in range(layers))


ENCODERS = {
    # name                        maps: layers, channels, stride       weights
    "efficientnet_lite0": Encoder(
        _stages((1, 16, 2), (2, 24, 4), (2, 40, 8), (3, 80, 16), (3, 112, 16), (4, 192, 32), (1, 320, 32)), None
    ),
    "dinov2_vits14": Encoder(_stages((12, 384, 14)), "dinov2_vits14.safetensors"),
    "dinov2_vitb14": Encoder(_stages((12, 768, 14)), "dinov2_vitb14.safetensors"),
    "dinov2_vitl14": Encoder(_stages((24, 1024, 14)), "dinov2_vitl14.safetensors"),
}
