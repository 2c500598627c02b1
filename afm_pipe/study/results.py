"""Results of tables, read from files and checked. Free of torch.

A table has up to two files of the same format: results/tables/NAME.json, trained with the active params, and
results/study/NAME.json, the larger study, which may have more tables than params. Each holds the table's declaration
at that time, its scale, and the protocol of its measurements. A study of other images than those of the reference is
passed over.
"""

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, FiniteFloat, model_validator

from afm_pipe.params import Params, StudyTable
from afm_pipe.params.study import Place
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import read_json, read_model
from afm_pipe.training.events import ALARMS, Event

ACCURACY = "class_accuracy"
Scope = Literal["table", "study"]  # this profile's own run, the larger study
Metrics = dict[str, FiniteFloat | None]
Intervals = dict[str, tuple[FiniteFloat, FiniteFloat]]


class Probe(BaseModel, frozen=True):
    """One measurement of a trial; `phase` (from 1) is the phase that ends there, if any."""

    update: int
    epoch: float
    phase: int | None
    metrics: Metrics
    intervals: Intervals


class TrialCost(BaseModel, frozen=True):
    """The cost of a trial; `units` are forward passes of G per update, `seconds` is None after a non-finite loss."""

    seconds: float | None
    updates: int
    units: FiniteFloat
    machine: str
    total_units: FiniteFloat | None = None
    """Of all updates, with those of the run that it continues; None in older files."""


class TrialResult(BaseModel, frozen=True):
    """A trial and its measurements; `metrics`, the last measurement, is empty after a non-finite loss."""

    row: str
    column: str
    seed: int
    diverged: str | None
    probes: tuple[Probe, ...]
    metrics: Metrics
    intervals: Intervals
    cost: TrialCost
    settings: dict[str, Any] = {}
    """Its run."""
    events: tuple[Event, ...] | None = None
    """None in files older than the monitor."""
    training: str | None = None
    """Identity of its training run, which trials that only measure differently share."""
    continues: str | None = None
    """Identity of the training run that it continues, whose cost is in `cost.total_units` alone."""
    nfe: int | Literal["any"] | None = None
    """Forward passes per sample as measured; None in older files."""

    @property
    def total_units(self) -> float | None:
        """The cost of all training in forward passes of G; None where that of its base is unknown."""
        if self.cost.total_units is None and self.continues is None:
            return self.cost.units * self.cost.updates
        return self.cost.total_units

    @property
    def place(self) -> Place:
        """Its place in the table."""
        return Place(self.row, self.column, self.seed)

    @property
    def alarms(self) -> tuple[str, ...]:
        """The kinds of alarms that it raised, in order."""
        return tuple(dict.fromkeys(event.kind for event in self.events or () if event.kind in ALARMS))


class TableResults(BaseModel, frozen=True):
    """The results of a table; trials may be missing, but not undeclared or repeated."""

    table: StudyTable
    scale: str
    machine: str
    trials: tuple[TrialResult, ...]
    protocol: dict[str, Any] = {}
    name: str = ""
    scope: Scope = "table"
    path: Path = Path()
    """The file they were read from."""

    @model_validator(mode="after")
    def _check(self) -> "TableResults":
        declared = set(self.table.places)
        for place, count in Counter(trial.place for trial in self.trials).items():
            if place not in declared:
                raise ValueError(f"its table declares no trial {place}")
            if count > 1:
                raise ValueError(f"trial {place} occurs {count} times")
        return self

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """Labels of its rows in declared order, taken from its trials because JSON sorts the settings."""
        return tuple(dict.fromkeys([*(trial.row for trial in self.trials), *self.table.rows.settings]))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Labels of its columns in declared order; a single empty label if it has no columns."""
        return tuple(dict.fromkeys([*(trial.column for trial in self.trials), *self.table.column_settings]))

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Every combination of row and column."""
        return [(row, column) for row in self.rows for column in self.columns]

    @cached_property
    def by_place(self) -> dict[Place, TrialResult]:
        """Its trials by place."""
        return {trial.place: trial for trial in self.trials}

    def at(self, row: str, column: str) -> list[TrialResult]:
        """Return the trials of a row and column, in the order of seeds."""
        places = (Place(row, column, seed) for seed in self.table.seeds)
        return [self.by_place[place] for place in places if place in self.by_place]

    @cached_property
    def distance_key(self) -> str:
        """Key of the Fréchet distance that compares its trials, Inception's first; empty if there is none."""
        measured = [probe.metrics for trial in self.trials for probe in trial.probes]
        keys = {key for metrics in (*measured, *(trial.metrics for trial in self.trials)) for key in metrics}
        distances = [key for key in keys if key.startswith(("fid", "sfid", "fd_"))]
        return min(distances, key=lambda key: (key.startswith("fd_"), "clean" in key, key), default="")


class TableFiles(NamedTuple):
    """The declaration of one table in params, or else of the larger study, and its results, if any."""

    name: str
    declared: StudyTable
    own: TableResults | None
    study: TableResults | None

    @property
    def found(self) -> tuple[TableResults, ...]:
        """All results, those of the active params first."""
        return tuple(results for results in (self.own, self.study) if results is not None)


def read_tables(params: Params) -> list[TableFiles]:
    """Read the results of the tables in params, where present, and of those that only the larger study has.

    Raises UserError if a file is damaged.
    """
    tables = params.tables.items()
    found = [TableFiles(name, declared, _read(name, "table"), _read_study(name)) for name, declared in tables]
    others = sorted(path.stem for path in paths.STUDY.glob("*.json") if path != paths.STUDY_STRONG_1D)
    studies = (_read_study(name) for name in others if name not in params.tables)
    return found + [TableFiles(study.name, study.table, None, study) for study in studies if study is not None]


def runs_over_seeds(params: Params) -> TableResults | None:
    """Return the results of the first table in params whose rows are runs, other than the paper's.

    None if there is none, or it was not run.
    """
    for name in params.tables:
        results = _read(name, "table")
        if results is not None and results.table.runs and results.table.paper is None:
            return results
    return None


def _read_study(name: str) -> TableResults | None:
    """Read a table of the larger study, if it is of the images of the reference."""
    results, summary = _read(name, "study"), paths.REFERENCE / "summary.json"
    if results is None or not summary.is_file():
        return results
    found, expected = results.protocol.get("reference_manifest"), read_json(summary).get("manifest")
    return None if found and expected and found != expected else results


def _read(name: str, scope: Scope) -> TableResults | None:
    path = paths.table(name) if scope == "table" else paths.STUDY / f"{name}.json"
    if not path.is_file():
        return None
    remedy = f"run `dvc repro --force table@{name}`" if scope == "table" else f"restore it by `git checkout {path}`"
    results = read_model(TableResults, path, remedy)
    return results.model_copy(update={"name": name, "scope": scope, "path": path})
