"""The update of G and D as written down from the paper, with the same result and the same counted work.

afm_pipe differs in speed alone: one forward pass of D over real, generated and perturbed latents (here four passes);
fused AdamW, norms and EMA over all tensors at once (here a loop over parameters); patches by a matrix product instead
of a strided convolution; scale, shift and gate in one pass over memory. `tests/test_benchmarks.py` compares weights.

`online` adds what the released trainer does at every step: images through the VAE's encoder in bf16, instead of latents
that were encoded once.
"""

import copy
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.models.dit import Attention, Block, DiT, PatchEmbed
from afm_pipe.models.generator import FinalLayer
from afm_pipe.params import Run


class Straightforward:
    """G, D, their optimizers and G's moving average, for the direct form in one step."""

    def __init__(self, run: Run, generator: DiT, discriminator: DiT) -> None:
        self.run, self.mean_square, self.count = run, torch.zeros(()), 0
        self.generator, self.discriminator = plain(generator), plain(discriminator)
        self.ema = copy.deepcopy(self.generator).requires_grad_(False)
        options: dict[str, Any] = {"lr": run.lr, "betas": run.betas, "eps": run.eps, "weight_decay": run.weight_decay}
        self.adam_g = torch.optim.AdamW(self.generator.parameters(), foreach=False, **options)
        self.adam_d = torch.optim.AdamW(self.discriminator.parameters(), foreach=False, **options)

    def update(self, real: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor],
               noise: tuple[Tensor, Tensor], transport: float) -> tuple[float, float]:  # fmt: skip
        """Update D, then G, each on its own latents (N, C, H, W), noise and labels; return both losses."""
        return self.update_d(real[0], z[0], labels[0], noise), self.update_g(real[1], z[1], labels[1], transport)

    def update_d(self, real: Tensor, z: Tensor, labels: Tensor, noise: tuple[Tensor, Tensor]) -> float:
        """Update D. `noise` (n, C, H, W) perturbs the first n real and the first n generated latents."""
        run, n = self.run, len(noise[0])
        with torch.no_grad():
            fake = self.generator(z, labels)
        real_logits, fake_logits = self.discriminator(real, labels), self.discriminator(fake, labels)
        epsilon = run.penalty.epsilon
        r1 = (self.discriminator(real[:n] + epsilon * noise[0], labels[:n]) - real_logits[:n]) / epsilon
        r2 = (self.discriminator(fake[:n] + epsilon * noise[1], labels[:n]) - fake_logits[:n]) / epsilon
        loss = F.softplus(-(real_logits - fake_logits)).mean()
        loss = loss + run.penalty.weight * (r1.square().mean() + r2.square().mean())
        loss = loss + run.logit_centering * (real_logits + fake_logits).square().mean()
        self.adam_d.zero_grad()
        loss.backward()
        clip(self.discriminator, None)
        self.adam_d.step()
        return loss.item()

    def update_g(self, real: Tensor, z: Tensor, labels: Tensor, transport: float) -> float:
        """Update G and its moving average."""
        self.discriminator.requires_grad_(False)
        fake = self.generator(z, labels)
        with torch.no_grad():
            real_logits = self.discriminator(real, labels)
        fake_logits = self.discriminator(_Normalized.apply(fake, self), labels)
        loss = F.softplus(-(fake_logits - real_logits)).mean() + transport * (fake - z).square().mean()
        self.adam_g.zero_grad()
        loss.backward()
        clip(self.generator, None)
        self.adam_g.step()
        self.discriminator.requires_grad_(True)
        decay = (
            min(self.run.ema.decay, (1 + self.count) / (10 + self.count)) if self.run.ema.warmup else self.run.ema.decay
        )
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                average.mul_(decay).add_(weight, alpha=1 - decay)
        self.count += 1
        return loss.item()


class _Normalized(torch.autograd.Function):
    """Identity whose backward pass normalizes the gradient, as the paper states it."""

    @staticmethod
    def forward(context: Any, fake: Tensor, owner: Straightforward) -> Tensor:
        context.owner = owner
        return fake.view_as(fake)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), owner = gradients, context.owner
        decay = owner.run.gradient_normalization.decay
        square = gradient.square().sum() * gradient.numel()
        owner.mean_square = decay * owner.mean_square + (1 - decay) * square
        return gradient / (owner.mean_square.sqrt() + 1e-8), None


def clip(module: nn.Module, largest: float | None) -> float:
    """Return the norm of a module's gradients; scale them down to `largest`, if given."""
    total = 0.0
    for parameter in module.parameters():
        total += parameter.grad.square().sum().item() if parameter.grad is not None else 0.0
    norm = total**0.5
    if largest is not None and norm > largest:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(largest / norm)
    return norm


def plain(network: DiT) -> DiT:
    """Make the modules of a network compute as they read in the paper; return it."""
    for module in network.modules():
        for kind, forward in FORWARDS.items():
            if isinstance(module, kind):
                module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    return network


def _patches(self: PatchEmbed, x: Tensor) -> Tensor:
    return self.proj(x).flatten(2).transpose(1, 2)


def _attention(self: Attention, x: Tensor) -> Tensor:
    n, tokens, width = x.shape
    q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
    if self.qk_norm:
        q, k = self.q_norm(q), self.k_norm(k)
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _block(self: Block, x: Tensor, condition: Tensor) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
    x = x + gate_a.unsqueeze(1) * self.attn(_modulate(x, shift_a, scale_a))
    return x + gate_m.unsqueeze(1) * self.mlp(_modulate(x, shift_m, scale_m))


def _final(self: FinalLayer, x: Tensor, condition: Tensor) -> Tensor:
    shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
    return self.linear(_modulate(x, shift, scale))


FORWARDS: dict[type[nn.Module], Any] = {PatchEmbed: _patches, Attention: _attention, Block: _block, FinalLayer: _final}


def online_encode(vae: Any, images: Tensor) -> Tensor:
    """Encode images (N, 3, S, S) in [-1, 1] in bf16 and sample their latents, as the released trainer does per step."""
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
        latents = vae.encode(images).latent_dist.sample()
    return latents.float() * 0.18215
