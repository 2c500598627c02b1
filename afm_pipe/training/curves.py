"""Training curves: one row per stretch of updates, means over the updates in it."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from afm_pipe.runtime.files import atomic_path, try_append

Row = dict[str, float]

CLOCK = ("update", "images", "epoch", "lr", "transport")
MEANS = (
    "d_adversarial",
    "r1",
    "r2",
    "logit_centering",
    "logit_gap",  # mean D(x) - D(G(z))
    "d_accuracy",  # share of pairs with D(x) > D(G(z))
    "d_grad_norm",
    "g_adversarial",
    "g_transport",
    "g_guidance",  # weighted, unlike the others
    "transport_rms",  # rms(G(z) - z)
    "output_scale",  # rms(G(z)) over rms(x)
    "g_adv_output_grad_norm",  # norm of the adversarial gradient at G's output, before it is normalised
    "g_transport_output_grad_norm",  # of the transport's there, with guidance's
    "g_grad_norm",
)


def write_curves(path: Path, rows: Sequence[Row], columns: tuple[str, ...] = CLOCK + MEANS) -> None:
    """Write rows as CSV with a header, atomically."""
    with atomic_path(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_curve(path: Path, row: Row) -> None:
    """Append one row to a file that `write_curves` began, for whoever watches a run.

    On a full disk it is left out: the rows that count are in the checkpoints, and every start writes the file anew.
    """
    line = io.StringIO()
    csv.DictWriter(line, list(row), lineterminator="\n").writerow(row)
    try_append(path, line.getvalue())


def read_curves(path: Path) -> list[Row]:
    """Read rows as written; update and images are whole numbers."""
    with path.open(newline="") as file:
        return [
            {name: int(value) if name in ("update", "images") else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
