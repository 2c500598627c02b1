"""The DiT that generator, discriminator and classifier share (paper section 3; Peebles & Xie 2022).

Parameter names match the released checkpoints.

Shapes: N batch, C latent channels, H = W latent side, p patch, T = (H / p)^2 tokens, D width, h heads.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afm_pipe.params.sizes import ModelSize

Bias = Literal["zero", "torch"]
"""Initial biases of a linear layer: zero, or torch's default."""

FREQUENCIES = 256  # dimensions of the sinusoidal time embedding
TIME_SCALE = 1000.0  # times in [0, 1] are multiplied by this before the embedding (paper section 3)


class PatchEmbed(nn.Module):
    """Split a latent into patches and project each to the model's width."""

    def __init__(self, channels: int, size: ModelSize) -> None:
        super().__init__()
        self.patch = size.patch
        self.proj = nn.Conv2d(channels, size.width, size.patch, stride=size.patch, bias=True)
        with torch.no_grad():
            self.proj.weight.copy_(linear(channels * size.patch**2, size.width).weight.view_as(self.proj.weight))
            self.proj.bias.zero_()  # type: ignore[union-attr]  # there is a bias

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, T, D)
        # A stride-p convolution as a matmul over patches: many times faster than conv2d on small inputs.
        n, c, height, width = x.shape
        p = self.patch
        patches = x.view(n, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # (N, H/p, W/p, C, p, p)
        return F.linear(patches.reshape(n, -1, c * p * p), self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Embed times in [0, 1] with sinusoids and an MLP."""

    def __init__(self, width: int, bias: Bias = "zero") -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            linear(FREQUENCIES, width, std=0.02, bias=bias), nn.SiLU(), linear(width, width, std=0.02, bias=bias)
        )

    def forward(self, t: Tensor) -> Tensor:  # (N,) -> (N, D)
        angles = (TIME_SCALE * t).float()[:, None] * time_rates(t.device)  # (N, 128), fp32 for any dtype of the weights
        code = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(code.to(next(self.mlp.parameters()).dtype))


@cache
def time_rates(device: torch.device) -> Tensor:
    """Return the frequencies of the sinusoidal time embedding, 10000^(-i / 128): (128,) float32.

    The exponents are float32, as released. The exponential is computed in float64 and rounded, since float32 results
    differ between processors in the last bit, which times of up to 1000 amplify.
    """
    half = FREQUENCIES // 2
    exponents = -math.log(10000) / half * torch.arange(half, dtype=torch.float32, device="cpu")
    return exponents.double().exp().float().to(device)


class LabelEmbedder(nn.Module):
    """Embed class labels; there is no null class, since guidance comes from a classifier."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:  # (N,) -> (N, D)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention, optionally with RMS-normalized queries and keys."""

    def __init__(self, size: ModelSize, qk_norm: bool) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = linear(size.width, 3 * size.width)
        self.proj = linear(size.width, size.width)
        if qk_norm:
            self.q_norm = nn.RMSNorm(size.width // size.heads, eps=1e-6)
            self.k_norm = nn.RMSNorm(size.width // size.heads, eps=1e-6)
        self.qk_norm = qk_norm

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, h, T, D/h)
        if self.qk_norm:
            dtype = self.q_norm.weight.dtype  # autocast lowers q and k, not the norms
            q, k = self.q_norm(q.to(dtype)), self.k_norm(k.to(dtype))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with hidden width 4 D and tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = linear(width, 4 * width)
        self.fc2 = linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-LN transformer block with adaLN-Zero conditioning (shift, scale, gate), initialized to the identity."""

    def __init__(self, size: ModelSize, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(size, qk_norm)
        self.mlp = Mlp(size.width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(size.width, 6 * size.width, std=0))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, D)
        modulation = self.adaLN_modulation(condition)[:, None]  # (N, 1, 6 D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a, self.attn(modulate(x, shift_a, scale_a)))
        return torch.addcmul(x, gate_m, self.mlp(modulate(x, shift_m, scale_m)))


@contextmanager
def in_float32(network: nn.Module) -> Iterator[None]:
    """Compute the blocks of a DiT in float32 inside this context."""
    previous, network.bf16 = network.bf16, False  # type: ignore[assignment]
    try:
        yield
    finally:
        network.bf16 = previous


class DiT(nn.Module):
    """The shared trunk: patch embedding, position embedding, blocks."""

    pos_embed: Tensor
    block: type[Block] = Block
    bf16 = False  # autocast the blocks to bfloat16; the tokens between them stay in float32
    checkpointing = False  # recompute the blocks in the backward pass

    def __init__(self, size: ModelSize, channels: int, latent_size: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.size, self.channels, self.latent_size = size, channels, latent_size
        self.x_embedder = PatchEmbed(channels, size)
        self.register_buffer("pos_embed", sincos_positions(size.width, latent_size // size.patch))
        self.blocks = nn.ModuleList(self.block(size, qk_norm) for _ in range(size.depth))

    def embed(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, T, D)
        return self.x_embedder(x) + self.pos_embed

    def run_blocks(self, tokens: Tensor, condition: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, D)
        with torch.autocast(tokens.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            for block in self.blocks:
                if self.checkpointing and torch.is_grad_enabled():
                    tokens = checkpoint(block, tokens, condition, use_reentrant=False, preserve_rng_state=False)
                else:
                    tokens = block(tokens, condition)
        return tokens


def linear(inputs: int, outputs: int, std: float | None = None, bias: Bias = "zero") -> nn.Linear:
    """Return a linear layer with weights from N(0, std^2), or Xavier uniform if `std` is None."""
    layer = nn.Linear(inputs, outputs)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    if bias == "zero":
        nn.init.zeros_(layer.bias)
    return layer


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift; the norm has no learned parameters and eps 1e-6."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def sincos_positions(width: int, side: int) -> Tensor:
    """Return the fixed 2-D sine-cosine position embedding of a side x side grid: (1, side^2, width) float32.

    The first half of the channels encodes the column, the second half the row, as in the released weights.
    """
    rates = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates  # (side, D/4)
    code = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, D/2)
    columns, rows = code.repeat(side, 1), code.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=-1).float()[None]
