"""Tables as files: markdown to read, CSV to compute with, LaTeX (booktabs) to cite. All say the caption's protocol."""

import csv
import io
from pathlib import Path

from afm_pipe.reporting.table import Cell, Table

OWNERS = {"ours": "this repository", "paper": "the paper"}
MARKS = {"": "", "best": " *", "tied": " ~"}
_LATEX_MARKS = {"": "", "best": r"$^{\ast}$", "tied": r"$^{\sim}$"}
_LATEX = {  # one pass over characters, so that nothing is escaped twice
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


def write_files(table: Table, folder: Path) -> None:
    """Write a table as NAME.md, NAME.csv and NAME.tex."""
    (folder / f"{table.name}.md").write_text(markdown(table), encoding="utf-8")
    (folder / f"{table.name}.csv").write_text(csv_text(table), encoding="utf-8")
    (folder / f"{table.name}.tex").write_text(latex(table), encoding="utf-8")


def markdown(table: Table) -> str:
    """Print a table as markdown, its caption above; beside rows of the paper, a column says whose a row is."""
    head = [column.title for column in table.columns]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    body = [[cell.text + MARKS[cell.mark] for cell in row] for row in table.rows]
    if table.footer:
        body.append([cell.text for cell in table.footer])
    if table.mixed:
        head, rule = ["From", *head], ["---", *rule]
        owners = [OWNERS[table.origin_of(index)] for index in range(len(table.rows))] + [OWNERS["ours"]]
        body = [[owner, *row] for owner, row in zip(owners, body, strict=False)]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (head, rule, *body)]
    return f"{said(table)}\n\n" + "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """Print a table's rows as CSV, numbers in full, an interval's ends in columns of their own; without the footer."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spread = [any(row[index].interval for row in table.rows) for index in range(len(table.columns))]
    header = ["from"] if table.mixed else []
    for column, wide in zip(table.columns, spread, strict=True):
        header += [column.key, *([f"{column.key}_low", f"{column.key}_high"] if wide else [])]
    writer.writerow(header)
    for index, row in enumerate(table.rows):
        line: list[object] = [OWNERS[table.origin_of(index)]] if table.mixed else []
        for cell, wide in zip(row, spread, strict=True):
            line += ["" if cell.value is None else cell.value, *((cell.interval or ("", "")) if wide else ())]
        writer.writerow(line)
    return out.getvalue()


def latex(table: Table) -> str:
    r"""Print a table as a LaTeX `table` that needs \usepackage{booktabs}: caption, label tab:NAME, rules.

    Beside rows of the paper, those stand below a rule of their own.
    """
    kinds = "".join("r" if column.numeric else "l" for column in table.columns)
    head = " & ".join(escape_latex(column.title) for column in table.columns)
    lines = [
        "% needs \\usepackage{booktabs}; wide tables fit with \\usepackage{graphicx} and \\resizebox",
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{escape_latex(said(table))}}}",
        f"  \\label{{tab:{table.name.replace('_', '-')}}}",
        f"  \\begin{{tabular}}{{{kinds}}}",
        "    \\toprule",
        f"    {head} \\\\",
        "    \\midrule",
    ]
    order = sorted(range(len(table.rows)), key=lambda index: table.mixed and table.origin_of(index) == "paper")
    for place, index in enumerate(order):
        owner = table.origin_of(index)
        if table.mixed and (place == 0 or owner != table.origin_of(order[place - 1])):
            lines += ["    \\midrule"] if place else []
            whose = f"From {OWNERS[owner]}"
            lines.append(f"    \\multicolumn{{{len(kinds)}}}{{l}}{{\\textit{{{whose}}}}} \\\\")
        lines.append(f"    {_line(table.rows[index])}")
    if table.footer:
        lines += ["    \\midrule", f"    {_line(table.footer)}"]
    lines += ["    \\bottomrule", "  \\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """Return text that LaTeX sets as it stands: special characters escaped, the page's signs as mathematics."""
    return "".join(_LATEX.get(each, each) for each in text)


def said(table: Table) -> str:
    """Return the caption and what the table's marks mean."""
    return f"{table.caption} {table.note}".strip()


def _line(row: tuple[Cell, ...]) -> str:
    return " & ".join(escape_latex(cell.text) + _LATEX_MARKS[cell.mark] for cell in row) + r" \\"
