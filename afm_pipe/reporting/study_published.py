"""The paper's numbers beside a table of the study, from published.yaml: a grid or a list of rows."""

from collections.abc import Sequence
from typing import Any

from afm_pipe.reporting.table import Cell, Column, Table, plain, published_cell
from afm_pipe.runtime.errors import UserError

_CAPTIONS = {
    "ot_gp_grid": "Table 1: B/2, one step, 20 epochs, FID-50k, mean and spread of two runs; λ_ot 0 diverges for every "
    "λ_gp",
    "ot_decay": "Table 2: B/2, one step, 100 epochs, FID-50k",
    "guidance_grid": "Table 3: XL/2, one step, guided, FID-50k",
    "depth_vs_steps": "Table 7, with the unguided numbers of Table 11: XL/2, FID-50k",
    "guidance_type": "Table 8: XL/2, one step, FID-50k",
    "objectives": "sequel (arXiv 2604.11521), FID-50k; continuous adversarial flows continue the row above",
    "schedule": "Table 11: FID-50k at the end of each phase",
}
_TITLES = {
    "depth": "Layers passed",
    "epochs": "Epochs",
    "fid": "FID-50k",
    "fid_unguided": "FID-50k, unguided",
    "guidance": "Guidance",
    "lambda_cg": "λ_cg",
    "lambda_gp": "λ_gp",
    "lambda_ot": "λ_ot",
    "method": "Method",
    "model": "Model",
    "nfe": "Steps",
    "objective": "Objective",
    "params_m": "Parameters, M",
    "schedule": "λ_ot",
    "t_range": "t'",
    "units": "Units",
}


def published_table(name: str, key: str, published: dict[str, Any]) -> Table:
    """Build the paper's table `key` to be shown beside the study's table `name`.

    Raises UserError if published.yaml has no such entry.
    """
    entry = published.get(key)
    if not isinstance(entry, dict | list):
        raise UserError(
            f"Found tables.{name}.paper: {key}, expected null or a key of published.yaml: {', '.join(published)}."
        )
    caption = f"The paper's {_CAPTIONS.get(key, f'numbers ({key} of published.yaml)')}; ImageNet, 256 pixels."
    columns, rows = _grid(entry) if isinstance(entry, dict) else _list(entry)
    return Table(f"paper_table_{name}", caption, columns, rows, origin="paper")


def _grid(entry: dict[str, Any]) -> tuple[tuple[Column, ...], tuple[tuple[Cell, ...], ...]]:
    """Build a grid with the first axis as columns, the second as rows, and `fid` with its `spread`, if given."""
    across, down = (axis for axis in entry if axis not in ("fid", "spread"))
    spreads = entry.get("spread") or [[None] * len(row) for row in entry["fid"]]
    labels = [_text(label) for label in entry[across]]
    columns = (
        Column(down, _title(down), numeric=False),
        *(Column(f"{across}_{label}", f"{_title(across)} {label}") for label in labels),
    )
    rows = []
    for label, fids, widths in zip(entry[down], entry["fid"], spreads, strict=True):
        texts = (
            f"{fid:.2f}" + ("" if width is None else f" ± {width:g}") for fid, width in zip(fids, widths, strict=True)
        )
        rows.append((plain(_text(label)), *map(Cell, texts, fids)))
    return columns, tuple(rows)


def _list(entry: Sequence[dict[str, Any]]) -> tuple[tuple[Column, ...], tuple[tuple[Cell, ...], ...]]:
    """Build a table of rows with a column for each of their fields; a list of phases gets one for each phase."""
    flat = []
    for row in entry:
        phases = {f"phase_{place}": pair for place, pair in enumerate(row.get("phases", ()), 1)}
        flat.append({key: value for key, value in row.items() if key != "phases"} | phases)
    keys = list(dict.fromkeys(key for row in flat for key in row))
    numeric = {key: all(isinstance(row.get(key), int | float | None) for row in flat) for key in keys}
    columns = tuple(
        Column(key, _title(key), numeric=numeric[key] and place > 0 or key.startswith("phase_"))
        for place, key in enumerate(keys)
    )
    return columns, tuple(tuple(_cell(key, row.get(key)) for key in keys) for row in flat)


def _cell(key: str, value: Any) -> Cell:
    if key.startswith("phase_") and value is not None:
        epoch, fid = value
        return Cell(f"{fid:.2f}, epoch {epoch:g}", fid)
    if isinstance(value, str):
        return Cell(_text(value), value)
    return published_cell(value, 2 if key.startswith("fid") else None)


def _title(key: str) -> str:
    return f"Phase {key.removeprefix('phase_')}" if key.startswith("phase_") else _TITLES.get(key, key)


def _text(label: Any) -> str:
    """Format a label: a number, a word, or a range of two numbers."""
    if isinstance(label, list):
        low, high = label
        return f"{low:g}" if low == high else f"U({low:g}, {high:g})"
    return f"{label:g}" if isinstance(label, int | float) else str(label).replace("->", "→")
