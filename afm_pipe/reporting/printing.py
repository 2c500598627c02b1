"""Tables as files: Markdown to read, CSV to compute with, LaTeX (booktabs) to cite."""

import csv
import io
from pathlib import Path

from afm_pipe.reporting.table import Row, Table

OWNERS = {"ours": "this repository", "paper": "the paper"}
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{each: f"\\{each}" for each in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "–": "--",
        "…": r"\ldots{}",
        "−": "$-$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "→": r"$\rightarrow$",
        "²": r"$^2$",
        "·": r"$\cdot$",
        "λ": r"$\lambda$",
        "µ": r"$\mu$",
        "\u00a0": "~",
    }
)


def write_files(table: Table, folder: Path) -> None:
    """Write a table as NAME.md, NAME.csv and NAME.tex."""
    for suffix, text in (("md", markdown(table)), ("csv", csv_text(table)), ("tex", latex(table))):
        (folder / f"{table.name}.{suffix}").write_text(text, encoding="utf-8")


def markdown(table: Table) -> str:
    """Return a table as Markdown below its caption; a column names the origin of each row if origins differ."""
    head = [column.title for column in table.columns]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    body = [[cell.text for cell in row] for row in (*table.rows, table.footer) if row]
    if table.mixed:
        head, rule = ["From", *head], ["---", *rule]
        owners = [*map(table.origin_of, range(len(table.rows))), "ours"]  # the last of the footer
        body = [[OWNERS[owner], *row] for owner, row in zip(owners, body, strict=False)]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (head, rule, *body)]
    return f"{full_caption(table)}\n\n" + "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """Return a table's rows as CSV, without the footer: unrounded numbers, interval ends in separate columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    wide = [any(row[index].interval for row in table.rows) for index in range(len(table.columns))]
    header = ["from"] if table.mixed else []
    for column, has_ends in zip(table.columns, wide, strict=True):
        header += [column.key, *([f"{column.key}_low", f"{column.key}_high"] if has_ends else [])]
    writer.writerow(header)
    for index, row in enumerate(table.rows):
        line: list[object] = [OWNERS[table.origin_of(index)]] if table.mixed else []
        for cell, has_ends in zip(row, wide, strict=True):
            line += [cell.value, *((cell.interval or (None, None)) if has_ends else ())]
        writer.writerow(line)
    return out.getvalue()


def latex(table: Table) -> str:
    r"""Return a table as a LaTeX `table` that needs \usepackage{booktabs}; rows of the paper follow below a rule."""
    kinds = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [" & ".join(escape_latex(column.title) for column in table.columns) + r" \\"]
    for owner in OWNERS:
        rows = [row for index, row in enumerate(table.rows) if table.origin_of(index) == owner]
        if rows and table.mixed:
            lines += ["\\midrule", f"\\multicolumn{{{len(kinds)}}}{{l}}{{\\textit{{From {OWNERS[owner]}}}}} \\\\"]
        elif rows:
            lines.append("\\midrule")
        lines += map(_latex_row, rows)
    if table.footer:
        lines += ["\\midrule", _latex_row(table.footer)]
    body = "\n".join(f"    {line}" for line in ("\\toprule", *lines, "\\bottomrule"))
    return (
        "% needs \\usepackage{booktabs}; wide tables fit with \\usepackage{graphicx} and \\resizebox\n"
        f"\\begin{{table}}\n  \\centering\n  \\caption{{{escape_latex(full_caption(table))}}}\n"
        f"  \\label{{tab:{table.name.replace('_', '-')}}}\n  \\begin{{tabular}}{{{kinds}}}\n"
        f"{body}\n  \\end{{tabular}}\n\\end{{table}}\n"
    )


def escape_latex(text: str) -> str:
    """Return text for LaTeX: special characters escaped, symbols in math mode."""
    return text.translate(LATEX)


def full_caption(table: Table) -> str:
    """Return the caption with the table's note."""
    return f"{table.caption} {table.note}".strip()


def _latex_row(row: Row) -> str:
    return " & ".join(escape_latex(cell.text) for cell in row) + r" \\"
