"""Sections on the study's tables: question, verdicts, our results at one or two scales, and the paper's numbers.

A table that has results of both the active params and the larger study shows both, each with its scale, and marks rows
and cells that only the study has.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from afm_pipe.params import Params
from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs
from afm_pipe.reporting.plots import Point, error_bars, heat_map
from afm_pipe.reporting.section import Figure, Section
from afm_pipe.reporting.study_published import published_table
from afm_pipe.reporting.study_verdicts import SCOPES, sentence, verdicts_section
from afm_pipe.reporting.table import Cell, Column, Table
from afm_pipe.reporting.tables import setting_words
from afm_pipe.runtime import paths
from afm_pipe.study.results import ACCURACY, TableFiles, TableResults, TrialResult, read_tables
from afm_pipe.study.statistics import Spread, spread
from afm_pipe.study.verdicts import Verdict, decide

ONLY = "°"  # marks what only the study has
DIVERGED = (
    "Diverged: a loss was not finite, so there is no distance; or the distance to the data grew from a third of the "
    "updates to the end, with disjoint intervals; or the class accuracy at the end is near chance (study.collapsed in "
    "params). A trial that is merely short has not diverged."
)
LOG_FACTOR = 8.0  # a sweep whose settings span at least this factor has a logarithmic axis


def study_sections(inputs: Inputs) -> tuple[Section, ...]:
    """Build a section for each table in params, after one that lists the verdicts on all claims."""
    trained = inputs.params.study.trained
    decided = [(files, decide(files, trained)) for files in read_tables(inputs.params)]
    verdicts = [verdict for _, of_table in decided for verdict in of_table]
    summary = (verdicts_section(verdicts, trained),) if verdicts else ()
    return (*summary, *(_section(inputs, files, of_table) for files, of_table in decided))


def _section(inputs: Inputs, files: TableFiles, verdicts: Sequence[Verdict]) -> Section:
    declared, found = files.declared, files.found
    newest = files.own.table if files.own else declared
    return Section(
        f"study-{files.name}",
        declared.title,
        declared.question,
        "\n".join(map(sentence, verdicts)) or None if found else None,
        tuple(table for results in found for table in _tables(results, files, inputs.params)),
        tuple(figure for results in found for figure in _figures(results)),
        (published_table(files.name, newest.paper, inputs.published),) if newest.paper else (),
        _to_run(files, inputs.params),
        " ".join(f"{SCOPES[results.scope].capitalize()}: {results.scale}" for results in found),
    )


def _to_run(files: TableFiles, params: Params) -> str:
    """Say what has not been run; nothing if the results are those of params, or if only the study has the table."""
    if files.name not in params.tables:
        return ""
    run = f"`dvc repro table@{files.name}`"
    if files.own is None:
        return f"Found no {paths.table(files.name)}: this profile's own trials have not been run, {run}."
    if files.own.table.model_dump(mode="json") != files.declared.model_dump(mode="json"):
        return f"Params have changed since this table was made: run {run}."
    return ""


def _tables(results: TableResults, files: TableFiles, params: Params) -> list[Table]:
    twice = results.scope == "study" and files.own is not None
    new = set(results.cells) - set(files.own.cells) if twice and files.own else set()
    if results.table.columns is None:
        tables = [_list(results, new, params)]
    else:
        tables = [_grid(results, key, new) for key in (results.distance_key, *ratio_keys(results), ACCURACY)]
    return [*tables, _phases(results)] if results.table.paper == "schedule" else tables


def _grid(results: TableResults, key: str, new: set[tuple[str, str]]) -> Table:
    """Build a grid of one metric: rows by columns, means over seeds."""
    assert results.table.columns is not None
    distance, title = key == results.distance_key, results.table.columns.title
    columns = (_row_column(results), *(Column(label, f"{title} {label}") for label in results.columns))
    first = tuple(column.key for column in columns)  # all: a grid is read whole
    rows = tuple(
        (
            Cell(row, row),
            *(
                _cell(results, spread(results.at(row, col), key), f"{row} x {col}", distance, (row, col) in new)
                for col in results.columns
            ),
        )
        for row in results.rows
    )
    if distance:
        caption = _caption(results, _title(key))
        return Table(_name(results), caption, columns, rows, note=_note(results, new), first=first)
    name = "accuracy" if key == ACCURACY else "ratio"
    return Table(f"{name}_{_name(results)}", _short_caption(results, _title(key)), columns, rows, first=first)


def ratio_keys(results: TableResults) -> list[str]:
    """Return the key of the distance's ratio to held-out real images, if it was measured."""
    wanted = f"ratio_{titles.base_key(results.distance_key)}"
    keys = {key for trial in results.trials for key in trial.metrics}
    return sorted(key for key in keys if titles.base_key(key) == wanted)[:1]


def _list(results: TableResults, new: set[tuple[str, str]], params: Params) -> Table:
    """Build a table of one axis: quality, divergence and cost of each setting, or of each run."""
    distance, accuracy = titles.metric(results.distance_key), titles.metric(ACCURACY)
    monitored = any(trial.events is not None for trial in results.trials)
    ratios = ratio_keys(results)
    alarms = Column("alarms", "Alarms", "Of the monitor: each kind, and the number of seeds that raised it")
    columns = (
        _row_column(results),
        *((Column("what", "What it is", numeric=False),) if results.table.runs else ()),
        Column(results.distance_key or "distance", distance.title or "Distance", distance.meaning),
        *(Column(key, titles.metric(key).title, titles.metric(key).meaning) for key in ratios),
        Column(ACCURACY, accuracy.title, accuracy.meaning),
        Column("diverged", "Diverged", "Of the seeds"),
        *((alarms,) if monitored else ()),
        Column("nfe", "NFE", "Forward passes of G per sample", numeric=False),
        Column("units", "Units", "Cost of an update, discriminator included, in forward passes of G"),
        Column("total_units", "Units of training", "Of all updates, with those of the run that it continues"),
        Column("seconds", "Training time", "Mean over seeds"),
        Column("seeds", "Seeds"),
    )
    rows = tuple(
        (*_row_names(results, row, (row, "") in new, params), *_line(results, row, monitored)) for row in results.rows
    )
    caption = _caption(results, "Quality and cost")
    return Table(_name(results), caption, columns, rows, note=_note(results, new))


def _row_names(results: TableResults, row: str, new: bool, params: Params) -> tuple[Cell, ...]:
    """Return the name of a row; of a row that is a run, the run and what it is: its label, or its own settings."""
    mark = f" {ONLY}" * new
    name = results.table.runs.get(row)
    if name is None:
        return (Cell(row + mark, row),)
    own = params.models.get(name)
    words = setting_words(own, params.train) if row == name and own is not None else row
    return Cell(name + mark, name, run=name if name in params.names else ""), Cell(words, words)


def _line(results: TableResults, row: str, monitored: bool) -> tuple[Cell, ...]:
    trials, source = results.at(row, ""), str(results.path)
    distance, accuracy = (spread(trials, key) for key in (results.distance_key, ACCURACY))
    seconds = [trial.cost.seconds for trial in trials if trial.cost.seconds is not None]
    spent = sum(seconds) / len(seconds) if seconds else None
    units = sum(trial.cost.units for trial in trials) / len(trials) if trials else None
    totals = [trial.total_units for trial in trials if trial.total_units is not None]
    total = statistics.fmean(totals) if totals else None
    nfe = ", ".join(sorted({str(trial.nfe) for trial in trials if trial.nfe is not None}))
    diverged = f"{distance.diverged} of {len(trials)}" if trials else titles.MISSING
    where = f"of the trials {row}"
    return (
        _cell(results, distance, row, with_diverged=False),
        *(_cell(results, spread(trials, key), row, with_diverged=False) for key in ratio_keys(results)),
        _cell(results, accuracy, row, with_diverged=False),
        Cell(diverged, distance.diverged / len(trials) if trials else None, source, f"diverged {where}"),
        *((_alarms(trials, source, where),) if monitored else ()),
        Cell(nfe or titles.MISSING, nfe),
        Cell(titles.number(units), units, source, f"units {where}"),
        Cell(titles.number(total), total, source, f"total_units {where}"),
        Cell(titles.MISSING if spent is None else titles.duration(spent), spent, source, f"seconds {where}"),
        Cell(str(len(trials)), len(trials)),
    )


def _alarms(trials: Sequence[TrialResult], source: str, where: str) -> Cell:
    """Return the kinds of alarms and in how many trials each was raised; the value counts trials with any alarm."""
    monitored = [trial for trial in trials if trial.events is not None]
    if not monitored:
        return Cell(titles.MISSING, None)
    raised = Counter(kind for trial in monitored for kind in trial.alarms)
    of = f"of {len(monitored)}" + " monitored" * (len(monitored) < len(trials))
    text = ", ".join(f"{kind} {count} {of}" for kind, count in sorted(raised.items()))
    return Cell(text or f"none {of}", sum(bool(trial.alarms) for trial in monitored), source, f"alarms {where}")


def _phases(results: TableResults) -> Table:
    """Build the table of the distance at the end of every phase."""
    phases = sorted({probe.phase for trial in results.trials for probe in trial.probes if probe.phase})
    columns = (_row_column(results), *(Column(f"phase_{phase}", f"Phase {phase}", "At its end") for phase in phases))
    rows = []
    for row, column in results.cells:
        name = f"{row}, {column}" if column else row
        rows.append((Cell(name, name), *(_at_phase(results, results.at(row, column), phase, name) for phase in phases)))
    caption = _short_caption(results, f"{_title(results.distance_key)} at the end of each phase")
    return Table(f"phases_{_name(results)}", caption, columns, tuple(rows))


def _at_phase(results: TableResults, trials: Sequence[TrialResult], phase: int, name: str) -> Cell:
    ends = [(trial, probe) for trial in trials for probe in trial.probes if probe.phase == phase]
    if not ends:
        return Cell(titles.MISSING, None)
    then = [trial.model_copy(update={"metrics": probe.metrics, "intervals": probe.intervals}) for trial, probe in ends]
    cell = _cell(results, spread(then, results.distance_key), name, with_diverged=False)
    epochs = " or ".join(f"{epoch:.3g}" for epoch in sorted({probe.epoch for _, probe in ends}))
    return cell._replace(text=f"{cell.text}, epoch {epochs}", key=f"{cell.key} at the end of phase {phase}")


def _cell(results: TableResults, found: Spread, where: str, with_diverged: bool = True, new: bool = False) -> Cell:
    """Return a metric over seeds as a table's cell, by default with the number of diverged seeds."""
    text = spread_text(found)
    if with_diverged and found.diverged:
        share = f"{found.diverged} of {found.trials} diverged"
        text = f"{text} ({share})" if found.values else share
    source = str(results.path) if found.trials else ""
    return Cell(text + f" {ONLY}" * new, found.mean, source, f"{found.key} of the trials {where}", found.ends)


def spread_text(found: Spread) -> str:
    """Format a metric: 329 ± 12 over seeds, 329 [310, 348] for one seed; a fraction in percent."""
    if found.mean is None:
        return titles.MISSING
    percent = titles.metric(found.key).share

    def number(value: float, digits: int = 3) -> str:
        return f"{100 * value:.1f}" if percent else titles.number(value, digits)

    text = number(found.mean)
    if len(found.values) > 1:
        text += f" ± {number(statistics.stdev(found.values), 2)}"
    elif found.interval:
        text += f" [{number(found.interval[0])}, {number(found.interval[1])}]"
    return text + " %" * percent


def _row_column(results: TableResults) -> Column:
    return Column("row", results.table.rows.title, numeric=False)


def _name(results: TableResults) -> str:
    return f"{results.scope}_{results.name}"


def _title(key: str) -> str:
    return titles.metric(key).title or "Distance"


def _caption(results: TableResults, what: str) -> str:
    """Say what a table shows, how much of it was run, and at what scale and cost."""
    trials, declared, seeds = results.trials, len(results.table.places), len(results.table.seeds)
    count = f"{len(trials)} trial{'s' * (len(trials) != 1)}"
    spent = sum({trial.training or trial.place: trial.cost.seconds or 0 for trial in trials}.values())
    own = " Updates, units and time exclude those of the run that a trial continues."
    missing = f" {declared - len(trials)} of {declared} trials have not been run." * (len(trials) < declared)
    return (
        f"{results.table.title.rstrip('.')}, {SCOPES[results.scope]}: {what}, {seeds} seed{'s' * (seeds != 1)} per "
        f"setting. {results.scale.rstrip('.')}. {count}, {titles.duration(spent)} of training on {results.machine}, "
        f"from {results.path}.{missing}{own * any(trial.continues for trial in trials)}"
    )


def _short_caption(results: TableResults, what: str) -> str:
    """Say what a table shows, and which table's caption has the rest."""
    title = results.table.title.rstrip(".")
    return f"{title}, {SCOPES[results.scope]}: {what}, of the trials of {_name(results)}; see its caption and note."


def _note(results: TableResults, new: set[tuple[str, str]]) -> str:
    """Return the meaning of the numbers and marks in a table."""
    several = len(results.table.seeds) > 1
    parts = ["Mean ± standard deviation over seeds; the CSV file has the lowest and the highest."] if several else []
    if any(len(spread(results.at(*cell), results.distance_key).values) == 1 for cell in results.cells):
        parts.append("In brackets: the 95 % interval of measuring one trial; another seed may lie outside.")
    if any(trial.diverged for trial in results.trials):
        parts.append(DIVERGED)
    if new:
        parts.append(f"{ONLY}: only in the study, not among this profile's own trials.")
    return " ".join(parts)


def _figures(results: TableResults) -> list[Figure]:
    """Draw a grid as a heat map, a list as error bars; return nothing for fewer than two means."""
    spreads = {cell: spread(results.at(*cell), results.distance_key) for cell in results.cells}
    if sum(bool(found.values) for found in spreads.values()) < 2:
        return []
    title, scope = _title(results.distance_key), SCOPES[results.scope]
    svg, words = (_sweep if results.table.columns is None else _heat)(results, spreads, f"{title}, {scope}")
    figure = Figure(svg, f"{scope.capitalize()}: {title}, lower is better. {words}", str(results.path))
    return [figure, *_costs(results, title)]


def _costs(results: TableResults, title: str) -> list[Figure]:
    """Draw quality over the cost of training or of sampling, if trials differ in their objective or their passes."""
    objectives = {trial.settings.get("objective") for trial in results.trials}
    if len(objectives) < 2:
        return []
    training, sampling = list[Point](), list[Point]()
    for series, row in enumerate(results.rows):
        for column in results.columns:
            trials = results.at(row, column)
            start = _first_update(trials)
            for update in sorted({probe.update for trial in trials for probe in trial.probes}):
                at = [
                    trial.model_copy(update={"metrics": probe.metrics, "intervals": probe.intervals})
                    for trial in trials
                    for probe in trial.probes
                    if probe.update == update
                ]
                spent = [units for trial in at if (units := _spent(trial, update - start)) is not None]
                training += [_point(results, statistics.fmean(spent), at, series)] if spent else []
            if trials and isinstance(trials[0].nfe, int):
                sampling.append(_point(results, trials[0].nfe, trials, series))
    bars = _bars(results)
    figures = []
    if results.table.columns is None:
        svg = error_bars(
            training, f"{title} over units of training", "Forward passes of G in training", True, results.rows
        )
        figures.append(Figure(svg, f"{title} at every measurement of a trial. {bars}", str(results.path)))
    if len({point.x for point in sampling}) > 1:
        svg = error_bars(sampling, f"{title} over NFE", "Forward passes of G per sample", True, results.rows)
        figures.append(Figure(svg, f"{title} by the cost of a sample. {bars}", str(results.path)))
    return figures


def _first_update(trials: Sequence[TrialResult]) -> int:
    """Return the updates of the run that trials over seeds continue, by a trial that reached its last probe."""
    ends = [max(probe.update for probe in trial.probes) - trial.cost.updates for trial in trials if trial.probes]
    return max(0, *ends) if any(trial.continues for trial in trials) and ends else 0


def _spent(trial: TrialResult, updates: int) -> float | None:
    """Return the units of training after updates of a trial, with those of the run that it continues."""
    if trial.total_units is None:
        return None
    return trial.total_units - trial.cost.units * max(0, trial.cost.updates - updates)


def _point(results: TableResults, x: float, trials: Sequence[TrialResult], series: int) -> Point:
    found = spread(trials, results.distance_key)
    low, high = found.ends or (None, None)
    return Point(x, found.mean, low, high, series)


def _bars(results: TableResults) -> str:
    if len(results.table.seeds) == 1:
        return "Points are one seed each, bars the 95 % interval of its measurement."
    return "Points are means over seeds, bars reach from the lowest seed to the highest."


def _heat(results: TableResults, spreads: dict[tuple[str, str], Spread], title: str) -> tuple[str, str]:
    assert results.table.columns is not None
    cells = [[spreads[row, column] for column in results.columns] for row in results.rows]

    def text(found: Spread) -> str:
        mark = f"† {found.diverged}/{found.trials}" if found.diverged else ""
        return f"{titles.number(found.mean)} {mark}".strip() if found.values else mark or titles.MISSING

    svg = heat_map(
        results.rows,
        results.columns,
        [[found.mean for found in line] for line in cells],
        [[text(found) for found in line] for line in cells],
        title,
        results.table.rows.title,
        results.table.columns.title,
    )
    seeds = "Means over seeds" if len(results.table.seeds) > 1 else "One seed"
    marked = " † 1/2: one of two seeds diverged." * any(found.diverged for found in spreads.values())
    return svg, f"{seeds}, colors on a log scale, the lowest framed.{marked}"


def _sweep(results: TableResults, spreads: dict[tuple[str, str], Spread], title: str) -> tuple[str, str]:
    numbers = _numbers(results.rows)
    places: Sequence[float | str] = numbers or results.rows
    points = [
        Point(place, found.mean, *(found.ends or (None, None)))
        for place, found in zip(places, spreads.values(), strict=True)
    ]
    positive = [number for number in numbers if number > 0]
    log_x = len(positive) > 1 and max(positive) >= LOG_FACTOR * min(positive)
    svg = error_bars(points, title, results.table.rows.title, log_x)
    words = _bars(results)
    missing = [row for row, found in zip(results.rows, spreads.values(), strict=True) if not found.values]
    return svg, words + (f" Without a number: {', '.join(missing)}." if missing else "")


def _numbers(labels: Sequence[str]) -> list[float]:
    """Return labels as numbers; an empty list unless each is a finite number of at least 0."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return []
    return numbers if all(math.isfinite(number) and number >= 0 for number in numbers) else []
