"""Tables as data: cells with their source, columns with their meaning, rows with their origin (ours or the paper's)."""

import re
from typing import Any, Literal, NamedTuple

from afm_pipe.reporting.titles import MISSING

Origin = Literal["ours", "paper"]
MOST_COLUMNS = 6  # of a table that the page shows whole
FIRST_COLUMNS = 5  # of a wider one, unless it says which
SENTENCE = re.compile(r"(?<=\.) (?=[A-Z0-9])")


class Cell(NamedTuple):
    """A cell: its text, the value for sorting and CSV, and the file and key of that value."""

    text: str
    value: float | int | str | None
    source: str = ""
    key: str = ""
    interval: tuple[float, float] | None = None
    """95 % interval, also in `text`; or the lowest and highest seed, if the table's note says so."""
    run: str = ""
    """In a row's first cell: the run whose page it links to."""
    origin: Origin | None = None
    """In a row's first cell: the row's origin; None means that of the table."""


Row = tuple[Cell, ...]


class Column(NamedTuple):
    """A column: its name in a CSV file, its title, an explanation, and whether it holds numbers."""

    key: str
    title: str
    meaning: str = ""
    numeric: bool = True


class Table(NamedTuple):
    """A table; `footer` is a last row that is not a run."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footer: Row = ()
    origin: Origin = "ours"
    note: str = ""
    """The meaning of its intervals and marks, shown after the caption."""
    first: tuple[str, ...] = ()
    """Keys of the columns that the page shows before the others are requested; empty: the first few of a wide table."""

    def origin_of(self, row: int) -> Origin:
        """Return the origin of a row."""
        return self.rows[row][0].origin or self.origin

    @property
    def later(self) -> tuple[int, ...]:
        """Indices of the columns that the page shows on request only."""
        first = self.first or tuple(column.key for column in self.columns[:FIRST_COLUMNS])
        places = tuple(place for place, column in enumerate(self.columns) if column.key not in first)
        return places if len(self.columns) > MOST_COLUMNS else ()

    @property
    def headline(self) -> str:
        """The first sentences of its caption and of its note."""
        return " ".join(text for text in (SENTENCE.split(each)[0] for each in (self.caption, self.note)) if text)

    @property
    def small_print(self) -> str:
        """The rest of its caption and of its note."""
        rest = (part for each in (self.caption, self.note) for part in SENTENCE.split(each)[1:])
        return " ".join(rest)

    @property
    def mixed(self) -> bool:
        """Whether it holds rows of the paper beside ours."""
        return len({self.origin_of(row) for row in range(len(self.rows))}) > 1


EMPTY = Cell("", None)


def plain(value: float | int | str) -> Cell:
    """Return a cell that shows a value as it is."""
    return Cell(str(value), value)


def published_cell(value: Any, decimals: int | None = None) -> Cell:
    """Return a number or word of published.yaml as a cell; a dash where the paper gives none."""
    text = MISSING if value is None else str(value) if decimals is None else f"{value:.{decimals}f}"
    return Cell(text, value, origin="paper")
