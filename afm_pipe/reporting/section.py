"""A section of the page as data: the template draws any of them."""

from typing import NamedTuple

from afm_pipe.reporting.table import Table


class Figure(NamedTuple):
    """An SVG drawing (markup of ours, never a user's), its caption, and the file that holds its numbers."""

    svg: str
    caption: str
    source: str = ""


class Group(NamedTuple):
    """Sections below one heading of the page and of its navigation."""

    anchor: str
    title: str
    sections: "tuple[Section, ...]"


class Section(NamedTuple):
    """A section; `anchor` is its unique id on the page, and `published` tables are framed as the paper's."""

    anchor: str
    title: str
    prose: str = ""
    """The question, and how it was tested."""
    verdict: str | None = None
    """The finding in one sentence; None if nothing was run."""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    published: tuple[Table, ...] = ()
    warning: str = ""
    """How it departs from the paper, for readers who compare; or what has not been run."""
    small: str = ""
    """Rules and scales, folded on the page."""
