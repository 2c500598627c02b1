"""Params of the study: tables as data.

A table is a view over cells, small trainings that differ in what its axes say.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from afm_pipe.params.base import NAME, Fraction, Section, Seed

Overrides = dict[str, Any]  # fields of a run, laid over `train`; `then` and `steps` besides
Label = Annotated[str, Field(min_length=1, max_length=60)]
TableName = Annotated[str, Field(pattern=NAME)]
MOST_CELLS = 2000  # of a table; each is resolved whenever params are read
AlarmMeasure = Literal["identity_alarm", "divergence_alarm", "stagnation_alarm", "collapse_alarm"]
Measure = Literal["distance", "accuracy", "trained", "diverged", "units", "alarms"] | AlarmMeasure


class Axis(Section):
    """One direction of a table: what changes along it, and the settings it takes by label."""

    title: str
    settings: Annotated[dict[Label, Overrides], Field(min_length=1)]
    """Label to the fields of a run it sets. `then` holds a phase that continues the trained cell, as a guided run does;
    `steps` is how many steps an any-step model is measured at."""


class Group(Section):
    """Cells of a table, by the labels of its axes; an axis left out means all of it."""

    rows: Annotated[tuple[Label, ...], Field(strict=False)] | None = None
    columns: Annotated[tuple[Label, ...], Field(strict=False)] | None = None


class Check(Section):
    """A claim that the cells decide: the measure of `less` is below that of `than`, seed by seed.

    distance is compared by its logarithm; trained and diverged are shares of cells; units are the forward passes of G
    that an update costs; alarms are how many kinds of them the watch fired; a kind's alarm is the share of cells in
    which it was fired.
    """

    claim: str
    measure: Measure
    less: Group
    than: Group


class StudyTable(Section):
    """A table: a question, its axes, the seeds of every cell, and the claims that its numbers are held against."""

    title: str
    question: str
    paper: str | None
    """Key of the paper's own numbers in published.yaml, shown beside; null: there are none."""
    base: Overrides
    """What its cells share besides, laid over `study.base`."""
    rows: Axis
    columns: Axis | None
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    checks: Annotated[tuple[Check, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _labels(self) -> "StudyTable":
        cells = len(self.seeds) * len(self.rows.settings) * len(self.columns.settings if self.columns else ("",))
        if cells > MOST_CELLS:
            raise ValueError(f"expected at most {MOST_CELLS} cells, found {cells}: fewer seeds, rows or columns")
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

    def places(self) -> "Iterator[Place]":
        """Yield every cell's place, seed by seed, with the overrides its labels add up to."""
        columns = self.columns.settings if self.columns else {"": {}}
        for seed in self.seeds:
            for row, of_row in self.rows.settings.items():
                for column, of_column in columns.items():
                    yield Place(row, column, seed, (self.base, of_row, of_column, {"seed": seed}))


class Place(NamedTuple):
    """Where a cell stands in a table, and what it lays over `train`, the later over the earlier."""

    row: str
    column: str
    seed: int
    overrides: tuple[Overrides, ...]


class Study(Section):
    """How cells are measured."""

    samples: Annotated[int, Field(ge=10, le=10**9)]
    """Of each cell, at each of its probes: a third of its updates, the end of every phase, its own end."""
    trained: Fraction
    """A cell counts as trained from this share of samples in the class asked for."""
    collapsed: Fraction
    """A cell that ends with no more than this share in the class asked for has diverged, however it came to that."""
    base: Overrides
    """What the cells of all tables share, laid over `train`."""
