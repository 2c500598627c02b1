"""A section of the page as data: a question, what was found, tables and figures. The template draws any of them.

A new section is a function that returns one, listed in `sections.py`; the template stays as it is.
"""

from typing import NamedTuple

from afm_pipe.reporting.table import Table


class Figure(NamedTuple):
    """A drawing inside the page (SVG text of ours, never of a user), what it shows, and the file its numbers are in."""

    svg: str
    caption: str
    source: str = ""


class Section(NamedTuple):
    """One section: `anchor` is its id, unique on the page; `published` tables stand in a frame of the paper's own."""

    anchor: str
    title: str
    prose: str = ""
    """What is asked, and how it was tried."""
    verdict: str | None = None
    """What was found, in one sentence; None where nothing was run to find it."""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    published: tuple[Table, ...] = ()
    warning: str = ""
    """In what it departs from the paper, where someone might compare."""
