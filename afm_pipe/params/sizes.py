"""DiT size presets (paper Table 10)."""

from typing import NamedTuple


class ModelSize(NamedTuple):
    """Blocks, channels, attention heads and patch side (in latent pixels) of a DiT."""

    depth: int
    width: int
    heads: int
    patch: int


SIZES = {
    # name            depth     width      heads     patch
    "t4": ModelSize(depth=4, width=128, heads=4, patch=4),  # 4 tokens on 8x8 latents
    "s4": ModelSize(depth=2, width=128, heads=4, patch=4),  # half the depth, for repeated blocks
    "t2": ModelSize(depth=4, width=128, heads=4, patch=2),
    "b2": ModelSize(depth=12, width=768, heads=12, patch=2),
    "m2": ModelSize(depth=16, width=1024, heads=16, patch=2),
    "l2": ModelSize(depth=24, width=1024, heads=16, patch=2),
    "xl2": ModelSize(depth=28, width=1152, heads=16, patch=2),
    "t1": ModelSize(depth=4, width=128, heads=4, patch=1),  # patch 1: latents with many channels and short sides
    "b1": ModelSize(depth=12, width=768, heads=12, patch=1),
    "xl1": ModelSize(depth=28, width=1152, heads=16, patch=1),
}

SMALL_WIDTH = 256
"""Networks up to this width train about as fast on one core of a CPU as on two: on a CPU they get one thread each."""


def is_small(size: str) -> bool:
    """Return whether networks of a size get one thread each on a CPU."""
    return SIZES[size].width <= SMALL_WIDTH


def block_work(size: str) -> float:
    """Estimate the work of a pass through a network's blocks, in no particular unit."""
    depth, width, _, patch = SIZES[size]
    return depth * (width / patch) ** 2
