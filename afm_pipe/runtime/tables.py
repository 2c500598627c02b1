"""Tables as text for a terminal."""

from collections.abc import Sequence
from io import StringIO


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with the first column left-aligned and the others right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)  # cells are Text, so brackets in names are not markup
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=200, file=StringIO())
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
