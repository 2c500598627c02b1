"""How fast the project is beside plain implementations of the same work: what `make bench` measured, as tables."""

from pydantic import BaseModel, ConfigDict, ValidationError

from afm_pipe.reporting.printing import markdown
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.table import Cell, Column, Table
from afm_pipe.reporting.titles import number
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json

SOURCE = str(paths.BENCHMARKS)
PROFILED = ": where"  # ends the case of a row that is an operator's share of an update
TITLES = {
    "startup": "Start-up",
    "latents": "Reading latents",
    "small": "Training the small default",
    "encode": "Encoding",
    "sampling": "Sampling",
    "evaluation": "Evaluation",
    "b2": "Training B/2",
    "ranks": "Two ranks",
}
COLUMNS = (
    Column("case", "Case", numeric=False),
    Column("what", "What", numeric=False),
    Column("ours", "Ours"),
    Column("against", "Against"),
    Column("baseline", "which is", numeric=False),
    Column("ratio", "Ratio", "Median over rounds of what was timed in turns; of speeds, except for waits and start-up"),
    Column("bar", "Asked", numeric=False),
    Column("met", "Met", numeric=False),
    Column("note", "Note", numeric=False),
)
OPERATORS = (
    Column("operator", "Operator", numeric=False),
    Column("ms", "Own ms"),
    Column("share", "Share"),
    Column("calls", "Calls", numeric=False),
)


class Row(BaseModel):
    """One comparison."""

    model_config = ConfigDict(frozen=True)

    case: str
    what: str
    ours: float
    against: float
    unit: str
    baseline: str
    ratio: float
    bar: str
    note: str
    met: bool | None


class Case(BaseModel):
    """The rows of a case, and on what they were measured."""

    model_config = ConfigDict(frozen=True)

    machine: str
    threads: int
    torch: str
    load: float
    quick: bool
    rows: tuple[Row, ...]

    @property
    def words(self) -> str:
        """Where it was measured."""
        quick = ", as few repeats as possible" if self.quick else ""
        return f"{self.machine}, {self.threads} threads, torch {self.torch}, load {self.load:g} at the end{quick}"


def read_benchmarks() -> dict[str, Case]:
    """Return what was measured, by case. Raises UserError when the file is none of ours."""
    try:
        return {name: Case.model_validate(case) for name, case in read_json(paths.BENCHMARKS)["cases"].items()}
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Found {SOURCE} that is no result of `make bench` ({reason}): run it again.") from None


def benchmark_sections() -> tuple[Section, ...]:
    """Return the section on speed, where it was measured."""
    if not paths.BENCHMARKS.exists():
        return ()
    cases = read_benchmarks()
    asked = [row for case in cases.values() for row in case.rows if row.met is not None]
    return (
        Section(
            "speed",
            "Speed",
            prose=(
                "Every row was timed in turns with something plain in one process: a straightforward update of the "
                "same result, bare forward passes, an array in memory, or the machine's matrix products. Both sides "
                "are in benchmarks/."
            ),
            verdict=f"{sum(bool(row.met) for row in asked)} of {len(asked)} bars are met on this machine.",
            tables=_tables(cases),
        ),
    )


def results_markdown(cases: dict[str, Case]) -> str:
    """Return benchmarks/results.md."""
    return "# Benchmarks\n\nWritten by `make bench`; see `benchmarks/`.\n\n" + "\n".join(map(markdown, _tables(cases)))


def _tables(cases: dict[str, Case]) -> tuple[Table, ...]:
    known = [(name, cases[name]) for name in (*TITLES, *sorted(cases.keys() - TITLES.keys())) if name in cases]
    rows = [
        _comparison(name, row, f"cases.{name}.rows[{index}]")
        for name, case in known
        for index, row in enumerate(case.rows)
        if not row.case.endswith(PROFILED)
    ]
    places = {case.words: [] for _, case in known}  # type: dict[str, list[str]]
    for name, case in known:
        places[case.words].append(TITLES.get(name, name))
    where = "; ".join(f"{', '.join(names)}: {words}" for words, names in places.items())
    tables = [Table("benchmarks", f"Speed beside plain implementations. {where}.", COLUMNS, tuple(rows))]
    for name, case in known:
        profiled = [(index, row) for index, row in enumerate(case.rows) if row.case.endswith(PROFILED)]
        if profiled:
            caption = f"Where the time of {profiled[0][1].baseline} goes: operators' own time under torch's profiler."
            lines = tuple(_operator(row, f"cases.{name}.rows[{index}]") for index, row in profiled)
            tables.append(Table(f"benchmarks_{name}_where", caption, OPERATORS, lines))
    return tuple(tables)


def _comparison(name: str, row: Row, key: str) -> tuple[Cell, ...]:
    met = {True: "yes", False: "no", None: ""}[row.met]
    bar = row.bar.replace(">=", "≥").replace("<=", "≤")
    return (
        Cell(TITLES.get(name, name), name),
        Cell(row.what, row.what),
        Cell(f"{number(row.ours)} {row.unit}", row.ours, SOURCE, f"{key}.ours"),
        Cell(f"{number(row.against)} {row.unit}", row.against, SOURCE, f"{key}.against"),
        Cell(row.baseline, row.baseline),
        Cell(number(row.ratio), row.ratio, SOURCE, f"{key}.ratio"),
        Cell(bar, row.bar),
        Cell(met, met),
        Cell(row.note, row.note),
    )


def _operator(row: Row, key: str) -> tuple[Cell, ...]:
    return (
        Cell(row.what, row.what),
        Cell(number(row.ours), row.ours, SOURCE, f"{key}.ours"),
        Cell(f"{100 * row.ratio:.1f} %", row.ratio, SOURCE, f"{key}.ratio"),
        Cell(row.note, row.note),
    )
