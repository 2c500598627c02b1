"""The generator network: maps a noisy latent and a class to a latent in one forward pass."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.models.dit import DiT, LabelEmbedder, TimestepEmbedder, linear, modulate
from afm_pipe.params.sizes import ModelSize

Times = Literal["none", "source", "both"]


class FinalLayer(nn.Module):
    """Adaptive LayerNorm and projection to patches, initialized to output zeros.

    Where latents have more channels than the blocks, a wide hidden layer precedes the projection, since a linear one
    could reach only a subspace of `size.width` dimensions (as does the wide head of Zheng et al. 2025, section 5).
    """

    def __init__(self, size: ModelSize, channels: int) -> None:
        super().__init__()
        outputs, inputs = size.patch**2 * channels, size.width
        self.wide = channels > size.width
        if self.wide:
            self.hidden = linear(size.width, outputs)
            inputs = outputs
        self.linear = linear(inputs, outputs, std=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(size.width, 2 * size.width, std=0))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, p * p * C)
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        x = modulate(x, shift, scale)
        if self.wide:
            x = F.gelu(self.hidden(x), approximate="tanh")  # (N, T, p * p * C)
        return self.linear(x)


class Generator(DiT):
    """DiT generator g (paper section 3).

    `times`: times to condition on: none (one step), source (a fixed number of steps), or source and target (any-step).
    `repeats`: number of passes through the blocks (2 or 4 in deep models); pass k of r is also conditioned on time
    1 - k / r, but the final layer is not.
    """

    time_embedder: type[TimestepEmbedder] = TimestepEmbedder

    def __init__(
        self,
        size: ModelSize,
        channels: int,
        latent_size: int,
        num_classes: int,
        times: Times = "none",
        repeats: int = 1,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(size, channels, latent_size, qk_norm)
        self.times, self.repeats = times, repeats
        self.y_embedder = LabelEmbedder(num_classes, size.width)
        if times != "none" or repeats > 1:
            self.t_embedder = self.time_embedder(size.width)
        if times == "both":
            self.t_tgt_embedder = TimestepEmbedder(size.width, bias="torch")  # as released
        self.final_layer = FinalLayer(size, channels)

    def forward(self, x: Tensor, labels: Tensor, s: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Map latents x (N, C, H, W) and labels (N,) to (N, C, H, W); s, t (N,) are source and target times."""
        condition = self.y_embedder(labels)  # (N, D)
        if self.times != "none":
            condition = condition + self.t_embedder(s)
        if self.times == "both":
            condition = condition + self.t_tgt_embedder(t)
        tokens = self.embed(x)  # (N, T, D)
        for k in range(self.repeats):
            pass_condition = condition
            if self.repeats > 1:
                pass_condition = condition + self.t_embedder(x.new_full((1,), 1 - k / self.repeats))
            tokens = self.run_blocks(tokens, pass_condition)
        return self._unpatchify(self.final_layer(tokens, condition))

    def _unpatchify(self, patches: Tensor) -> Tensor:  # (N, T, p * p * C) -> (N, C, H, W)
        p, side = self.size.patch, self.latent_size // self.size.patch
        pixels = patches.view(-1, side, side, p, p, self.channels)
        return torch.einsum("nhwpqc->nchpwq", pixels).reshape(-1, self.channels, self.latent_size, self.latent_size)
