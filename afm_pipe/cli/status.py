"""The text of `afm-pipe status` and `afm-pipe summary`, and the live page of `afm-pipe report --watch`."""

from afm_pipe.params import Params
from afm_pipe.reporting.status import RunStatus, all_statuses, code_line, trials_line
from afm_pipe.reporting.titles import duration, is_distance, metric
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.tables import table_text
from afm_pipe.study.results import ACCURACY, TableResults
from afm_pipe.study.statistics import spread

DAY = 86_400  # seconds
LONGEST_NOTE = 60  # characters


def status_text(params: Params) -> str:
    """Return a table of all runs, a line on the trials of tables, and one on results made by other source code."""
    header = ["run", "state", "phase", "updates", "left", "health", "last event", "note"]
    rows = []
    for each in all_statuses(params):
        last = each.events[-1] if each.events else None
        rows.append(
            [
                each.name,
                each.state,
                each.phase,
                progress_text(each),
                duration(each.seconds_left) if each.seconds_left is not None else "-",
                each.health,
                f"{last.kind} at {last.update:,}" if last else "-",
                each.note if len(each.note) <= LONGEST_NOTE else f"{each.note[: LONGEST_NOTE - 3]}...",
            ]
        )
    lines = [line for line in (trials_line(params), code_line(params)) if line]
    return "\n  ".join([table_text(header, rows).replace("\n\n", "\n").strip("\n"), *lines])


def progress_text(each: RunStatus) -> str:
    """Return the number of updates done and the total."""
    if each.total is None:
        return f"{each.update:,}" if each.update else "-"
    share = f" ({min(each.update / each.total, 1):.0%})" if each.total else ""
    return f"{each.update:,} of {each.total:,}{share}"


def summary_text(params: Params) -> str:
    """Return distance and class accuracy of the runs: over seeds, where a table of params has runs as rows.

    Without such a table, the runs that are not measured are named. Raises UserError if none is measured.
    """
    from afm_pipe.reporting.inputs import read_inputs
    from afm_pipe.reporting.tables import run_table
    from afm_pipe.study.results import runs_over_seeds

    over_seeds = runs_over_seeds(params)
    if over_seeds is not None:
        return _over_seeds(over_seeds)
    measured = [name for name in params.names if paths.metrics(name).is_file()]
    table = run_table(read_inputs(params, measured or params.names))
    keys = [column.key for column in table.columns]
    distance = next(filter(is_distance, keys), "")
    chosen = [keys.index(key) for key in ("run", distance, ACCURACY) if key in keys]
    rows = [*table.rows, *([table.footer] if table.footer else [])]
    header = [table.columns[index].title for index in chosen]
    text = table_text(header, [[row[index].text for index in chosen] for row in rows])
    missing = ", ".join(name for name in params.names if name not in measured)
    return f"{text}\nNot measured: {missing}; run `dvc repro`." if missing else text


def _over_seeds(results: TableResults) -> str:
    """Return the rows of a table of runs, as mean and standard deviation over seeds."""
    from afm_pipe.reporting.study import spread_text

    header = ["run", "what it is", metric(results.distance_key).title, metric(ACCURACY).title]
    count, path = len(results.table.seeds), results.path
    rows, incomplete = [], False
    for label in results.rows:
        row = [results.table.runs.get(label, ""), label]
        for key in (results.distance_key, ACCURACY):
            found = spread(results.at(label, ""), key)
            some = 0 < len(found.values) < count
            row.append(spread_text(found) + f", {len(found.values)} of {count}" * some)
            incomplete = incomplete or some
        rows.append(row)
    text = f"{table_text(header, rows)}\nMean ± standard deviation over {count} seeds; {path} has each."
    return text + f"\nN of {count}: the other seeds have no value, as after a non-finite loss." * incomplete


def watch(params: Params, seconds: float) -> None:
    """Rewrite the live page every few seconds until Ctrl-C."""
    from afm_pipe.reporting.watch import PAGE, watch

    if not 1 <= seconds <= DAY:
        raise UserError(f"Found --every {seconds:g}, expected 1 to {DAY:,} seconds.")
    print(f"Open {PAGE.resolve()} in a browser; Ctrl-C ends.", flush=True)
    try:
        watch(params, seconds)
    except KeyboardInterrupt:
        print("The page is no longer updated; training was not touched.")
