"""What the report knows of a study's tables: the files of their cells, checked and typed, and means over seeds.

A table has up to two files of one form: tables/NAME.json, this profile's own run, and study/NAME.json, the larger study
that is kept in git. Each carries the declaration it was made from, and the scale it was made at.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from afm_pipe.params import Params, StudyTable
from afm_pipe.params.study import Axis
from afm_pipe.reporting import titles
from afm_pipe.reporting.table import Cell
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json
from afm_pipe.training.events import ALARMS

ACCURACY = "class_accuracy"
Scope = Literal["table", "study"]  # also what the names of its tables begin with
SCOPES: dict[Scope, str] = {"table": "this profile", "study": "the study"}


class Probe(BaseModel):
    """What was measured of a cell on its way; `phase` is the one that ended there, counted from 1."""

    model_config = ConfigDict(frozen=True)

    update: int
    epoch: float
    phase: int | None
    metrics: dict[str, FiniteFloat | None]
    intervals: dict[str, tuple[FiniteFloat, FiniteFloat]]


class CellCost(BaseModel):
    """What a cell cost to train; `units` are forward passes of G an update, `seconds` null where it was cut short."""

    model_config = ConfigDict(frozen=True)

    seconds: float | None
    updates: int
    units: FiniteFloat
    machine: str


class CellEvent(BaseModel):
    """Something that happened while a cell was trained."""

    model_config = ConfigDict(frozen=True)

    update: int
    kind: str
    text: str
    action: str | None = None


class StudyCell(BaseModel):
    """One training of a table, and what was measured of it at its end; nothing where a loss was not finite."""

    model_config = ConfigDict(frozen=True)

    row: str
    column: str
    seed: int
    diverged: str | None
    probes: tuple[Probe, ...]
    metrics: dict[str, FiniteFloat | None]
    intervals: dict[str, tuple[FiniteFloat, FiniteFloat]]
    cost: CellCost
    events: tuple[CellEvent, ...] | None = None
    """Null in files from before trainings were watched."""
    training: str | None = None
    """Fingerprint of the training; cells that use it differently share it."""
    continues: str | None = None
    """Fingerprint of the training that it goes on from; that one's cost is not in `cost`."""

    @property
    def alarms(self) -> tuple[str, ...]:
        """The kinds of alarms that were fired, the first fired first."""
        return tuple(dict.fromkeys(event.kind for event in self.events or () if event.kind in ALARMS))


class StudyFile(BaseModel):
    """tables/NAME.json or study/NAME.json; a cell may be missing, none may stand there twice or without a label."""

    model_config = ConfigDict(frozen=True)

    table: StudyTable
    scale: str
    machine: str
    trials: tuple[StudyCell, ...]

    @model_validator(mode="after")
    def _declared(self) -> "StudyFile":
        declared = {(place.row, place.column, place.seed) for place in self.table.places()}
        found = [(cell.row, cell.column, cell.seed) for cell in self.trials]
        for row, column, seed in found:
            name = f"cell {row} x {column}, seed {seed}" if column else f"cell {row}, seed {seed}"
            if (row, column, seed) not in declared:
                raise ValueError(f"its table declares no {name}")
            if found.count((row, column, seed)) > 1:
                raise ValueError(f"{name} stands there twice")
        return self


@dataclass(frozen=True)
class Studied:
    """A table's file as the report reads it."""

    name: str
    scope: Scope
    path: Path
    results: StudyFile

    @property
    def table(self) -> StudyTable:
        """The declaration it was made from."""
        return self.results.table

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels of its columns; one empty one where only rows differ, as in its cells."""
        return tuple(self.table.columns.settings) if self.table.columns else ("",)

    @property
    def places(self) -> list[tuple[str, str]]:
        """Row and column of all its cells, whatever their seed."""
        return [(row, column) for row in self.table.rows.settings for column in self.columns]

    @cached_property
    def cells(self) -> dict[tuple[str, str, int], StudyCell]:
        """Its cells by row, column and seed."""
        return {(cell.row, cell.column, cell.seed): cell for cell in self.results.trials}

    @cached_property
    def distance_key(self) -> str:
        """The first distance that its cells were measured by; empty where none has a number."""
        measured = [cell.metrics for cell in self.results.trials]
        measured += [probe.metrics for cell in self.results.trials for probe in cell.probes]
        keys = titles.in_order(key for metrics in measured for key in metrics if titles.is_distance(key))
        return keys[0] if keys else ""

    def at(self, row: str, column: str) -> list[StudyCell]:
        """Return the cells of one place, seed by seed."""
        found = (self.cells.get((row, column, seed)) for seed in self.table.seeds)
        return [cell for cell in found if cell is not None]

    def spread(self, row: str, column: str, key: str) -> "Spread":
        """Return a metric of one place over its seeds."""
        return self.spread_of(self.at(row, column), key, f"{row} x {column}" if column else row)

    def spread_of(self, cells: Sequence[StudyCell], key: str, where: str) -> "Spread":
        """Return a metric of some cells, their seeds."""
        measured = [cell for cell in cells if cell.metrics.get(key) is not None]
        return Spread(
            key,
            tuple(float(value) for cell in measured if (value := cell.metrics[key]) is not None),
            len(cells),
            sum(cell.diverged is not None for cell in cells),
            measured[0].intervals.get(key) if len(measured) == 1 else None,
            f"{key} of the cells {where}",
            str(self.path),
        )


class Spread(NamedTuple):
    """A metric over the seeds of a place: the values of those that have one, and how many there are, and diverged."""

    key: str
    values: tuple[float, ...]
    seeds: int
    diverged: int
    measured: tuple[float, float] | None
    """95 % of the measurement, where there is one value."""
    where: str
    source: str

    @property
    def mean(self) -> float | None:
        """Mean of the values there are."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The lowest and the highest seed; of a single value, its own interval."""
        return (min(self.values), max(self.values)) if len(self.values) > 1 else self.measured

    @property
    def text(self) -> str:
        """329 ± 12 over seeds, 329 [310, 348] of one; a share in percent."""
        if not self.values:
            return titles.MISSING
        assert self.mean is not None
        share = titles.metric(self.key).share

        def said(value: float, digits: int) -> str:
            return f"{100 * value:.1f}" if share else titles.number(value, digits)

        unit = " %" if share else ""
        if len(self.values) > 1:
            return f"{said(self.mean, 3)} ± {said(statistics.stdev(self.values), 2)}{unit}"
        interval = f" [{said(self.measured[0], 3)}, {said(self.measured[1], 3)}]" if self.measured else ""
        return f"{said(self.mean, 3)}{interval}{unit}"

    @property
    def marked(self) -> str:
        """`text`, and how many of the seeds diverged."""
        if not self.diverged:
            return self.text
        share = f"{self.diverged} of {self.seeds} diverged"
        return f"{self.text} ({share})" if self.values else share

    def cell(self, mark: str = "", diverged: bool = True) -> Cell:
        """Return it as a table's cell, with how many seeds diverged if wanted."""
        text = (self.marked if diverged else self.text) + mark
        return Cell(text, self.mean, self.source if self.seeds else "", self.where, self.ends)


class Pair(NamedTuple):
    """What there is of one table of params."""

    name: str
    declared: StudyTable
    own: Studied | None
    study: Studied | None

    @property
    def found(self) -> tuple[Studied, ...]:
        """This profile's own run first."""
        return tuple(each for each in (self.own, self.study) if each is not None)


def read_pairs(params: Params) -> list[Pair]:
    """Read what there is of the tables that params name. Raises UserError when a file is damaged."""
    return [
        Pair(name, declared, _read(name, "table"), _read(name, "study")) for name, declared in params.tables.items()
    ]


def _in_order(results: StudyFile) -> StudyFile:
    """Return a file whose axes have the order of its cells, which is the declared one; JSON sorts names."""

    def ordered(axis: Axis, labels: list[str]) -> Axis:
        seen = [label for label in dict.fromkeys(labels) if label in axis.settings]
        names = seen + [label for label in axis.settings if label not in seen]
        return axis.model_copy(update={"settings": {label: axis.settings[label] for label in names}})

    table, cells = results.table, results.trials
    axes = {"rows": ordered(table.rows, [cell.row for cell in cells])}
    if table.columns is not None:
        axes["columns"] = ordered(table.columns, [cell.column for cell in cells])
    return results.model_copy(update={"table": table.model_copy(update=axes)})


def _read(name: str, scope: Scope) -> Studied | None:
    path = paths.table(name) if scope == "table" else paths.STUDY / f"{name}.json"
    if not path.is_file():
        return None
    try:
        return Studied(name, scope, path, _in_order(StudyFile.model_validate(read_json(path))))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "content"
        remedy = f"run `dvc repro --force table@{name}`" if scope == "table" else f"take it anew: `git checkout {path}`"
        raise UserError(f"Found {path} with a wrong {field} ({first['msg']}): {remedy}.") from None
