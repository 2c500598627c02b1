"""Training curves: a row every few updates, with means over the updates since the previous row."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from afm_pipe.runtime.files import atomic_path, complete_lines, try_append

Row = dict[str, float]


def write_curves(path: Path, rows: Sequence[Row], columns: tuple[str, ...]) -> None:
    """Write rows as CSV with a header, atomically."""
    with atomic_path(path) as temp, temp.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_curve(path: Path, row: Row) -> None:
    """Append a row to a file of `write_curves`, for live monitoring.

    A full disk is ignored: checkpoints hold the rows, and the file is rewritten when a run starts or resumes.
    """
    line = io.StringIO()
    csv.DictWriter(line, list(row), lineterminator="\n").writerow(row)
    try_append(path, line.getvalue())


def scan_curves(path: Path) -> tuple[list[Row], list[int]]:
    """Read a file that may be missing, growing or damaged; return its rows and the numbers of damaged lines.

    update and images are integers.
    """
    lines, rows, damaged = complete_lines(path), [], []
    for number, line in enumerate(lines[1:], 2):
        try:
            row: Row = dict(zip(lines[0].split(","), map(float, line.split(",")), strict=True))
            rows.append(row | {name: int(row[name]) for name in ("update", "images")})
        except (ValueError, KeyError, OverflowError):
            damaged.append(number)
    return rows, damaged
