"""Tables as data: cells know where they were read, columns what they mean, rows whose they are."""

from typing import Any, Literal, NamedTuple

from afm_pipe.reporting.titles import MISSING

Origin = Literal["ours", "paper"]
Mark = Literal["", "best", "tied"]  # tied: the interval overlaps that of the best


class Cell(NamedTuple):
    """A cell: its text, the value that is sorted and stored, and the file and key that it was read from."""

    text: str
    value: float | int | str | None
    source: str = ""
    key: str = ""
    interval: tuple[float, float] | None = None
    """95 %, which `text` shows too; or the lowest and highest seed, where the table's note says so."""
    mark: Mark = ""
    run: str = ""
    """In a row's first cell, the run to whose page it links."""
    origin: Origin | None = None
    """In a row's first cell, whose row it is; left out: the table's."""


class Column(NamedTuple):
    """A column: its name in a CSV file, its title, an explanation, and whether it holds numbers."""

    key: str
    title: str
    meaning: str = ""
    numeric: bool = True


class Table(NamedTuple):
    """A table; `footer` is a last row that is no run."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    footer: tuple[Cell, ...] = ()
    origin: Origin = "ours"
    note: str = ""
    """The meaning of its marks, which follows the caption."""

    def origin_of(self, row: int) -> Origin:
        """Return whose row this is."""
        return self.rows[row][0].origin or self.origin

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
