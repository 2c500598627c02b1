"""Networks whose features images are compared in, by name.

Only distances in Inception's features are called FID. Those of one mode or network are never comparable with another's,
so each network carries a hash that is stored with what was measured.

Shapes: B images, C channels, H x W pixels, D features, K classes.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from afm_pipe.evaluation.classifier import CONFIG, WEIGHTS, load_classifier
from afm_pipe.evaluation.inception import inception
from afm_pipe.evaluation.networks import LEGACY, NAMES, SPATIAL, FeatureNetwork, Names
from afm_pipe.evaluation.other_networks import dinov2, efficientnet
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file, sha256_files

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
CPU = torch.device("cpu")

__all__ = ["LEGACY", "NAMES", "SPATIAL", "FeatureNetwork", "Names", "inception_path", "load_network", "load_networks"]


def load_networks(
    names: Sequence[str],
    reference_dir: Path,
    device: torch.device = CPU,
    *,
    dinov2_sha256: str | None = None,
    inception_sha256: str = INCEPTION_SHA256,
) -> list[FeatureNetwork]:
    """Load feature networks, in order; with Inception of TensorFlow's resizing come its spatial features, for sFID.

    The classifier is in the reference's folder, EfficientNet-Lite0 in its package, the others in the folder of weights.
    Raises UserError when a file is missing or another.
    """
    networks: list[FeatureNetwork] = []
    for name in names:
        if name == "classifier":
            networks.append(_classifier(reference_dir, device))
        elif name == "efficientnet":
            networks.append(FeatureNetwork(name, *efficientnet(device)))
        elif name == "dinov2":
            networks.append(FeatureNetwork(name, *dinov2(device, dinov2_sha256)))
        else:
            networks += inception(name, inception_path(inception_sha256), inception_sha256, device)
    return networks


def load_network(
    name: str,
    reference_dir: Path,
    device: torch.device = CPU,
    *,
    dinov2_sha256: str | None = None,
    inception_sha256: str = INCEPTION_SHA256,
) -> FeatureNetwork:
    """Load one feature network, as `load_networks`."""
    networks = load_networks(
        [name], reference_dir, device, dinov2_sha256=dinov2_sha256, inception_sha256=inception_sha256
    )
    return networks[0]


def inception_path(sha256: str = INCEPTION_SHA256) -> Path:
    """Return where the Inception file is: in $AFM_WEIGHTS, or ./weights. Raises UserError when missing or another."""
    path = Path(os.environ.get("AFM_WEIGHTS", "weights")) / INCEPTION_FILE
    wanted = f"expected Inception with sha256 {sha256}"
    remedy = f"download {INCEPTION_URL} to {path} (AFM_WEIGHTS names another folder), or evaluate without inception_*"
    if not path.is_file():
        raise UserError(f"Found no {path}, {wanted}: {remedy}.")
    found = sha256_file(path)
    if found != sha256:  # before loading: TorchScript is code
        raise UserError(f"Found {path} with sha256 {found}, {wanted}: {remedy}.")
    return path


def _classifier(folder: Path, device: torch.device) -> FeatureNetwork:
    model = load_classifier(folder, device)
    channels = model.config["channels"]

    def extract(images: Tensor) -> Tensor:
        if images.shape[1] != channels:
            raise UserError(
                f"Found images of {images.shape[1]} channels, expected {channels} as the classifier in {folder} has: "
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
