"""The discriminator of continuous adversarial flows, which judges velocities by its derivative along them.

Legend: N latents, K velocities of each; T tokens with the learned one, D width. Tangents have a leading axis of K.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from afm_pipe.models.dit import Block, DiT, LabelEmbedder
from afm_pipe.models.velocity import FlowTimeEmbedder
from afm_pipe.params.sizes import ModelSize

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # by torch's own derivative formulas
# Gradients of weights through vmap are transposed; DistributedDataParallel copies them.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def along(function: Callable[..., Tensor], primals: tuple[Tensor, ...], *tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Return function(*primals), and its derivatives along each of K tangents: one vmapped JVP."""

    def one(*tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, primals, tangent)  # type: ignore[return-value]

    return torch.vmap(one, out_dims=(None, 0))(*tangents)  # type: ignore[arg-type]


def rms_norm(x: Tensor) -> Tensor:
    """Return x over its root mean square, without learned parameters."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class PathBlock(Block):
    """A block with RMSNorm in place of LayerNorm, and its derivatives along K tangents.

    Both are plain inputs and outputs of `forward`, so that checkpointing, sharding and data parallelism apply to a
    block as to any other. Attention is by matrix products, since fused kernels have no forward-mode derivative.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, condition: Tensor, dx: Tensor, dcondition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map tokens (N, T, D), conditions (N, D) and their tangents (K, N, T, D), (K, N, D) to tokens and tangents."""
        with sdpa_kernel(SDPBackend.MATH):
            return along(self._block, (x, condition), dx, dcondition)

    def _block(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(shift_a + rms_norm(x) * (1 + scale_a))
        return x + gate_m * self.mlp(shift_m + rms_norm(x) * (1 + scale_m))

    def compile(self, *args: object, **kwargs: object) -> None:
        """Stay uncompiled: torch.compile does not trace nested transforms."""


class PathDiscriminator(DiT):
    """A potential D(x_t, t, label) and its derivatives along velocities, by forward-mode differentiation."""

    block = PathBlock

    def __init__(
        self, size: ModelSize, channels: int, latent_size: int, num_labels: int, qk_norm: bool = False
    ) -> None:
        super().__init__(size, channels, latent_size, qk_norm)
        self.y_embedder = LabelEmbedder(num_labels, size.width)
        self.t_embedder = FlowTimeEmbedder(size.width)
        self.dis_embed = nn.Parameter(torch.randn(size.width) * 0.02)
        self.final_layer = nn.Sequential(nn.Identity(), nn.Linear(size.width, 1, bias=False))  # released key names

    def forward(self, x: Tensor, labels: Tensor, t: Tensor, velocities: Tensor) -> tuple[Tensor, Tensor]:
        """Return D (N,) of latents x (N, C, H, W), and dD/dt (K, N) along their velocities (K, N, C, H, W)."""
        tangents = len(velocities)
        ones = torch.ones_like(t).expand(tangents, -1)
        condition, dcondition = along(lambda t: self.t_embedder(1 - t), (t,), ones)
        condition = condition + self.y_embedder(labels)  # (N, D)
        token = self.dis_embed.expand(len(x), 1, -1)
        tokens, dtokens = along(lambda x: torch.cat([token, self.embed(x)], dim=1), (x,), velocities)
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if self.bf16 else nullcontext():
            for block in self.blocks:
                inputs = tokens, condition, dtokens, dcondition
                if self.checkpointing and torch.is_grad_enabled():
                    tokens, dtokens = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
                else:
                    tokens, dtokens = block(*inputs)
        return along(lambda x: self.final_layer(rms_norm(x)).squeeze(-1), (tokens[:, 0],), dtokens[:, :, 0])
