"""Numbers with their intervals, and who is best: never said of two rows whose intervals overlap."""

from collections.abc import Iterable, Sequence

from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import RunRecord
from afm_pipe.reporting.table import Cell, Column
from afm_pipe.runtime import paths

Row = tuple[Cell, ...]
NO_INTERVALS = (
    "No row carries an interval, and each is one training with one seed: nothing here is ranked; read large "
    "differences as directions, small ones as nothing."
)
INTERVALS = (
    "In brackets: 95 % intervals of the measurement, of one training each; another seed may lie outside. Best is "
    "marked among rows with an interval; rows whose interval overlaps the best's are not told apart from it."
)


def metric_cell(record: RunRecord, key: str) -> Cell:
    """Return a run's metric as a cell: 7.0 [6.6, 7.4] where it has an interval."""
    value, interval = record.metrics.get(key), record.intervals.get(key)
    if key not in record.metrics:
        return Cell(titles.MISSING, None)
    text = titles.metric_text(key, value)
    if interval is not None and value is not None:
        text += f" [{titles.metric_text(key, interval[0])}, {titles.metric_text(key, interval[1])}]"
    return Cell(text, value, str(paths.metrics(record.name)), key, interval)


def ranked(rows: Sequence[Row], columns: Sequence[Column], places: Iterable[int]) -> list[Row]:
    """Mark in the columns at `places` the best row and those not told apart from it.

    A column is ranked if it has a better direction and at least two rows with intervals; rows without one take no part.
    """
    marked = [list(row) for row in rows]
    for place in places:
        better = titles.metric(columns[place].key).better
        values = {
            index: float(value)
            for index, row in enumerate(marked)
            if row[place].interval is not None and isinstance(value := row[place].value, int | float)
        }
        if better not in ("lower", "higher") or len(values) < 2:
            continue
        sign = 1 if better == "lower" else -1
        best = min(values, key=lambda index: sign * values[index])
        for index in values:
            if index == best:
                marked[index][place] = marked[index][place]._replace(mark="best")
            elif overlap(marked[index][place].interval, marked[best][place].interval):
                marked[index][place] = marked[index][place]._replace(mark="tied")
    return [tuple(row) for row in marked]


def overlap(first: tuple[float, float] | None, second: tuple[float, float] | None) -> bool:
    """Tell whether two intervals share a point; one that is unknown overlaps everything."""
    return first is None or second is None or (first[0] <= second[1] and second[0] <= first[1])


def interval_note(rows: Sequence[Row]) -> str:
    """Return what a table's readers need to know of its intervals."""
    if not rows:
        return ""
    return INTERVALS if any(cell.interval for row in rows for cell in row) else NO_INTERVALS
