"""A training's rows as a DVCLive log while it runs, for `dvc plots`, editors and whoever watches.

The rows themselves stay in curves.csv; the log is written anew from them at every start. So after a kill it equals
that of a training never killed, and holds nothing of updates that a resume does again.
"""

import csv
from collections.abc import Generator
from pathlib import Path
from typing import TextIO, TypeVar

from afm_pipe.console import Tick

T = TypeVar("T")


def logged(ticks: Generator[Tick, None, T], curves: Path, folder: Path) -> Generator[Tick, None, T]:
    """Pass ticks on, after each logging the rows that `curves` has got to DVCLive under `folder`.

    The step is the update. Neither git, dvc.yaml nor experiments are touched: those are the caller's and DVC's.
    """
    from dvclive import Live

    with Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False) as live:
        file: TextIO | None = None
        header: list[str] = []
        try:
            while True:
                try:
                    tick = next(ticks)
                except StopIteration as end:
                    return end.value
                if file is None:  # the first tick comes after the rows of the checkpoint have been put back
                    file = curves.open(newline="", encoding="utf-8")
                for line in _whole_lines(file):
                    values = next(csv.reader([line]))
                    if not header:
                        header = values
                        continue
                    row = dict(zip(header, values, strict=True))
                    live.step = int(row.pop("update"))
                    for name, value in row.items():
                        live.log_metric(name, float(value))
                    live.make_summary()
                yield tick
        finally:
            if file is not None:
                file.close()


def _whole_lines(file: TextIO) -> Generator[str, None, None]:
    """Yield the lines that have been written to their end since the last call."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        yield line
