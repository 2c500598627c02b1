"""What a table is: cells that know where they were read, columns that know what they mean, rows that know whose."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Origin = Literal["ours", "paper"]
Mark = Literal["", "best", "tied"]  # tied: not told apart from the best, the intervals overlap


class Cell(NamedTuple):
    """One cell: what is read, what is sorted and stored, and the file and key it was read from."""

    text: str
    value: float | int | str | None
    source: str = ""
    key: str = ""
    interval: tuple[float, float] | None = None
    """95 %, which `text` shows already; or the lowest and highest seed, where the table's note says so."""
    mark: Mark = ""
    run: str = ""
    """The run it belongs to, whose page the row's first cell links to."""


class Column(NamedTuple):
    """One column: its name in a CSV file, its title, what it means, and whether it holds numbers."""

    key: str
    title: str
    meaning: str = ""
    numeric: bool = True


class Table(NamedTuple):
    """A table; `footer` is a last row that is no run.

    `origins` says of each row whether it is ours or the paper's; left out, all are what `origin` says.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    footer: tuple[Cell, ...] = ()
    origins: tuple[Origin, ...] = ()
    origin: Origin = "ours"
    note: str = ""
    """What the marks in it mean, read after the caption."""

    def origin_of(self, row: int) -> Origin:
        """Return whose row this is."""
        return self.origins[row] if self.origins else self.origin

    @property
    def mixed(self) -> bool:
        """Tell whether rows of the paper stand beside ours."""
        return len(set(self.origins)) > 1


def origins_of(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[Origin, ...]:
    """Return the origins of a table of our rows above the paper's."""
    origins: list[Origin] = ["ours"] * len(ours)
    origins += ["paper"] * len(theirs)
    return tuple(origins)
