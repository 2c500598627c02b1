"""What this card does by itself: matrix products, attention, copies; and what an update takes by these alone."""

import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch
import torch.nn.functional as F

from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.counting import Work
from afm_pipe.training.capture import WARM_UP
from benchmarks.gpu.inputs import CARD, ON_CPU

ELEMENTWISE = 33  # times a block reads or writes its tokens in a forward pass or in its share of a backward pass


def seconds_of(work: Callable[[], object], repeats: int = 10) -> float:
    """Return the median seconds of a work, after rounds to warm up, in which updates are captured."""
    times = []
    for index in range(WARM_UP + 1 + repeats):
        wait()
        started = time.perf_counter()
        work()
        wait()
        if index > WARM_UP:
            times.append(time.perf_counter() - started)
    return median(times)


def wait() -> None:
    """Wait for the card."""
    if CARD.type == "cuda":
        torch.cuda.synchronize()


@cache
def matmul_rate(bf16: bool) -> float:
    """Return FLOP/s of matrix products of 8192 tokens of XL's MLP."""
    rows = 64 if ON_CPU else 8192
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = torch.randn(rows, 1152, device=CARD, dtype=dtype), torch.randn(4608, 1152, device=CARD, dtype=dtype)
    return 2 * rows * 1152 * 4608 / seconds_of(lambda: F.linear(left, right))


@cache
def attention_rate(bf16: bool) -> float:
    """Return FLOP/s of attention forward and backward at XL's shape."""
    images, dtype = (1 if ON_CPU else 32), torch.bfloat16 if bf16 else torch.float32
    q, k, v = (torch.randn(images, 16, 256, 72, device=CARD, dtype=dtype, requires_grad=True) for _ in range(3))
    flops = 3.5 * 4 * images * 16 * 256**2 * 72  # the backward pass recomputes the scores
    return flops / seconds_of(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())


@cache
def copy_rate() -> float:
    """Return bytes/s read and written by a copy."""
    source = torch.empty((1 if ON_CPU else 256) << 20, device=CARD)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def bound_seconds(work: Work, size: str, images: int, bf16: bool, parameters: int) -> float:
    """Return the seconds of an update by the card's own rates: products, attention, element-wise work, optimizers."""
    shape, tokens = SIZES[size], 256
    attention = work.units * images * shape.depth * 4 * tokens**2 * shape.width
    elementwise = work.units * images * shape.depth * ELEMENTWISE * tokens * shape.width * 4
    optimizer = 4 * 10 * parameters  # weights, gradients, moments and EMA, read and written
    products = (work.flops - attention) / matmul_rate(bf16)
    return products + attention / attention_rate(bf16) + (elementwise + optimizer) / copy_rate()
