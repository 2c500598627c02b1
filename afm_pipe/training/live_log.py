"""A training's rows as a DVCLive log while it runs, for `dvc plots`, editors and whoever watches.

The rows themselves stay in curves.csv; the log is written anew from them at every start. So after a kill it equals
that of a training never killed, and holds nothing of updates that a resume does again.
"""

import csv
import os
from collections.abc import Generator
from pathlib import Path
from typing import TextIO, TypeVar

from afm_pipe.runtime.progress import Progress
from afm_pipe.training.store import RunStore

T = TypeVar("T")


def logged(ticks: Generator[Progress, None, T], store: RunStore, folder: Path) -> Generator[Progress, None, T]:
    """Pass ticks on, after each logging the rows that `curves` has got to DVCLive under `folder`.

    The step is the update. Neither git, dvc.yaml nor experiments are touched: those are the caller's and DVC's.
    """
    log: _Log | None = None
    curves = store.curves
    try:
        while True:
            try:
                tick = next(ticks)
            except StopIteration as end:
                return end.value
            # The first tick comes after the rows of the checkpoint have been put back. A training that goes back to an
            # earlier update writes its curves anew, as another file: then the log begins anew too.
            if log is not None and not log.is_of(curves):
                log.close()
                log = None
            log = log or _Log(curves, folder)
            log.catch_up()
            yield tick
    finally:
        if log is not None:
            log.close()


class _Log:
    """A DVCLive log, and how far it has got in a file of curves."""

    def __init__(self, curves: Path, folder: Path) -> None:
        from dvclive import Live

        self.live = Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False)
        self.file = curves.open(newline="", encoding="utf-8")
        self.header: list[str] = []

    def is_of(self, curves: Path) -> bool:
        """Tell whether it reads this file still, and no older one of the same name."""
        return os.path.samestat(os.fstat(self.file.fileno()), curves.stat())

    def catch_up(self) -> None:
        """Log the rows written since."""
        for line in _whole_lines(self.file):
            values = next(csv.reader([line]))
            if not self.header:
                self.header = values
                continue
            row = dict(zip(self.header, values, strict=True))
            self.live.step = int(row.pop("update"))
            for name, value in row.items():
                self.live.log_metric(name, float(value))
            self.live.make_summary()

    def close(self) -> None:
        """End the log."""
        self.file.close()
        self.live.end()


def _whole_lines(file: TextIO) -> Generator[str, None, None]:
    """Yield the lines that have been written to their end since the last call."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        yield line
