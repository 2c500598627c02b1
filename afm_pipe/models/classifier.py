"""The guidance classifier C(x_t, t): a DiT conditioned on time, with class logits from a learned class token."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from afm_pipe.data.classes import require_same_classes
from afm_pipe.models.dit import DiT, TimestepEmbedder
from afm_pipe.models.model_files import ModelConfig, load_network
from afm_pipe.params.sizes import SIZES, ModelSize
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json


class LatentClassifier(DiT):
    """Classify noisy latents at a known time (paper section 3)."""

    def __init__(self, size: ModelSize, channels: int, latent_size: int, num_classes: int) -> None:
        super().__init__(size, channels, latent_size)
        self.t_embedder = TimestepEmbedder(size.width)
        self.cls_embed = nn.Parameter(torch.randn(size.width) * 0.02)
        self.final_layer = nn.Sequential(  # the head keeps torch's initial weights, as released
            nn.LayerNorm(size.width, eps=1e-6, elementwise_affine=False), nn.Linear(size.width, num_classes)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map latents x (N, C, H, W) at times t (N,) to class logits (N, K)."""
        return self.head(self.features(x, t))

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """Map latents x (N, C, H, W) at times t (N,) to the features (N, D) that the head classifies."""
        token = self.cls_embed.expand(len(x), 1, -1)
        tokens = self.run_blocks(torch.cat([token, self.embed(x)], dim=1), self.t_embedder(t))  # (N, 1 + T, D)
        return self.final_layer[0](tokens[:, 0])

    def head(self, features: Tensor) -> Tensor:
        """Map features (N, D) to class logits (N, K)."""
        return self.final_layer[1](features)


def load_latent_classifier(folder: Path, device: torch.device, classes: Sequence[str]) -> LatentClassifier:
    """Load the classifier of a folder, in evaluation mode, for training on `classes`.

    Raises UserError if there is none, or if it does not fit.
    """
    description, path = read_json(folder / "config.json"), folder / "classifier.safetensors"
    try:
        shape = {name: description[name] for name in ("size", "channels", "latent_size", "num_classes")}
        config = ModelConfig.model_validate(shape)
        size = SIZES[config.size]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"Found {folder} without a classifier: add a `classifier` section to params and run `dvc repro classifier`."
        ) from None
    names, of = description.get("classes"), "the latents"
    require_same_classes(names, folder / "config.json", classes, of, config.num_classes)
    return load_network(
        lambda: LatentClassifier(size, config.channels, config.latent_size, config.num_classes), path, device
    )
