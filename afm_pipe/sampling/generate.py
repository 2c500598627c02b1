"""Noise by index to latents to images; image i depends on the weights, the seed, i and its class alone.

Convolutions and matrix products round differently at other batch sizes and other places in a batch. So every forward
pass has the same size, and sample i always sits in slot i % size of it; slots nobody asked for hold zeros.

Shapes: B samples, c latent channels, h = w latent side, C image channels, H = W image side.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.distributed.mapping import map_across_ranks
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.flow import Flow
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError

UINT8_RULE = "round"  # as DiT and SiT do; the paper's released code truncates
CPU = torch.device("cpu")


def noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw noise by index: sample i comes from its own generator, seeded with seed + i (paper section 5).

    Returns (B, *shape) float32 on the CPU, where a seed means the same on every machine.
    """
    drawn = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed + i)) for i in indices]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


def labels_for(indices: Sequence[int], num_classes: int) -> Tensor:
    """Return the class of each index, classes in turn: (B,) int64. Equal shares are worth about 0.1 FID."""
    return torch.tensor([i % num_classes for i in indices], dtype=torch.int64)


def generate_latents(
    generator: Flow,
    seed: int,
    indices: Sequence[int],
    labels: Tensor,
    latent_shape: Sequence[int],
    micro_batch: int,
    device: torch.device = CPU,
    steps: int | None = None,
) -> Tensor:
    """Generate the latents of some samples, in any order: (B, c, h, w) float32; `steps` as `Flow.sample` takes them.

    Raises UserError when a latent is not finite.
    """
    latents = torch.empty(len(indices), *latent_shape, device=device)
    for wanted, slots in _micro_batches(indices, micro_batch):
        batch = _latent_batch(generator, seed, indices, labels, wanted, slots, latent_shape, micro_batch, device, steps)
        latents[wanted] = batch[slots]
    return latents


def generate_images(
    generator: Flow,
    vae: Any,
    seed: int,
    indices: Sequence[int],
    labels: Tensor,
    latent_shape: Sequence[int],
    micro_batch: int,
    device: torch.device = CPU,
    steps: int | None = None,
) -> Tensor:
    """Generate some samples, in any order, and decode them: (B, C, H, W) uint8 on the CPU.

    Raises UserError when a latent is not finite.
    """
    images: dict[int, Tensor] = {}
    for wanted, slots in _micro_batches(indices, micro_batch):
        batch = _latent_batch(generator, seed, indices, labels, wanted, slots, latent_shape, micro_batch, device, steps)
        decoded = _decode(vae, batch)  # all slots: decoding rounds by batch size too
        images.update(zip(wanted, decoded[slots].cpu(), strict=True))
    return torch.stack([images[position] for position in range(len(indices))])


def images_of(
    generator: Flow,
    vae: Any,
    z: Tensor,
    labels: Tensor,
    micro_batch: int,
    device: torch.device = CPU,
    steps: int | None = None,
) -> Tensor:
    """Generate and decode at most a micro-batch of given noises (B, c, h, w): (B, C, H, W) uint8 on the CPU."""
    places = [f"noise {i}" for i in range(len(z))]
    latents = _whole_batch(generator, z, labels, list(range(len(z))), places, micro_batch, device, steps)
    return _decode(vae, latents)[: len(z)].cpu()


def stream_images(
    generator: Flow,
    vae: Any,
    params: Params,
    seed: int,
    count: int,
    num_classes: int,
    device: torch.device = CPU,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Yield `count` samples, a micro-batch at a time: indices, labels (B,), images (B, C, H, W) uint8.

    Micro-batches are shared out over the ranks; the main process gets all, in order, the others none. Memory does
    not grow with `count`. Raises UserError when a latent is not finite.
    """
    size = params.sample.micro_batch

    def generated(indices: range) -> list[Tensor]:
        labels = labels_for(indices, num_classes)
        return [generate_images(generator, vae, seed, indices, labels, params.latent_shape, size, device)]

    for indices, (images,) in map_across_ranks(micro_batches(range(count), size), generated, ranks):
        yield indices, labels_for(indices, num_classes), images


def micro_batches(indices: range, size: int) -> list[range]:
    """Cut indices, of which the first begins a micro-batch, into micro-batches."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def grid(images: Tensor | np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Lay out uint8 images (B, C, H, W) row by row on white, `gap` pixels apart; C is 1 or 3."""
    pictures = torch.as_tensor(images).cpu()
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = picture
    pixels = sheet.permute(1, 2, 0).numpy()  # (rows, columns, C)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _latent_batch(
    generator: Flow,
    seed: int,
    indices: Sequence[int],
    labels: Tensor,
    wanted: list[int],
    slots: list[int],
    latent_shape: Sequence[int],
    micro_batch: int,
    device: torch.device,
    steps: int | None,
) -> Tensor:
    """Generate one whole micro-batch, with `indices[wanted]` in `slots`."""
    asked = [indices[position] for position in wanted]
    names = [f"sample {index}, seed {seed}" for index in asked]
    drawn = noise(seed, asked, latent_shape)
    return _whole_batch(generator, drawn, labels[wanted], slots, names, micro_batch, device, steps)


@torch.inference_mode()
def _whole_batch(
    generator: Flow,
    noises: Tensor,
    labels: Tensor,
    slots: list[int],
    names: list[str],
    micro_batch: int,
    device: torch.device,
    steps: int | None,
) -> Tensor:
    """Generate one whole micro-batch from noises (B, c, h, w) in `slots` and zeros elsewhere; `names` is for errors."""
    z = torch.zeros(micro_batch, *noises.shape[1:])
    z[slots] = noises
    classes = torch.zeros(micro_batch, dtype=torch.int64)
    classes[slots] = labels
    given = () if steps is None else (steps,)
    latents = generator.sample(z.to(device), classes.to(device), *given).float()
    finite = latents[slots].flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise UserError(
            f"Found a latent that is not finite ({names[int(finite.int().argmin())]}), expected numbers: the "
            "generator's weights have diverged; train it again with a lower lr or another transport."
        )
    return latents


@torch.inference_mode()
def _decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    images = vae.decode(latents)
    if not images.isfinite().all():
        raise UserError("Found decoded images that are not finite, expected numbers: train the autoencoder again.")
    return vae.spec.to_uint8(images)


def _micro_batches(indices: Sequence[int], size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield positions in `indices` and their slots, grouped so that index i sits in slot i % size.

    An index asked for twice (with another class, say) goes into a batch of its own.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    seen: dict[int, int] = {}
    for position, index in enumerate(indices):
        repeat = seen[index] = seen.get(index, -1) + 1
        groups.setdefault((index // size, repeat), []).append(position)
    for wanted in groups.values():
        yield wanted, [indices[position] % size for position in wanted]
