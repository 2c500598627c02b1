"""Metrics with their intervals, and the best of each column: rows with overlapping intervals are never ranked."""

from collections.abc import Iterable, Sequence

from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import RunRecord
from afm_pipe.reporting.table import Cell, Column
from afm_pipe.runtime import paths

Row = tuple[Cell, ...]
NO_INTERVALS = (
    "No row has an interval, and each is one run with one seed: nothing is ranked. Read large differences as "
    "directions, small ones as nothing."
)
INTERVALS = (
    "In brackets: 95 % intervals of the measurement, of one run each; another seed may lie outside. The best is marked "
    "among rows with an interval; rows whose interval overlaps the best's are indistinguishable from it."
)


def metric_cell(record: RunRecord, key: str) -> Cell:
    """Return a run's metric as a cell: 7.0 [6.6, 7.4] where it has an interval."""
    if key not in record.metrics:
        return Cell(titles.MISSING, None)
    value, interval = record.metrics[key], record.intervals.get(key)
    text = titles.metric_text(key, value)
    if interval is not None and value is not None:
        text += f" [{titles.metric_text(key, interval[0])}, {titles.metric_text(key, interval[1])}]"
    return Cell(text, value, str(paths.metrics(record.name)), key, interval)


def ranked(rows: Sequence[Row], columns: Sequence[Column], places: Iterable[int]) -> list[Row]:
    """Mark the best row in each column at `places`, and the rows that are indistinguishable from it.

    A column is ranked if it has a better direction and at least two rows with intervals; rows without are ignored.
    """
    marked = [list(row) for row in rows]
    for place in places:
        sign = {"lower": 1, "higher": -1}.get(titles.metric(columns[place].key).better)
        values = {
            index: sign * cell.value
            for index, cell in enumerate(row[place] for row in rows)
            if sign is not None and cell.interval is not None and isinstance(cell.value, int | float)
        }
        if len(values) < 2:
            continue
        best = min(values, key=values.__getitem__)
        for index in values:
            if overlap(rows[index][place].interval, rows[best][place].interval):
                marked[index][place] = rows[index][place]._replace(mark="best" if index == best else "tied")
    return [tuple(row) for row in marked]


def overlap(first: tuple[float, float] | None, second: tuple[float, float] | None) -> bool:
    """Return whether two intervals share a point; an unknown one overlaps everything."""
    return first is None or second is None or (first[0] <= second[1] and second[0] <= first[1])


def interval_note(rows: Sequence[Row]) -> str:
    """Say what a reader must know about a table's intervals."""
    if not rows:
        return ""
    return INTERVALS if any(cell.interval for row in rows for cell in row) else NO_INTERVALS
