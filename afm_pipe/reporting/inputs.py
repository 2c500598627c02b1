"""What the report reads: the files that other stages wrote, checked and typed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from afm_pipe.data.classes import require_same_classes
from afm_pipe.params import Params, Run
from afm_pipe.params.yaml import load_yaml
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import Model, read_json, read_model
from afm_pipe.training.curves import Row, scan_curves
from afm_pipe.training.events import Event, scan_events

LARGEST_NUMBER = 1e300


class Cost(BaseModel):
    """What training a run cost: times in seconds, shares of the time, memory in GiB."""

    model_config = ConfigDict(frozen=True)

    machine: str
    device: str
    threads: int
    seconds: float
    updates: int
    images: int
    images_per_second: float
    updates_per_second: float
    data_wait_share: float
    checkpoint_share: float
    peak_memory_gib: float | None


class Selected(BaseModel):
    """How the weights of a run were chosen: the best of so many measured ones, by a distance over some samples."""

    model_config = ConfigDict(frozen=True)

    of: int
    samples: int


class Config(BaseModel):
    """The sizes of a model and its settings; an imported model has no discriminator."""

    model_config = ConfigDict(frozen=True)

    generator_parameters: int
    discriminator_parameters: int | None = None
    model: dict[str, Any] = {}
    classes: list[str] | None = None
    selection: Selected | None = None
    """None where the weights are those of the run's end."""


class Measured(BaseModel):
    """A metrics file: numbers by key, 95 % intervals of some of them, and the protocol."""

    model_config = ConfigDict(frozen=True, extra="allow")

    protocol: dict[str, Any]
    intervals: dict[str, tuple[float | None, float | None]] = {}

    @cached_property
    def numbers(self) -> dict[str, float | None]:
        """Every metric by its key; None where it could not be measured."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is None or is_number(value)}

    @model_validator(mode="after")
    def _finite(self) -> "Measured":
        if not self.numbers:
            raise ValueError("it has no numbers")
        for key, value in self.numbers.items():
            if value is not None and not abs(value) <= LARGEST_NUMBER:
                raise ValueError(f"{key[:60]} is not finite")
        return self


class Summary(BaseModel):
    """The real images: their number and classes, the classifier's accuracy, distances of their reconstructions."""

    model_config = ConfigDict(frozen=True, extra="allow")

    images: int
    classes: list[str]
    classifier_accuracy: float | None = None
    reconstructions: int | None = None
    """Images that the floor was measured on."""

    def floor(self, base: str) -> float | None:
        """Return the distance `base` (fd_classifier, fid, ...) of the autoencoder's reconstructions, if measured."""
        value = (self.model_extra or {}).get(f"{base}_reconstruction")
        return float(value) if is_number(value) else None


@dataclass(frozen=True)
class RunRecord:
    """Everything known of one run; an imported model has neither settings nor curve nor cost."""

    name: str
    settings: Run | None
    curve: dict[str, list[float]]
    """Column -> one value per row."""
    events: tuple[Event, ...] = ()
    metrics: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of some metrics."""
    protocol: dict[str, Any] = field(default_factory=dict)
    config: Config = Config(generator_parameters=0)
    cost: Cost | None = None


@dataclass(frozen=True)
class Inputs:
    """Everything the report is made of, except for the pictures."""

    params: Params
    runs: tuple[RunRecord, ...]
    summary: Summary
    reconstruction_mse: float | None
    published: dict[str, Any]


Line = TypeVar("Line")


def read_inputs(params: Params) -> Inputs:
    """Read what is known of exactly the runs in params.

    Raises UserError naming the file and its stage when one is missing or damaged, and a model of other classes.
    """
    runs = tuple(_read_run(params, name) for name in params.names)
    real = paths.REFERENCE / "summary.json"
    summary = typed(Summary, real, "reference")
    for run in runs:
        require_same_classes(run.config.classes, paths.model(run.name), summary.classes, real)
    return Inputs(
        params=params,
        runs=runs,
        summary=summary,
        reconstruction_mse=_reconstruction_mse(params),
        published=load_yaml(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")),
    )


def needed(path: Path, stage: str) -> Path:
    """Return `path`. Raises UserError naming the stage that writes it when it is missing."""
    if not path.exists():
        raise UserError(f"Found no {path}, expected what stage {stage} writes: run `dvc repro {stage}`.")
    return path


def stage_of(params: Params, verb: str, name: str) -> str:
    """Return the pipeline's stage that does `verb` (train, sample, evaluate) for a model."""
    if name in params.runs:
        return f"{verb}@{name}"
    if verb == "train":
        return f"{'guide' if name in params.guided else 'import'}@{name}"
    return f"{verb}-{'guided' if name in params.guided else 'imported'}@{name}"


def columns_of(rows: list[Row]) -> dict[str, list[float]]:
    """Return the rows of a curve as columns."""
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def typed(model: type[Model], path: Path, stage: str) -> Model:
    """Read a JSON file into a model. Raises UserError naming file, field and stage when it is missing or wrong."""
    return read_model(model, needed(path, stage), f"run `dvc repro --force {stage}`")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_run(params: Params, name: str) -> RunRecord:
    making = stage_of(params, "train", name)
    measured = typed(Measured, paths.metrics(name), stage_of(params, "evaluate", name))
    described: dict[str, Any] = {
        "metrics": {key: None if value is None else float(value) for key, value in measured.numbers.items()},
        "intervals": {key: ends for key, ends in measured.intervals.items() if None not in ends},
        "protocol": measured.protocol,
        "config": typed(Config, paths.model(name) / "config.json", making),
    }
    if name in params.imported:
        return RunRecord(name, None, {}, **described)
    rows = _undamaged(scan_curves, needed(paths.curves(name), making), making)
    if not rows:
        raise UserError(f"Found no rows in {paths.curves(name)}: run `dvc repro --force {making}`.")
    events = tuple(_undamaged(scan_events, paths.events(name), making))
    cost = typed(Cost, paths.costs(name), making)
    return RunRecord(name, params.models[name], columns_of(rows), events, cost=cost, **described)


def _undamaged(scan: Callable[[Path], tuple[list[Line], list[int]]], path: Path, stage: str) -> list[Line]:
    found, damaged = scan(path)
    if damaged:
        count = f"{len(damaged)} damaged line{'s' * (len(damaged) > 1)}"
        raise UserError(f"Found {path} with {count}, the first is line {damaged[0]}: run `dvc repro --force {stage}`.")
    return found


def _reconstruction_mse(params: Params) -> float | None:
    path = paths.AUTOENCODER / "training.json"
    if not path.exists() and paths.AUTOENCODER.is_dir():
        return None  # a pretrained autoencoder
    needed(path, "autoencoder")
    stored = read_json(path)
    value = stored.get("reconstruction_mse") if isinstance(stored, dict) else None
    return float(value) if is_number(value) else None
