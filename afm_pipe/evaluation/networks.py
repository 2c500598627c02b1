"""What a feature network is, and what the measures in its features are called.

Shapes: B images, C channels, H x W pixels, D features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

LEGACY, SPATIAL = "inception_legacy_tensorflow", "inception_spatial"


class Names(NamedTuple):
    """What the measures in a network's features are called: in tables, and as keys; without a key, not taken.

    `kid_rescaled`: KID's kernel (x y / D + 1)^3 suits features about 1 in size, as Inception's are; others are divided
    by the root mean square of the real images' before it.
    """

    title: str
    distance: str
    kid: str | None
    kid_rescaled: bool
    precision: str | None = None
    recall: str | None = None
    score: str | None = None


NAMES = {
    "classifier": Names(
        "FD (classifier)", "fd_classifier", "kid_classifier", True, "precision_classifier", "recall_classifier"
    ),
    "inception_clean": Names("FID (clean)", "fid_clean", "kid_clean", False, "precision_clean", "recall_clean"),
    "inception_legacy_tensorflow": Names("FID", "fid", "kid", False, "precision", "recall", "inception_score"),
    SPATIAL: Names("sFID", "sfid", None, False),
    "efficientnet": Names(
        "FD (EfficientNet-Lite0)",
        "fd_efficientnet",
        "kid_efficientnet",
        True,
        "precision_efficientnet",
        "recall_efficientnet",
    ),
    "dinov2": Names("FD (DINOv2)", "fd_dinov2", "kid_dinov2", True, "precision_dinov2", "recall_dinov2"),
}


RESIZE = {
    "classifier": "none",
    "inception_clean": "clean-fid clean: antialiased bicubic to 299",
    LEGACY: "TensorFlow 1 bilinear to 299",
    SPATIAL: "TensorFlow 1 bilinear to 299",
    "efficientnet": "antialiased bicubic to 224",
    "dinov2": "antialiased bicubic to 224",
}


@dataclass(frozen=True)
class FeatureNetwork:
    """Maps uint8 images (B, C, H, W) to float32 features (B, D) on the CPU.

    `head`, where there is one, maps features (B, D) on to class logits (B, K); `probabilities` to those of Inception's
    1,008 classes, for its score.
    """

    name: str
    dim: int
    sha256: str
    extract: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None = None
    probabilities: Callable[[Tensor], Tensor] | None = None

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
