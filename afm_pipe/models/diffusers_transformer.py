"""The generator as a diffusers model, for export."""

from typing import Any, Literal

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from afm_pipe.models.flow import Flow
from afm_pipe.models.generator import Generator, Times
from afm_pipe.params.sizes import ModelSize


class AFMTransformer(ModelMixin, ConfigMixin):
    """A DiT generator with its parameterization (`form`) and number of steps."""

    @register_to_config
    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        patch: int,
        channels: int,
        latent_size: int,
        num_classes: int,
        times: Times = "none",
        repeats: int = 1,
        qk_norm: bool = False,
        form: Literal["direct", "residual"] = "direct",
        nfe: int | Literal["any"] = 1,
    ) -> None:
        super().__init__()
        size = ModelSize(depth, width, heads, patch)
        self.network = Generator(size, channels, latent_size, num_classes, times, repeats, qk_norm)

    def forward(self, noise: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        """Map noise (N, c, h, w) and labels (N,) to latents (N, c, h, w)."""
        config: Any = self.config
        return Flow(self.network, config.form, config.nfe).sample(noise, labels, steps)
