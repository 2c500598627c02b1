"""The discriminator network: a latent, a class and, for several steps, a target time to one logit."""

import torch
from torch import Tensor, nn

from afm_pipe.models.dit import DiT, LabelEmbedder, TimestepEmbedder
from afm_pipe.params.sizes import ModelSize


class Discriminator(DiT):
    """A DiT like the generator's, with a learned token prepended whose output gives the logit (paper section 3).

    `time_conditioned`: condition on the target time (several steps).
    `source_conditioned`: concatenate G's input to the input, which the paper advises against.
    """

    def __init__(
        self,
        size: ModelSize,
        channels: int,
        latent_size: int,
        num_classes: int,
        time_conditioned: bool = False,
        qk_norm: bool = False,
        source_conditioned: bool = False,
    ) -> None:
        super().__init__(size, channels * (2 if source_conditioned else 1), latent_size, qk_norm)
        self.y_embedder = LabelEmbedder(num_classes, size.width)
        if time_conditioned:
            self.t_embedder = TimestepEmbedder(size.width)
        self.time_conditioned, self.source_conditioned = time_conditioned, source_conditioned
        self.dis_embed = nn.Parameter(torch.randn(size.width) * 0.02)
        self.final_layer = nn.Sequential(  # the head keeps torch's initial weights, as released
            nn.LayerNorm(size.width, eps=1e-6, elementwise_affine=False), nn.Linear(size.width, 1, bias=False)
        )

    def forward(self, x: Tensor, labels: Tensor, t: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """Map latents x (N, C, H, W), labels (N,) and target times t (N,) to logits (N,).

        `source` (N, C, H, W), G's input, is used only with `source_conditioned`.
        """
        if self.source_conditioned:
            assert source is not None, "this discriminator needs G's input"
            x = torch.cat([x, source], dim=1)
        condition = self.y_embedder(labels)  # (N, D)
        if self.time_conditioned:
            condition = condition + self.t_embedder(t)
        token = self.dis_embed.expand(len(x), 1, -1)
        tokens = self.run_blocks(torch.cat([token, self.embed(x)], dim=1), condition)  # (N, 1 + T, D)
        return self.final_layer(tokens[:, 0]).squeeze(-1)
