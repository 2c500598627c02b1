"""Inception from its TorchScript file: pooled features, spatial features and class probabilities in one pass.

The file's own methods return either features or probabilities, and no intermediate layer. Its layers are therefore
called one by one, and checked against its own methods on loading.

Legend: N images, C channels, H x W pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch import Tensor

from afm_pipe.evaluation.networks import LEGACY, SPATIAL, FeatureNetwork, rgb
from afm_pipe.runtime.errors import UserError

DIM, SIDE = 2048, 299
MAP, CHANNELS = 17, 7  # ADM's sFID: the first seven channels of mixed_6/conv, 17 x 17
TOLERANCE = 1e-3  # largest difference from the outputs of the file's own methods, relative to their magnitude


def inception(name: str, path: Path, sha256: str, device: torch.device) -> list[FeatureNetwork]:
    """Return Inception with the resize mode of `name`; TensorFlow's adds probabilities and the spatial features.

    Raises UserError if the file has other layers.
    """
    mode = name.removeprefix("inception_")
    model = InceptionV3W(str(path.parent), download=False, resize_inside=name == LEGACY).to(device).eval()
    if name != LEGACY:
        resize = build_resizer(mode)

        def extract(images: Tensor) -> Tensor:
            pixels = rgb(images).permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
            resized = np.stack([resize(picture) for picture in pixels])
            return model(torch.from_numpy(resized).float().permute(0, 3, 1, 2).contiguous().to(device))

        return [FeatureNetwork(name, DIM, sha256, extract)]
    layered = _Layered(model.base, device)
    layered.check(path)
    return [
        FeatureNetwork(name, DIM, sha256, layered.pooled, probabilities=layered.probabilities),
        FeatureNetwork(SPATIAL, CHANNELS * MAP**2, sha256, layered.spatial),
    ]


class _Layered:
    """Inception, run layer by layer; caches the last batch, so that pooled and spatial features share one pass."""

    def __init__(self, base: Any, device: torch.device) -> None:
        self.base, self.device = base, device
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def pooled(self, images: Tensor) -> Tensor:  # (N, C, H, W) uint8 -> (N, 2048)
        return self._run(images)[0]

    def spatial(self, images: Tensor) -> Tensor:  # (N, C, H, W) uint8 -> (N, 2023)
        return self._run(images)[1]

    def probabilities(self, features: Tensor) -> Tensor:
        """Return class probabilities (N, 1008) of features (N, 2048), without bias: the score's definition."""
        return F.softmax(F.linear(features.to(self.device), self.base.output.weight), dim=1)

    @torch.no_grad()
    def check(self, path: Path) -> None:
        """Raise UserError unless the layers reproduce the outputs of the file's own methods."""
        images = torch.randint(0, 256, (2, 3, 64, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        try:
            pooled, spatial = self._run(images)
            features = self.base(images.to(self.device), return_features=True).view(2, DIM)
            score = self.base(images.to(self.device), no_output_bias=True)
            error = max(
                float((pooled - features).abs().max() / features.abs().max()),
                float((self.probabilities(features) - score).abs().max() / score.max()),
            )
            wrong = None if error < TOLERANCE else f"features {error:.2g} off its own"
            if spatial.shape[1] != CHANNELS * MAP**2:
                wrong = f"{spatial.shape[1]} spatial features"
        except (AttributeError, RuntimeError, TypeError) as raised:
            wrong = str(raised).strip().splitlines()[-1]
        if wrong:
            raise UserError(
                f"Found {path} with other layers ({wrong}), expected those of TensorFlow's Inception of "
                "2015-12-05: put that file there."
            )

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._last is None or self._last[0] is not images:
            x, spatial = _resized(rgb(images).to(self.device).float()), None
            x = (x - 128) / 128
            for name, layer in self.base.layers.named_children():
                if name == "mixed_6":
                    # The published statistics have TensorFlow's order: channels last.
                    spatial = layer.conv(x)[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1)
                x = layer(x)
            if spatial is None:
                raise AttributeError("no layer mixed_6")
            self._last = images, x.view(len(images), DIM), spatial
        return self._last[1:]


def _resized(images: Tensor) -> Tensor:
    """Resize to 299 x 299 as TensorFlow 1 does: bilinear, pixel i of the result from i * H / 299, edges repeated."""
    axes = []
    for size in images.shape[2:]:
        source = torch.arange(SIDE, device=images.device) * (size / SIDE)
        axes.append((2 * source + 1) / size - 1)  # grid_sample's coordinates: -1 and 1 are the edges of the image
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1).expand(len(images), -1, -1, -1)  # (N, 299, 299, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
