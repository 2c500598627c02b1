"""Feature networks: their interface and the keys of their metrics.

Legend: N images, C channels, H x W pixels, D features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

LEGACY, SPATIAL = "inception_legacy_tensorflow", "inception_spatial"


class MetricNames(NamedTuple):
    """The keys of a network's metrics, and how its images are resized.

    `suffix` completes the keys kid, precision and recall; None means that only the Frechet distance is measured.
    `kid_rescaled` divides features by the root mean square of the real images' features before KID, whose kernel
    (x y / D + 1)^3 assumes features of magnitude 1, like Inception's.
    """

    distance: str
    suffix: str | None
    kid_rescaled: bool
    resize: str


METRIC_NAMES = {
    "classifier": MetricNames("fd_classifier", "_classifier", True, "none"),
    "efficientnet": MetricNames("fd_efficientnet", "_efficientnet", True, "antialiased bicubic to 224"),
    "dinov2": MetricNames("fd_dinov2", "_dinov2", True, "antialiased bicubic to 224"),
    "inception_clean": MetricNames("fid_clean", "_clean", False, "clean-fid clean: antialiased bicubic to 299"),
    LEGACY: MetricNames("fid", "", False, "TensorFlow 1 bilinear to 299"),
    SPATIAL: MetricNames("sfid", None, False, "TensorFlow 1 bilinear to 299"),
}


@dataclass(frozen=True)
class FeatureNetwork:
    """Maps uint8 images (N, C, H, W) to float32 features (N, D) on the CPU.

    `head` maps features (N, D) to class logits (N, K); `probabilities` maps them to the probabilities of Inception's
    1,008 classes, for the Inception Score. Networks without classes have neither.
    """

    name: str
    dim: int
    sha256: str
    extract: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None = None
    probabilities: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features = self.extract(images).float().cpu()  # (N, D)
        if not features.isfinite().all():
            raise UserError(f"Found non-finite features of {self.name}, expected finite values: check its weights.")
        return features

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Return the class (N,) of each row of features. Raises UserError for a network without classes."""
        if self.head is None:
            raise UserError(f"Found no classes in {self.name}, expected the classifier: add it to evaluate.features.")
        return self.head(features).argmax(dim=1).cpu()


def rgb(images: Tensor) -> Tensor:
    """Return images (N, 1 or 3, H, W) as (N, 3, H, W)."""
    return images.expand(-1, 3, -1, -1)
