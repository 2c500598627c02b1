"""Params of the study. A table is a view over trials: small runs that differ in the settings of the table's axes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from afm_pipe.params.base import EMPTY, NAME, Fraction, Section, Seed, deep_merge
from afm_pipe.params.flow import OdeSampling
from afm_pipe.params.training import Phase, Run, continued

Overrides = Annotated[dict[str, Any], EMPTY]  # fields of a run that override `train`, and `then` and `steps`
Label = Annotated[str, Field(min_length=1, max_length=60)]
TableName = Annotated[str, Field(pattern=NAME)]
MAX_TRIALS = 2000  # per table; all are resolved whenever params are read
MAX_STEPS = 1024
AlarmMeasure = Literal["identity_alarm", "divergence_alarm", "stagnation_alarm", "collapse_alarm"]
Measure = Literal["distance", "accuracy", "trained", "diverged", "units", "alarms"] | AlarmMeasure


class Place(NamedTuple):
    """The place of a trial in a table; `column` is empty in a table without columns."""

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
    """Sampling steps of an any-step model or a velocity."""
    sampling: OdeSampling | None = None
    """How samples of a velocity are drawn; None: as its run says."""


class Axis(Section):
    """An axis of a table: settings by label."""

    title: str
    settings: Annotated[dict[Label, Overrides], Field(min_length=1)]
    """Fields of a run, by label. `then` is a phase that continues the trained trial, like a guided run, with its
    `run` if given; `steps` is the number of sampling steps with which an any-step model or a velocity is measured, and
    `sampling` overrides flow.sampling where it is measured. `run` is the name of a run, or of a guided run that
    continues the last weights of one: the trial is that run, with the seeds of the table and no other field, except
    that `then` may continue a run. Of a run with a selection, too, the last EMA is measured."""


class Group(Section):
    """Trials of a table, selected by labels of its axes; an omitted axis selects all of its labels."""

    rows: Annotated[tuple[Label, ...], Field(strict=False)] | None = None
    columns: Annotated[tuple[Label, ...], Field(strict=False)] | None = None

    def selects(self, row: str, column: str) -> bool:
        """Return whether the trials at a row and column belong to the group."""
        return (self.rows is None or row in self.rows) and (self.columns is None or column in self.columns)


class Check(Section):
    """A claim to test on trials: for each seed, the measure of `less` is below that of `than`.

    Distances are compared by their logarithm. trained and diverged are fractions of trials; units is the cost of an
    update in forward passes of G; alarms is the number of kinds of alarms that the monitor raised; identity_alarm and
    the like are the fractions of trials with an alarm of that kind.
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
    """Key in published.yaml of the paper's numbers, shown for comparison; null: there are none."""
    base: Overrides
    """Settings that all its trials share; overrides `study.base`."""
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
        """Settings by column label; a single empty label in a table without columns."""
        return self.columns.settings if self.columns else {"": {}}

    @property
    def runs(self) -> dict[Label, str]:
        """The run that each row is, by label, of a table whose rows are runs; empty for others."""
        named = {label: None if "then" in row else row.get("run") for label, row in self.rows.settings.items()}
        return {label: name for label, name in named.items() if name} if all(named.values()) else {}

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Every combination of row and column."""
        return [(row, column) for row in self.rows.settings for column in self.column_settings]

    @property
    def places(self) -> list[Place]:
        """The places of its trials, seed by seed."""
        return [Place(*cell, seed) for seed in self.seeds for cell in self.cells]

    def trial(
        self, place: Place, train: Overrides, shared: Overrides, models: Mapping[str, tuple[Run, Run]]
    ) -> TrialSpec:
        """Resolve a trial: `train`, overridden by `shared` (settings of all tables), then by this table.

        A trial that names a `run` is that run, of `models`: the run to train first and the run itself, by name.
        Raises ValueError, or pydantic's ValidationError, if the run is invalid.
        """
        own: Overrides = {}
        for overrides in (self.base, self.rows.settings[place.row], self.column_settings[place.column]):
            own = deep_merge(own, overrides)
        if "run" in own:
            return _as_run(place, own, models)
        fields = deep_merge(shared, own) | {"seed": place.seed}
        then, steps, sampling = (fields.pop(name, None) for name in ("then", "steps", "sampling"))
        if steps is not None and (type(steps) is not int or not 1 <= steps <= MAX_STEPS):
            raise ValueError(f"steps: expected a number from 1 to {MAX_STEPS}, found {steps!r:.40}")
        run = base = Run.model_validate(deep_merge(train, fields))
        if then is not None:
            run = _then(base, then)
        if sampling is None and (steps is None or run.velocity is None):
            return TrialSpec(place, base, run, steps)
        if run.velocity is None:
            raise ValueError(f"sampling: expected none with objective {run.objective}, which has no ODE to solve")
        changed = {**(sampling or {}), **({} if steps is None else {"steps": steps})}
        ode = OdeSampling.model_validate(run.velocity.sampling.model_dump(mode="json") | changed)
        return TrialSpec(place, base, run, steps, ode)


def _as_run(place: Place, fields: Overrides, models: Mapping[str, tuple[Run, Run]]) -> TrialSpec:
    name, then = fields["run"], fields.get("then")
    others = sorted(set(fields) - {"run", "then"})
    if others:
        raise ValueError(
            f"expected no field beside `run` but `then`, since the run has all settings; found also {', '.join(others)}"
        )
    if name not in models:
        raise ValueError(
            f"run: expected one of {', '.join(models)}, found {name!r:.80}; of guided runs, those that continue the "
            "last weights of a run"
        )
    is_run = models[name][0] is models[name][1]
    if then is not None and not is_run:
        raise ValueError(f"then: expected none with {name}, which continues a run already")
    base, run = (each.model_copy(update={"seed": place.seed}) for each in models[name])
    if then is not None:
        run = _then(base, then)
    return TrialSpec(place, base, base if is_run and then is None else run, None)


def _then(base: Run, fields: Overrides) -> Run:
    """Return a run with a further phase. Raises ValueError, or pydantic's ValidationError, if it is invalid."""
    phase = {key: value for key, value in fields.items() if key != "run"}
    return continued(base, Phase.model_validate(phase), fields.get("run", {}))


class Study(Section):
    """How trials are measured."""

    samples: Annotated[int, Field(ge=10, le=10**9)]
    """Samples per measurement of a trial: at a third of its updates, at the end of every phase, and at the end."""
    trained: Fraction
    """A trial counts as trained if the class accuracy of its samples is at least this."""
    collapsed: Fraction
    """A trial counts as diverged, for whatever reason, if its final class accuracy is at most this."""
    base: Overrides
    """Settings that the trials of all tables share; overrides `train`."""
