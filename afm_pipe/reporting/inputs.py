"""What the report reads: the files other stages wrote, checked and typed."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from afm_pipe.params import Params, Run
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, read_text

LARGEST_LOG = 1 << 28  # bytes of curves or events; a run has at most some thousand rows
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


class Config(BaseModel):
    """What a model says of itself; an imported one has no discriminator."""

    model_config = ConfigDict(frozen=True)

    generator_parameters: int
    discriminator_parameters: int | None = None
    model: dict[str, Any] = {}


class Summary(BaseModel):
    """The real images: their number and classes, the classifier's accuracy, distances of their reconstructions."""

    model_config = ConfigDict(frozen=True, extra="allow")

    images: int
    classes: list[str]
    classifier_accuracy: float | None = None
    reconstructions: int | None = None  # images the floor was measured on

    def floor(self, base: str) -> float | None:
        """Return the distance `base` (fd_classifier, fid, ...) of the autoencoder's reconstructions, if measured."""
        value = (self.model_extra or {}).get(f"{base}_reconstruction")
        return float(value) if isinstance(value, int | float) else None


class Event(BaseModel):
    """Something that happened while a run trained: events/RUN.jsonl has one a line."""

    model_config = ConfigDict(frozen=True)

    update: int
    images: int
    kind: str
    text: str
    action: str | None = None

    @property
    def told(self) -> str:
        """What happened, and what was done about it."""
        return f"{self.kind}: {self.text}" + (f"; {self.action}" if self.action else "")


@dataclass(frozen=True)
class RunRecord:
    """Everything known of one run; of an imported model, settings, curve and cost are not."""

    name: str
    settings: Run | None
    metrics: dict[str, float | None]
    protocol: dict[str, Any]
    curve: dict[str, list[float]]  # column -> one value per logged update
    cost: Cost | None
    config: Config
    intervals: dict[str, tuple[float, float]]  # of some metrics, 95 %
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """Everything the report is made of, but for the pictures."""

    params: Params
    runs: tuple[RunRecord, ...]
    summary: Summary
    reconstruction_mse: float | None
    published: dict[str, Any]


Model = TypeVar("Model", bound=BaseModel)


def read_inputs(params: Params) -> Inputs:
    """Read what is known of exactly the runs that params name.

    Raises UserError naming the file and its stage when one is missing or is not what it should be.
    """
    return Inputs(
        params=params,
        runs=tuple(_read_run(params, name) for name in params.names),
        summary=typed(Summary, paths.REFERENCE / "summary.json", "reference"),
        reconstruction_mse=_reconstruction_mse(params),
        published=yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")),
    )


def needed(path: Path, stage: str) -> Path:
    """Return `path`. Raises UserError naming the stage that writes it when there is no such file."""
    if not path.is_file():
        raise UserError(f"Found no {path}, expected what stage {stage} writes: run `dvc repro {stage}`.")
    return path


def stage_of(params: Params, verb: str, name: str) -> str:
    """Return the pipeline's stage that does `verb` (train, sample, evaluate) for a model."""
    if name in params.runs:
        return f"{verb}@{name}"
    if verb == "train":
        return f"{'guide' if name in params.guided else 'import'}@{name}"
    return f"{verb}-{'guided' if name in params.guided else 'imported'}@{name}"


def _read_run(params: Params, name: str) -> RunRecord:
    path, measuring, making = paths.metrics(name), stage_of(params, "evaluate", name), stage_of(params, "train", name)
    stored = _mapping(path, measuring)
    trained = name not in params.imported
    metrics: dict[str, float | None] = {}
    for key, value in stored.items():
        if value is None:
            metrics[key] = None
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= LARGEST_NUMBER:
                raise UserError(f"Found {path} with {key[:60]} not finite: run `dvc repro --force {measuring}`.")
            metrics[key] = float(value)
    if not metrics or not isinstance(stored.get("protocol"), dict):
        raise UserError(f"Found {path} without numbers or their protocol: run `dvc repro --force {measuring}`.")
    return RunRecord(
        name=name,
        settings=params.models[name] if trained else None,
        metrics=metrics,
        protocol=stored["protocol"],
        curve=read_curve(paths.curves(name), making) if trained else {},
        cost=typed(Cost, paths.costs(name), making) if trained else None,
        config=typed(Config, paths.model(name) / "config.json", making),
        intervals=_intervals(stored.get("intervals", {}), path, measuring),
        events=_read_events(paths.events(name), making),
    )


def _intervals(stored: Any, path: Path, stage: str) -> dict[str, tuple[float, float]]:
    try:
        return {key: (float(low), float(high)) for key, (low, high) in stored.items() if low is not None}
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"Found {path} with intervals that are no pairs of numbers by metric: run `dvc repro --force {stage}`."
        ) from None


def _read_events(path: Path, stage: str) -> tuple[Event, ...]:
    """Read what happened while a run trained, where that was written down."""
    if not path.is_file():
        return ()
    events = []
    for number, line in enumerate(_text(path, stage).splitlines(), 1):
        try:
            events.append(Event.model_validate_json(line))
        except ValidationError:
            raise UserError(
                f"Found {line[:60]!r} in {path}, line {number}, expected update, images, kind and text as JSON: run "
                f"`dvc repro --force {stage}`."
            ) from None
    return tuple(events)


def read_curve(path: Path, stage: str, may_grow: bool = False) -> dict[str, list[float]]:
    """Read curves as columns. Of a file that may be growing, no row yet and half a last row are no mistakes."""
    reader = csv.DictReader(_text(path, stage).splitlines())
    try:
        columns: dict[str, list[float]] = {name: [] for name in reader.fieldnames or ()}
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"Found {path}, which is no table ({error}): run `dvc repro --force {stage}`.") from None
    for number, row in enumerate(rows, 2):
        if may_grow and None in row.values():
            break
        for name, values in columns.items():
            try:
                values.append(float(row[name]))
            except (TypeError, ValueError):
                raise UserError(
                    f"Found {str(row[name])[:60]!r} in {path}, line {number}, column {name[:60]}, expected a number: "
                    f"run `dvc repro --force {stage}`."
                ) from None
    if not columns.get("images") and not may_grow:
        raise UserError(f"Found no rows or no column `images` in {path}: run `dvc repro --force {stage}`.")
    return columns


def _text(path: Path, stage: str) -> str:
    try:
        return read_text(needed(path, stage), LARGEST_LOG)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Found {path}, which is no text ({error}): run `dvc repro --force {stage}`.") from None


def _reconstruction_mse(params: Params) -> float | None:
    path = needed(paths.AUTOENCODER, "autoencoder") / "training.json"
    if not path.exists():
        return None  # nothing was trained, so nothing was measured while training
    value = _mapping(path, "autoencoder").get("reconstruction_mse")
    return float(value) if isinstance(value, int | float) else None


def _mapping(path: Path, stage: str) -> dict[str, Any]:
    value = read_json(needed(path, stage))
    if not isinstance(value, dict):
        raise UserError(f"Found {path} with a {type(value).__name__}, expected a mapping: run `dvc repro {stage}`.")
    return value


def typed(model: type[Model], path: Path, stage: str) -> Model:
    """Read a JSON file into a model. Raises UserError naming file, field and stage when it is missing or wrong."""
    try:
        return model.model_validate(_mapping(path, stage))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"Found {path} with a wrong {field} ({first['msg']}): run `dvc repro --force {stage}`."
        ) from None
