"""Tables of `make bench`: speed beside plain implementations of the same work."""

from pydantic import BaseModel, ValidationError

from afm_pipe.reporting.printing import markdown
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.table import Cell, Column, Row, Table, plain
from afm_pipe.reporting.titles import number
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json

SOURCE = str(paths.BENCHMARKS)
PROFILED = ": where"  # suffix of the case of a row that holds an operator's share of an update
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
    Column("against", "Baseline"),
    Column("baseline", "Kind of baseline", numeric=False),
    Column("ratio", "Ratio", "Median over rounds that alternate; of speeds, except for waits and start-up"),
    Column("bar", "Target", numeric=False),
    Column("met", "Met", numeric=False),
    Column("note", "Note", numeric=False),
)
OPERATORS = (
    Column("operator", "Operator", numeric=False),
    Column("ms", "Own ms"),
    Column("share", "Share"),
    Column("calls", "Calls", numeric=False),
)


class Comparison(BaseModel, frozen=True):
    """One comparison of the package with a baseline."""

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


class Case(BaseModel, frozen=True):
    """The rows of a case, and the machine that measured them."""

    machine: str
    threads: int
    torch: str
    load: float
    quick: bool
    rows: tuple[Comparison, ...]

    @property
    def words(self) -> str:
        """Where it was measured."""
        quick = ", few repeats" if self.quick else ""
        return f"{self.machine}, {self.threads} threads, torch {self.torch}, load {self.load:g} at the end{quick}"


def read_benchmarks() -> dict[str, Case]:
    """Return the measurements by case. Raises UserError if `make bench` did not write the file."""
    try:
        return {name: Case.model_validate(case) for name, case in read_json(paths.BENCHMARKS)["cases"].items()}
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Found {SOURCE} that is no result of `make bench` ({reason}): run it again.") from None


def benchmark_sections() -> tuple[Section, ...]:
    """Return the section on speed, if there are measurements."""
    if not paths.BENCHMARKS.exists():
        return ()
    cases = read_benchmarks()
    met = [row.met for case in cases.values() for row in case.rows if row.met is not None]
    prose = (
        "Each row was timed in turns with a plain baseline in one process: a straightforward update with the same "
        "result, bare forward passes, an array in memory, or the machine's matrix products. Both sides are in "
        "benchmarks/."
    )
    verdict = f"{sum(met)} of {len(met)} targets are met on this machine."
    return (Section("speed", "Speed", prose, verdict, tuple(_tables(cases))),)


def results_markdown(cases: dict[str, Case]) -> str:
    """Return benchmarks/results.md."""
    return "# Benchmarks\n\nWritten by `make bench`; see `benchmarks/`.\n\n" + "\n".join(map(markdown, _tables(cases)))


def _tables(cases: dict[str, Case]) -> list[Table]:
    names = [name for name in (*TITLES, *sorted(cases.keys() - TITLES.keys())) if name in cases]
    rows = [(name, row, f"cases.{name}.rows[{index}]") for name in names for index, row in enumerate(cases[name].rows)]
    places = dict.fromkeys(cases[name].words for name in names)
    where = "; ".join(
        f"{', '.join(TITLES.get(name, name) for name in names if cases[name].words == words)}: {words}"
        for words in places
    )
    compared = tuple(_comparison(*each) for each in rows if not each[1].case.endswith(PROFILED))
    first = ("case", "what", "ours", "against", "ratio")
    tables = [Table("benchmarks", f"Speed beside plain implementations. {where}.", COLUMNS, compared, first=first)]
    for name in names:
        profiled = [(row, key) for of, row, key in rows if of == name and row.case.endswith(PROFILED)]
        if profiled:
            caption = f"Time of {profiled[0][0].baseline} by operator: own time under torch's profiler."
            operators = tuple(_operator(*each) for each in profiled)
            tables.append(Table(f"benchmarks_{name}_where", caption, OPERATORS, operators))
    return tables


def _comparison(name: str, row: Comparison, key: str) -> Row:
    return (
        Cell(TITLES.get(name, name), name),
        plain(row.what),
        Cell(f"{number(row.ours)} {row.unit}", row.ours, SOURCE, f"{key}.ours"),
        Cell(f"{number(row.against)} {row.unit}", row.against, SOURCE, f"{key}.against"),
        plain(row.baseline),
        Cell(number(row.ratio), row.ratio, SOURCE, f"{key}.ratio"),
        Cell(row.bar.replace(">=", "≥").replace("<=", "≤"), row.bar),
        plain({True: "yes", False: "no", None: ""}[row.met]),
        plain(row.note),
    )


def _operator(row: Comparison, key: str) -> Row:
    return (
        plain(row.what),
        Cell(number(row.ours), row.ours, SOURCE, f"{key}.ours"),
        Cell(f"{100 * row.ratio:.1f} %", row.ratio, SOURCE, f"{key}.ratio"),
        plain(row.note),
    )
