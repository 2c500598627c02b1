"""Inputs of the report: the files that other stages wrote, checked and typed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, model_validator

from afm_pipe.data.classes import require_same_classes
from afm_pipe.params import Params, Run
from afm_pipe.params.yaml import load_yaml
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import Model, read_json, read_model
from afm_pipe.training.curves import Row, scan_curves
from afm_pipe.training.events import Event, scan_events

LARGEST_NUMBER = 1e300


class Cost(BaseModel, frozen=True):
    """The cost of training a run: times in seconds, shares of the time, memory in GiB."""

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


class Selected(BaseModel, frozen=True):
    """How the weights of a run were selected: the best of several measured EMAs, by a distance over some samples."""

    of: int
    samples: int


class Config(BaseModel, frozen=True):
    """The sizes of a model and its settings; an imported model has no discriminator."""

    generator_parameters: int
    discriminator_parameters: int | None = None
    model: dict[str, Any] = {}
    run: dict[str, Any] = {}
    """The settings it was trained with; empty for an imported model."""
    classes: list[str] | None = None
    selection: Selected | None = None
    """None if the weights are the last EMA."""


class Measured(BaseModel, frozen=True, extra="allow"):
    """A metrics file: numbers by key, 95 % intervals of some of them, and the protocol."""

    protocol: dict[str, Any]
    intervals: dict[str, tuple[float | None, float | None]] = {}

    @cached_property
    def numbers(self) -> dict[str, float | None]:
        """Every metric by its key; None where it could not be measured."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is None or is_number(value)}

    @model_validator(mode="after")
    def _finite(self) -> "Measured":
        if not self.numbers:
            raise ValueError("it has no metrics")
        for key, value in self.numbers.items():
            if value is not None and not abs(value) <= LARGEST_NUMBER:
                raise ValueError(f"{key[:60]} is not finite")
        return self


class Summary(BaseModel, frozen=True, extra="allow"):
    """The real images: their number and classes, the classifier's accuracy, distances of their reconstructions."""

    images: int
    classes: list[str]
    classifier_accuracy: float | None = None
    reconstructions: int | None = None
    """Number of images that the floor was measured on."""
    psnr_reconstruction: float | None = None
    """PSNR of those reconstructions in dB, the mean over images."""
    psnr_of_mse_reconstruction: float | None = None
    """PSNR of their mean squared error, in dB."""
    held_out: dict[str, str | float | tuple[float, float, float]] | None = None
    """Held-out real images: their number, and their distances by key, each a value and the ends of its interval."""

    def floor(self, base: str) -> float | None:
        """Return the distance `base` (fd_classifier, fid, ...) of the autoencoder's reconstructions, if measured."""
        value = (self.model_extra or {}).get(f"{base}_reconstruction")
        return float(value) if is_number(value) else None


@dataclass(frozen=True)
class RunRecord:
    """The results of one run; an imported model has no settings, curve or cost."""

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

    @property
    def outdated(self) -> bool:
        """Whether params have other settings than those the run was trained with."""
        if self.settings is None:
            return False
        unused = {"flow"} if self.settings.velocity is None else set()
        settings, trained = self.settings.model_dump(mode="json", exclude=unused), self.config.run
        return any(key in trained and trained[key] != value for key, value in settings.items())


@dataclass(frozen=True)
class Inputs:
    """Everything the report shows, except for the pictures."""

    params: Params
    runs: tuple[RunRecord, ...]
    summary: Summary
    reconstruction_mse: float | None
    published: dict[str, Any]

    def record(self, name: str) -> RunRecord:
        """Return the results of a run by name."""
        return next(run for run in self.runs if run.name == name)

    @property
    def outdated(self) -> str:
        """A sentence naming the runs whose settings have changed since their training; empty if there are none."""
        names = ", ".join(run.name for run in self.runs if run.outdated)
        return names and f"Params have changed since these runs were trained: {names}. Run `dvc repro`."


Line = TypeVar("Line")


def read_inputs(params: Params, names: Sequence[str] | None = None) -> Inputs:
    """Read the results of the runs `names`, by default of all in params.

    Raises UserError naming the file and its stage when one is missing or damaged, and a model of other classes.
    """
    runs = tuple(_read_run(params, name) for name in (params.names if names is None else names))
    real = paths.REFERENCE / "summary.json"
    summary = read_output(Summary, real, "reference")
    for run in runs:
        require_same_classes(run.config.classes, paths.model(run.name), summary.classes, real)
    return Inputs(
        params=params,
        runs=runs,
        summary=summary,
        reconstruction_mse=_reconstruction_mse(params),
        published=load_yaml(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")),
    )


def require_output(path: Path, stage: str) -> Path:
    """Return `path`. Raises UserError naming the stage that writes it if it is missing."""
    if not path.exists():
        raise UserError(f"Found no {path}, expected what stage {stage} writes: run `dvc repro {stage}`.")
    return path


def stage_of(params: Params, verb: str, name: str) -> str:
    """Return the DVC stage that does `verb` (train, sample, evaluate) for a model."""
    if name in params.runs:
        return f"{verb}@{name}"
    if verb == "train":
        return f"{'guide' if name in params.guided else 'import'}@{name}"
    return f"{verb}-{'guided' if name in params.guided else 'imported'}@{name}"


def columns_of(rows: list[Row]) -> dict[str, list[float]]:
    """Return the rows of a curve as columns."""
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def read_output(model: type[Model], path: Path, stage: str) -> Model:
    """Read a JSON file into a model. Raises UserError naming file, field and stage if it is missing or wrong."""
    return read_model(model, require_output(path, stage), f"run `dvc repro --force {stage}`")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_run(params: Params, name: str) -> RunRecord:
    stage = stage_of(params, "train", name)
    measured = read_output(Measured, paths.metrics(name), stage_of(params, "evaluate", name))
    described: dict[str, Any] = {
        "metrics": {key: None if value is None else float(value) for key, value in measured.numbers.items()},
        "intervals": {key: ends for key, ends in measured.intervals.items() if None not in ends},
        "protocol": measured.protocol,
        "config": read_output(Config, paths.model(name) / "config.json", stage),
    }
    if name in params.imported:
        return RunRecord(name, None, {}, **described)
    rows = _undamaged(scan_curves, require_output(paths.curves(name), stage), stage)
    if not rows:
        raise UserError(f"Found no rows in {paths.curves(name)}: run `dvc repro --force {stage}`.")
    events = tuple(_undamaged(scan_events, paths.events(name), stage))
    cost = read_output(Cost, paths.costs(name), stage)
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
    require_output(path, "autoencoder")
    stored = read_json(path)
    value = stored.get("reconstruction_mse") if isinstance(stored, dict) else None
    return float(value) if is_number(value) else None
