"""Params of the study: tables as data. A table is a view over trials, small runs that differ in what its axes set."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from afm_pipe.params.base import EMPTY, NAME, Fraction, Section, Seed, deep_merge
from afm_pipe.params.training import Phase, Run

Overrides = Annotated[dict[str, Any], EMPTY]  # fields of a run that override `train`; `then` and `steps` besides
Label = Annotated[str, Field(min_length=1, max_length=60)]
TableName = Annotated[str, Field(pattern=NAME)]
MAX_TRIALS = 2000  # of a table; each is resolved whenever params are read
MAX_STEPS = 1024
AlarmMeasure = Literal["identity_alarm", "divergence_alarm", "stagnation_alarm", "collapse_alarm"]
Measure = Literal["distance", "accuracy", "trained", "diverged", "units", "alarms"] | AlarmMeasure


class Place(NamedTuple):
    """The place of a trial in a table; `column` is empty where the table has none."""

    row: str
    column: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row} x {self.column}, seed {self.seed}" if self.column else f"{self.row}, seed {self.seed}"


class TrialSpec(NamedTuple):
    """A trial of a table, resolved."""

    place: Place
    base: Run
    """The run to train first: `run` itself, unless `then` continues it by one more phase."""
    run: Run
    steps: int | None
    """Sampling steps of an any-step model."""


class Axis(Section):
    """One axis of a table: the settings it takes, by label."""

    title: str
    settings: Annotated[dict[Label, Overrides], Field(min_length=1)]
    """Label to the fields of a run that it sets. `then` holds a phase that continues the trained trial, as a guided run
    does; `steps` is the number of steps at which an any-step model is measured."""


class Group(Section):
    """Trials of a table, selected by the labels of its axes; an axis left out selects all of it."""

    rows: Annotated[tuple[Label, ...], Field(strict=False)] | None = None
    columns: Annotated[tuple[Label, ...], Field(strict=False)] | None = None

    def selects(self, row: str, column: str) -> bool:
        """Return whether the trials of a row and column belong to the group."""
        return (self.rows is None or row in self.rows) and (self.columns is None or column in self.columns)


class Check(Section):
    """A claim that the trials decide: the measure of `less` is below that of `than`, seed by seed.

    distance is compared by its logarithm; trained and diverged are fractions of trials; units are the forward passes of
    G that an update costs; alarms is the number of kinds of alarms that the monitor raised; identity_alarm and the like
    are the fraction of trials with an alarm of that kind.
    """

    claim: str
    measure: Measure
    less: Group
    than: Group


class StudyTable(Section):
    """A table: a question, its axes, the seeds of every trial, and the claims to check."""

    title: str
    question: str
    paper: str | None
    """Key of the paper's own numbers in published.yaml, shown beside; null: there are none."""
    base: Overrides
    """What its trials share; overrides `study.base`."""
    rows: Axis
    columns: Axis | None
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    checks: Annotated[tuple[Check, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _check(self) -> "StudyTable":
        count = len(self.seeds) * len(self.cells)
        if count > MAX_TRIALS:
            raise ValueError(f"expected at most {MAX_TRIALS} trials, found {count}: use fewer seeds, rows or columns")
        known = {"rows": set(self.rows.settings), "columns": set(self.columns.settings if self.columns else ())}
        for check in self.checks:
            for group in (check.less, check.than):
                for axis, labels in known.items():
                    unknown = set(getattr(group, axis) or ()) - labels
                    if unknown:
                        raise ValueError(
                            f"expected {axis} of the check {check.claim!r} among "
                            f"{', '.join(sorted(labels)) or 'none'}, found {', '.join(sorted(unknown))}"
                        )
        return self

    @property
    def column_settings(self) -> dict[Label, Overrides]:
        """The settings of its columns; a single empty label where it has none."""
        return self.columns.settings if self.columns else {"": {}}

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Every combination of row and column."""
        return [(row, column) for row in self.rows.settings for column in self.column_settings]

    @property
    def places(self) -> list[Place]:
        """The places of its trials, seed by seed."""
        return [Place(*cell, seed) for seed in self.seeds for cell in self.cells]

    def trial(self, place: Place, train: Overrides, shared: Overrides) -> TrialSpec:
        """Resolve a trial: `train`, overridden by what the trials of all tables share, then by this table.

        Raises ValueError, or pydantic's ValidationError, for a run that cannot be.
        """
        own = shared
        for overrides in (self.base, self.rows.settings[place.row], self.column_settings[place.column]):
            own = deep_merge(own, overrides)
        own = own | {"seed": place.seed}
        then, steps = own.pop("then", None), own.pop("steps", None)
        if steps is not None and (type(steps) is not int or not 1 <= steps <= MAX_STEPS):
            raise ValueError(f"steps: expected a number from 1 to {MAX_STEPS}, found {steps!r:.40}")
        run = base = Run.model_validate(deep_merge(train, own))
        if then is not None:
            run = base.model_copy(update={"phases": (*base.phases, Phase.model_validate(then))})
        return TrialSpec(place, base, run, steps)


class Study(Section):
    """How trials are measured."""

    samples: Annotated[int, Field(ge=10, le=10**9)]
    """Samples drawn at each probe of a trial: at a third of its updates, at the end of every phase, at its own end."""
    trained: Fraction
    """A trial counts as trained from this class accuracy of its samples."""
    collapsed: Fraction
    """A trial that ends with no more than this class accuracy has diverged, for whatever reason."""
    base: Overrides
    """What the trials of all tables share; overrides `train`."""
