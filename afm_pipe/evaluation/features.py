"""Networks whose features images are compared in, by name.

Only distances in Inception's features are called FID. Those of one mode or network are never comparable with another's,
so each network carries a hash that is stored with what was measured.

Shapes: B images, C channels, H x W pixels, D features, K classes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch import Tensor

from afm_pipe.errors import UserError
from afm_pipe.evaluation.classifier import CONFIG, WEIGHTS, load_classifier
from afm_pipe.files import sha256_file, sha256_files

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_DIM = 2048
CPU = torch.device("cpu")


class Names(NamedTuple):
    """What the measures in a network's features are called: in tables, and as keys.

    `kid_rescaled`: KID's kernel (x y / D + 1)^3 suits features about 1 in size, as Inception's are; others are divided
    by the root mean square of the real images' before it.
    """

    title: str
    distance: str
    kid: str
    kid_rescaled: bool


NAMES = {
    "classifier": Names("FD (classifier)", "fd_classifier", "kid_classifier", kid_rescaled=True),
    "inception_clean": Names("FID (clean)", "fid_clean", "kid_clean", kid_rescaled=False),
    "inception_legacy_tensorflow": Names("FID", "fid", "kid", kid_rescaled=False),
}


@dataclass(frozen=True)
class FeatureNetwork:
    """Maps uint8 images (B, C, H, W) to float32 features (B, D) on the CPU.

    `head`, where there is one, maps features (B, D) on to class logits (B, K).
    """

    name: str
    dim: int
    sha256: str
    extract: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None = None

    @property
    def title(self) -> str:
        return NAMES[self.name].title

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features = self.extract(images).float().cpu()  # (B, D)
        if not features.isfinite().all():
            raise UserError(f"Found features of {self.name} that are not finite, expected numbers: check its weights.")
        return features

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Return the class (B,) each row of features is put in. Raises UserError for a network without classes."""
        if self.head is None:
            raise UserError(f"Found no classes in {self.name}, expected the classifier: add it to evaluate.features.")
        return self.head(features).argmax(dim=1).cpu()


def load_network(
    name: str, reference_dir: Path, device: torch.device = CPU, inception_sha256: str = INCEPTION_SHA256
) -> FeatureNetwork:
    """Load a feature network: the classifier from the reference's folder, Inception from the folder of weights.

    Raises UserError when its file is missing or another.
    """
    if name == "classifier":
        return _classifier(reference_dir, device)
    return _inception(name, inception_path(inception_sha256), inception_sha256, device)


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


def _inception(name: str, path: Path, sha256: str, device: torch.device) -> FeatureNetwork:
    mode = name.removeprefix("inception_")
    model = InceptionV3W(str(path.parent), download=False, resize_inside=mode == "legacy_tensorflow").to(device).eval()
    resize = build_resizer(mode)  # the identity for legacy_tensorflow, which resizes inside

    def extract(images: Tensor) -> Tensor:
        rgb = images if images.shape[1] == 3 else images.repeat(1, 3, 1, 1)
        pixels = rgb.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        resized = np.stack([resize(picture) for picture in pixels])
        return model(torch.from_numpy(resized).float().permute(0, 3, 1, 2).contiguous().to(device))

    return FeatureNetwork(name=name, dim=INCEPTION_DIM, sha256=sha256, extract=extract)
