"""Load feature networks by name.

Only distances in Inception's features are called FID. Features of different networks or resize modes are not
comparable, so each network carries a hash that is stored with its measurements.

Legend: N images, C channels, H x W pixels, D features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from afm_pipe.autoencoders.encoders import DINOV2_MOMENTS, EFFICIENTNET_MOMENTS, TIMM_MODELS, dinov2, efficientnet_lite0
from afm_pipe.evaluation.classifier import CONFIG, WEIGHTS, load_classifier
from afm_pipe.evaluation.inception import inception
from afm_pipe.evaluation.networks import FeatureNetwork, rgb
from afm_pipe.params import Evaluate
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_files
from afm_pipe.runtime.weights import weights_file

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
DINOV2 = "dinov2_vitl14"
SIDE = 224  # of EfficientNet's and DINOv2's images
CPU = torch.device("cpu")


def load_networks(
    settings: Evaluate, reference_dir: Path, device: torch.device = CPU, names: Sequence[str] | None = None
) -> list[FeatureNetwork]:
    """Load the networks `names`, by default evaluate.features.

    Inception with TensorFlow's resizing comes with the network of sFID. The classifier is in `reference_dir`,
    EfficientNet-Lite0 in its package, the others in the weights folder. Raises UserError for a missing file or another
    hash.
    """
    networks: list[FeatureNetwork] = []
    for name in settings.features if names is None else names:
        if name == "classifier":
            networks.append(_classifier(reference_dir, device))
        elif name == "efficientnet":
            networks.append(_efficientnet(device))
        elif name == "dinov2":
            networks.append(_dinov2(settings.dinov2_sha256, device))
        else:
            networks += inception(name, inception_path(), INCEPTION_SHA256, device)
    return networks


def inception_path() -> Path:
    """Return the path of Inception. Raises UserError if it is missing or has another hash: TorchScript is code."""
    fix = f"download {INCEPTION_URL} to that folder, or evaluate without inception_*"
    return weights_file(INCEPTION_FILE, INCEPTION_SHA256, f"Inception, sha256 {INCEPTION_SHA256}", fix)[0]


def dinov2_path(sha256: str | None) -> Path:
    """Return the path of DINOv2's weights. Raises UserError if they are missing or have another hash than params."""
    fix = "put timm's model.safetensors there, set evaluate.dinov2_sha256, or leave dinov2 out of evaluate.features"
    path, found = weights_file(f"{DINOV2}.safetensors", sha256, TIMM_MODELS[DINOV2], fix)
    if sha256 is None:
        raise UserError(
            f"Found {path} with sha256 {found}, and evaluate.dinov2_sha256 null: if this is the intended file, set the "
            "param to this hash."
        )
    return path


def _classifier(folder: Path, device: torch.device) -> FeatureNetwork:
    model = load_classifier(folder, device)
    channels = model.config["channels"]

    def extract(images: Tensor) -> Tensor:
        if images.shape[1] != channels:
            raise UserError(
                f"Found images of {images.shape[1]} channels, expected {channels}, as the classifier in {folder} has: "
                "build the reference again."
            )
        return model.features(images.to(device))

    return FeatureNetwork(
        name="classifier",
        dim=int(model.head.in_features),
        sha256=sha256_files([folder / CONFIG, folder / WEIGHTS]),
        extract=extract,
        head=lambda features: model.head(features.to(device)),
    )


def _efficientnet(device: torch.device) -> FeatureNetwork:
    model, sha256 = efficientnet_lite0("leave efficientnet out of evaluate.features")
    model = model.to(device)
    standardized = _standardizer(*EFFICIENTNET_MOMENTS, device)
    return FeatureNetwork(
        "efficientnet", 1280, sha256, lambda x: model.extract_features(standardized(x)).mean(dim=(2, 3))
    )


def _dinov2(sha256: str | None, device: torch.device) -> FeatureNetwork:
    model = dinov2(DINOV2, dinov2_path(sha256), SIDE, "leave dinov2 out of evaluate.features").to(device)
    standardized = _standardizer(*DINOV2_MOMENTS, device)
    return FeatureNetwork("dinov2", int(model.num_features), str(sha256), lambda x: model(standardized(x)))


def _standardizer(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function that resizes uint8 images (N, C, H, W), antialiased bicubic, to (N, 3, 224, 224)."""
    shift, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))

    def standardized(images: Tensor) -> Tensor:
        x = F.interpolate(rgb(images.to(device)).float(), (SIDE, SIDE), mode="bicubic", antialias=True)
        return (x.clamp(0, 255) / 255 - shift) / scale

    return standardized
