"""The results file: what was measured, and on which machine."""

import os
from collections.abc import Sequence
from typing import Any

from afm_pipe.distributed.launch import machine_name
from afm_pipe.reporting.benchmarks import read_benchmarks, results_markdown
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import atomic_path, read_json, write_json
from afm_pipe.runtime.tables import table_text
from benchmarks.measuring import Row


def print_rows(name: str, rows: Sequence[Row], seconds: float) -> None:
    """Print a case's rows."""
    header = ("case", "what", "ours", "against", "", "ratio", "bar", "met")
    text = [
        (row.case, row.what, f"{row.ours:.4g}", f"{row.against:.4g} {row.baseline}", row.unit, f"{row.ratio:.3g}",
         row.bar, {None: "", True: "yes", False: "NO"}[row.met])
        for row in rows
    ]  # fmt: skip
    print(table_text(header, text))
    print(f"{name}: {seconds:.0f} s\n", flush=True)


def write_results(name: str, rows: Sequence[Row], quick: bool) -> None:
    """Replace a case's rows in the results file."""
    import torch

    written: dict[str, Any] = read_json(paths.BENCHMARKS) if paths.BENCHMARKS.exists() else {"cases": {}}
    written["cases"][name] = {
        "machine": machine_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "quick": quick,
        "rows": [row.record() for row in rows],
    }
    write_json(paths.BENCHMARKS, written)
    with atomic_path(paths.BENCHMARKS.with_suffix(".md")) as temp:
        temp.write_text(results_markdown(read_benchmarks()))
