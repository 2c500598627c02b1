"""Sections on the tables of the study: the question, the verdicts, our cells at one scale or two, the paper's numbers.

Where a table has both this profile's own run and the larger study, both are shown, each under its scale; cells that
only the study has are marked in the study's.
"""

import math
from collections import Counter
from collections.abc import Sequence

from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs
from afm_pipe.reporting.plots import Point, error_bars, heat_map
from afm_pipe.reporting.section import Figure, Section
from afm_pipe.reporting.study_checks import RULE, Verdict, checks_table, decide
from afm_pipe.reporting.study_published import published_table
from afm_pipe.reporting.study_trials import ACCURACY, SCOPES, Pair, Spread, Studied, StudyCell, read_pairs
from afm_pipe.reporting.table import Cell, Column, Table
from afm_pipe.runtime import paths

ONLY = "°"  # marks what only the study has
DIVERGED = (
    "Diverged: a loss was not finite, which leaves no number, or the distance to the data grew from a third of the "
    "updates to their end, intervals apart, or hardly more samples at the end are of the class asked for than chance "
    "gives (study.collapsed in params); a training that is merely short has not diverged."
)
WIDE = 8.0  # a sweep whose numbers span this factor is drawn over a logarithmic axis


def study_sections(inputs: Inputs) -> tuple[Section, ...]:
    """Build a section for each table that params name, and one that lists what became of every claim; none without."""
    pairs = read_pairs(inputs.params)
    if not pairs:
        return ()
    decided = {pair.name: decide(pair, inputs.params.study.trained) for pair in pairs}
    verdicts = [verdict for of_table in decided.values() for verdict in of_table]
    of_tables = tuple(_section(inputs, pair, decided[pair.name]) for pair in pairs)
    return (_checks(verdicts, inputs.params.study.trained), *of_tables) if verdicts else of_tables


def _checks(verdicts: Sequence[Verdict], trained: float) -> Section:
    outcomes = [verdict.outcome for verdict in verdicts]
    counts = [f"{outcomes.count(each)} {each}" for each in dict.fromkeys(sorted(outcomes, key=_order))]
    prose = f"{RULE} A cell trains from {titles.percent(trained)} of its samples in the class asked for."
    verdict = f"Of {len(verdicts)} claim{'s' * (len(verdicts) != 1)}: {', '.join(counts)}."
    return Section("checks", "Claims and verdicts", prose, verdict, tables=(checks_table(verdicts),))


def _order(outcome: str) -> int:
    return ("supported", "not supported", "undecided", "not run").index(outcome)


def _section(inputs: Inputs, pair: Pair, verdicts: Sequence[Verdict]) -> Section:
    declared = pair.declared
    newest = pair.own.table if pair.own else declared
    published = (published_table(pair.name, newest.paper, inputs.published),) if newest.paper else ()
    if not pair.found:
        return Section(
            f"study-{pair.name}", declared.title, declared.question, warning=_not_run(pair), published=published
        )
    return Section(
        f"study-{pair.name}",
        declared.title,
        declared.question,
        "\n".join(verdict.sentence for verdict in verdicts) or None,
        tuple(table for studied in pair.found for table in _tables(studied, pair)),
        tuple(figure for studied in pair.found for figure in _figures(studied)),
        published,
        _scale(pair),
    )


def _scale(pair: Pair) -> str:
    parts = [f"{SCOPES[studied.scope].capitalize()}: {studied.results.scale}" for studied in pair.found]
    if pair.own is None:
        parts.append(_not_run(pair))
    elif pair.own.table.model_dump(mode="json") != pair.declared.model_dump(mode="json"):
        parts.append(f"params declare this table otherwise by now: run `dvc repro table@{pair.name}`.")
    return " ".join(parts)


def _not_run(pair: Pair) -> str:
    return (
        f"Found no {paths.table(pair.name)}: this profile's own cells have not been run, `dvc repro table@{pair.name}`."
    )


def _tables(studied: Studied, pair: Pair) -> list[Table]:
    new = _only_here(studied, pair)
    if studied.table.columns is None:
        tables = [_list(studied, new)]
    else:
        tables = [_grid(studied, studied.distance_key, new), _grid(studied, ACCURACY, new)]
    return [*tables, *([_phases(studied)] if studied.table.paper == "schedule" else [])]


def _only_here(studied: Studied, pair: Pair) -> set[tuple[str, str]]:
    """Return the places of the study that this profile's own run has not, where there is one."""
    if studied.scope == "table" or pair.own is None:
        return set()
    return set(studied.places) - set(pair.own.places)


def _grid(studied: Studied, key: str, new: set[tuple[str, str]]) -> Table:
    """Build a grid of one metric: rows by columns, means over seeds."""
    table, distance = studied.table, key == studied.distance_key
    assert table.columns is not None
    columns = (
        Column("row", table.rows.title, numeric=False),
        *(Column(label, f"{table.columns.title} {label}") for label in table.columns.settings),
    )
    rows = tuple(
        (
            Cell(row, row),
            *(
                studied.spread(row, column, key).cell(f" {ONLY}" * ((row, column) in new), distance)
                for column in studied.columns
            ),
        )
        for row in table.rows.settings
    )
    name = f"{studied.scope}_{studied.name}"
    if distance:
        return Table(name, _caption(studied, _title(key)), columns, rows, note=_note(studied, new))
    return Table(f"accuracy_{name}", _caption_beside(studied, _title(key)), columns, rows)


def _list(studied: Studied, new: set[tuple[str, str]]) -> Table:
    """Build a table of one axis: quality, share that diverged, and cost of each of its settings."""
    distance = titles.metric(studied.distance_key)
    alarms = any(cell.events is not None for cell in studied.results.trials)
    columns = (
        Column("row", studied.table.rows.title, numeric=False),
        Column(studied.distance_key or "distance", distance.title or "Distance", distance.meaning),
        Column(ACCURACY, titles.metric(ACCURACY).title, titles.metric(ACCURACY).meaning),
        Column("diverged", "Diverged", "Share of the seeds"),
        *((Column("alarms", "Alarms", "Of the watch: each kind, and in how many of the seeds"),) if alarms else ()),
        Column("units", "Units", "What an update costs, discriminator included, in forward passes of G"),
        Column("seconds", "Training time", "Mean over seeds"),
        Column("seeds", "Seeds"),
    )
    rows = tuple(_line(studied, row, f" {ONLY}" * ((row, "") in new), alarms) for row in studied.table.rows.settings)
    name = f"{studied.scope}_{studied.name}"
    return Table(name, _caption(studied, "Quality and cost"), columns, rows, note=_note(studied, new))


def _line(studied: Studied, row: str, mark: str, alarms: bool) -> tuple[Cell, ...]:
    cells, source = studied.at(row, ""), str(studied.path)
    distance, right = studied.spread(row, "", studied.distance_key), studied.spread(row, "", ACCURACY)
    seconds = [cell.cost.seconds for cell in cells if cell.cost.seconds is not None]
    spent = sum(seconds) / len(seconds) if seconds else None
    units = sum(cell.cost.units for cell in cells) / len(cells) if cells else None
    diverged = f"{distance.diverged} of {len(cells)}" if cells else titles.MISSING
    where = f"of the cells {row}"
    return (
        Cell(row + mark, row),
        distance.cell(diverged=False),
        right.cell(diverged=False),
        Cell(diverged, distance.diverged / len(cells) if cells else None, source, f"diverged {where}"),
        *((_alarms(cells, source, where),) if alarms else ()),
        Cell(titles.number(units), units, source, f"units {where}"),
        Cell(titles.MISSING if spent is None else titles.duration(spent), spent, source, f"seconds {where}"),
        Cell(str(len(cells)), len(cells)),
    )


def _alarms(cells: Sequence[StudyCell], source: str, where: str) -> Cell:
    """Say which alarms the watch fired in how many of the cells it watched; the value is in how many any was fired."""
    watched = [cell for cell in cells if cell.events is not None]
    if not watched:
        return Cell(titles.MISSING, None)
    fired = Counter(kind for cell in watched for kind in cell.alarms)
    of = f"of {len(watched)}" + (" watched" if len(watched) < len(cells) else "")
    text = ", ".join(f"{kind} {count} {of}" for kind, count in sorted(fired.items()))
    some = sum(bool(cell.alarms) for cell in watched)
    return Cell(text or f"none {of}", some, source, f"alarms {where}")


def _phases(studied: Studied) -> Table:
    """Build the table of the distance at the end of every phase."""
    phases = sorted({probe.phase for cell in studied.results.trials for probe in cell.probes if probe.phase})
    columns = (
        Column("row", studied.table.rows.title, numeric=False),
        *(Column(f"phase_{phase}", f"Phase {phase}", "At its end") for phase in phases),
    )
    rows = tuple(
        (
            Cell(name := f"{row}, {column}" if column else row, name),
            *(_at_phase(studied, studied.at(row, column), phase, name) for phase in phases),
        )
        for row, column in studied.places
    )
    caption = _caption_beside(studied, f"{_title(studied.distance_key)} at the end of each phase")
    return Table(f"phases_{studied.scope}_{studied.name}", caption, columns, rows)


def _at_phase(studied: Studied, cells: Sequence[StudyCell], phase: int, name: str) -> Cell:
    ends = [(cell, probe) for cell in cells for probe in cell.probes if probe.phase == phase]
    if not ends:
        return Cell(titles.MISSING, None)
    then = [cell.model_copy(update={"metrics": probe.metrics, "intervals": probe.intervals}) for cell, probe in ends]
    cell = studied.spread_of(then, studied.distance_key, name).cell(diverged=False)
    epochs = sorted({probe.epoch for _, probe in ends})
    when = " or ".join(f"{epoch:.3g}" for epoch in epochs)
    return cell._replace(text=f"{cell.text}, epoch {when}", key=f"{cell.key} at the end of phase {phase}")


def _title(key: str) -> str:
    return titles.metric(key).title or "Distance"


def _caption(studied: Studied, what: str) -> str:
    """Say what, how much of it was run, at what scale and at what cost."""
    cells, places = studied.results.trials, len(studied.places) * len(studied.table.seeds)
    seeds, count = len(studied.table.seeds), f"{len(cells)} cell{'s' * (len(cells) != 1)}"
    spent = sum({cell.training or place: cell.cost.seconds or 0 for place, cell in studied.cells.items()}.values())
    alone = " Updates, units and time are those of what continues another training, alone."
    missing = f" {places - len(cells)} of {places} cells have not been run." if len(cells) < places else ""
    return (
        f"{studied.table.title.rstrip('.')}, {SCOPES[studied.scope]}: {what}, {seeds} seed{'s' * (seeds != 1)} a cell. "
        f"{studied.results.scale.rstrip('.')}. {count}, {titles.duration(spent)} of training on "
        f"{studied.results.machine}, from {studied.path}.{missing}"
        f"{alone * any(cell.continues for cell in cells)}"
    )


def _caption_beside(studied: Studied, what: str) -> str:
    """Say what, and which table says the rest."""
    title, name = studied.table.title.rstrip("."), f"{studied.scope}_{studied.name}"
    return f"{title}, {SCOPES[studied.scope]}: {what}, of the cells of {name}, at its scale; read as there."


def _note(studied: Studied, new: set[tuple[str, str]]) -> str:
    """Say what the numbers and marks in a table mean."""
    several = len(studied.table.seeds) > 1
    parts = ["Mean ± standard deviation over seeds; the CSV file has the lowest and the highest."] if several else []
    if any(len(_with_number(studied, *place)) == 1 for place in studied.places):
        parts.append("In brackets: the 95 % interval of measuring one training; another seed may lie outside.")
    if any(cell.diverged for cell in studied.results.trials):
        parts.append(DIVERGED)
    if new:
        parts.append(f"{ONLY}: only in the study, not among this profile's own cells.")
    return " ".join(parts)


def _with_number(studied: Studied, row: str, column: str) -> tuple[float, ...]:
    return studied.spread(row, column, studied.distance_key).values


def _figures(studied: Studied) -> list[Figure]:
    """Draw a grid as a heat map, a sweep as error bars; nothing of fewer than two means."""
    spreads = {place: studied.spread(*place, studied.distance_key) for place in studied.places}
    if sum(spread.mean is not None for spread in spreads.values()) < 2:
        return []
    drawn, words = (_sweep if studied.table.columns is None else _heat)(studied, spreads)
    whose = SCOPES[studied.scope]
    caption = f"{whose.capitalize()}: {_title(studied.distance_key)}, lower is better. {words}"
    return [Figure(drawn, caption, str(studied.path))]


def _heat(studied: Studied, spreads: dict[tuple[str, str], Spread]) -> tuple[str, str]:
    table = studied.table
    assert table.columns is not None
    rows, columns = list(table.rows.settings), list(table.columns.settings)
    drawn = heat_map(
        rows,
        columns,
        [[spreads[row, column].mean for column in columns] for row in rows],
        [[_short(spreads[row, column]) for column in columns] for row in rows],
        f"{_title(studied.distance_key)}, {SCOPES[studied.scope]}",
        "Lower is better",
        row_title=table.rows.title,
        column_title=table.columns.title,
        log=True,
    )
    words = f"{'Means over seeds' if len(table.seeds) > 1 else 'One seed'}, colours by ratio, the lowest framed."
    marked = any(spread.diverged for spread in spreads.values())
    return drawn, words + (" † 1/2: one of two seeds diverged." if marked else "")


def _short(spread: Spread) -> str:
    mark = f"† {spread.diverged}/{spread.seeds}" if spread.diverged else ""
    return f"{titles.number(spread.mean)} {mark}".strip() if spread.values else mark or titles.MISSING


def _sweep(studied: Studied, spreads: dict[tuple[str, str], Spread]) -> tuple[str, str]:
    rows = studied.table.rows
    numbers = _numbers(list(rows.settings))
    points = []
    for index, (label, spread) in enumerate(zip(rows.settings, spreads.values(), strict=True)):
        low, high = spread.ends or (None, None)
        points.append(Point(numbers[index] if numbers else label, spread.mean, low, high))
    positive = [number for number in numbers if number > 0]
    drawn = error_bars(
        points,
        f"{_title(studied.distance_key)}, {SCOPES[studied.scope]}",
        "Lower is better",
        x_title=rows.title,
        log_x=len(positive) > 1 and max(positive) >= WIDE * min(positive),
        log_y=True,
    )
    several = len(studied.table.seeds) > 1
    words = (
        "Points are means over seeds, bars reach from the lowest seed to the highest."
        if several
        else ("Points are one seed each, bars the 95 % interval of its measurement.")
    )
    gone = [label for label, spread in zip(rows.settings, spreads.values(), strict=True) if spread.mean is None]
    return drawn, words + (f" Without a number: {', '.join(gone)}." if gone else "")


def _numbers(labels: Sequence[str]) -> list[float]:
    """Return labels as numbers; nothing if one is none."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return []
    return numbers if all(math.isfinite(number) and number >= 0 for number in numbers) else []
