"""Works timed in turns, so that a machine that slows down slows all of them alike; rows of results."""

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One comparison with a plain implementation or with an upper bound."""

    case: str
    what: str
    ours: float
    against: float
    unit: str
    baseline: str
    """Kind of `against`."""
    ratio: float
    bar: str = ""
    """Target of the ratio, such as ">= 1.1"; empty: none."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if not self.bar:
            return None
        sign, value = self.bar.split()
        return self.ratio >= float(value) if sign == ">=" else self.ratio <= float(value)

    def record(self) -> dict[str, Any]:
        """Return the row as JSON holds it."""
        return self._asdict() | {"met": self.met}


def in_turns(
    rounds: int, warm: int = 1, before: Callable[[], Any] = lambda: None, **works: Callable[[], Any]
) -> dict[str, list[float]]:
    """Return the seconds of each work in each round; every other round runs in reverse order.

    The first `warm` rounds do not count, nor does `before`, which runs before each work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-warm, rounds):
        for name in works if number % 2 == 0 else reversed(works):
            gc.collect()
            before()
            started = time.perf_counter()
            works[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def faster(seconds: dict[str, list[float]], ours: str, against: str) -> float:
    """Return the speedup of ours: the median over rounds of the ratio of neighboring timings."""
    return median(theirs / own for theirs, own in zip(seconds[against], seconds[ours], strict=True))


def speed_row(
    case: str,
    what: str,
    seconds: dict[str, list[float]],
    ours: str,
    against: str,
    baseline: str,
    per: float = 1.0,
    unit: str = "updates/s",
    bar: str = "",
    note: str = "",
) -> Row:
    """Return a row of speeds: every timing is of `per` items."""
    own, theirs = (per / median(seconds[name]) for name in (ours, against))
    return Row(case, what, own, theirs, unit, baseline, faster(seconds, ours, against), bar, note)


def matmul_rate(sizes: tuple[int, int, int] = (2048, 2048, 2048), seconds: float = 0.5) -> float:
    """Return the FLOP/s of float32 matrix products of (m, k) by (k, n): the median over `seconds`."""
    import torch

    m, k, n = sizes
    left, right = torch.randn(m, k), torch.randn(n, k)
    times, until = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - started)
    return 2 * m * k * n / median(times)
