"""The schema of params.yaml: every knob that changes a number, typed, with its unit and its place in the paper.

No field has a hidden default: what shapes a number is written in the file, so that DVC sees it change.
A run is the `train` section with the run's own fields laid over it.
"""

import re
from typing import Annotated, Any, NamedTuple

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from afm_pipe.params.autoencoders import AutoencoderParams
from afm_pipe.params.base import NAME, RunName, Section, Seed
from afm_pipe.params.images import (
    AdmReference,
    Data,
    Encode,
    Evaluate,
    FeatureClassifier,
    Features,
    Imported,
    Reference,
    Sample,
)
from afm_pipe.params.latent_spec import LatentSpec
from afm_pipe.params.sizes import SIZES
from afm_pipe.params.study import Axis, Check, Group, Place, Study, StudyTable, TableName
from afm_pipe.params.toy import Toy, ToyGuidance
from afm_pipe.params.training import (
    Affine,
    Augmentation,
    Classifier,
    Ema,
    GradientNormalization,
    Guidance,
    Guided,
    Penalty,
    Phase,
    Run,
    Transport,
)

__all__ = [
    "AdmReference",
    "Affine",
    "Augmentation",
    "AutoencoderParams",
    "Axis",
    "Check",
    "Classifier",
    "Data",
    "Ema",
    "Encode",
    "Evaluate",
    "FeatureClassifier",
    "Features",
    "GradientNormalization",
    "Group",
    "Guidance",
    "Guided",
    "Imported",
    "LatentSpec",
    "Params",
    "Penalty",
    "Phase",
    "Place",
    "Reference",
    "Run",
    "Sample",
    "Study",
    "StudyTable",
    "Toy",
    "ToyGuidance",
    "Transport",
    "deep_merge",
    "valid_name",
]

RESERVED_NAMES = {
    "autoencoder",
    "classifier",
    "encode",
    "trials",
    "dvclive",
    "watch.html",
}  # not runs, in models/ or work/


class Params(Section):
    """The whole of params.yaml."""

    seed: Seed
    """Of everything random that is not a run's or a sample's; also a run's own, unless it names another."""
    data: Data
    autoencoder: SerializeAsAny[AutoencoderParams]
    encode: Encode
    reference: Reference
    train: Run
    """What all runs share."""
    runs: Annotated[dict[RunName, Run], Field(min_length=1)]
    classifier: Classifier | None
    """Needed by phases with guidance."""
    guided: dict[RunName, Guided]
    imported: dict[RunName, Imported]
    """Models that are not trained here, sampled and measured like those that are."""
    sample: Sample
    evaluate: Evaluate
    toy: Toy
    study: Study
    tables: dict[TableName, StudyTable]
    """Tables whose cells are trained for them: the paper's, and the checks it left open."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("train"), dict):
            return raw
        train = {"seed": raw["seed"], **raw["train"]} if "seed" in raw else raw["train"]
        runs = raw.get("runs")
        if isinstance(runs, dict):
            runs = {name: deep_merge(train, run) if isinstance(run, dict) else run for name, run in runs.items()}
        return raw | {"train": train, "runs": runs}

    @property
    def models(self) -> dict[str, Run]:
        """All trained models by name: the runs, and the guided runs resolved."""
        return self.runs | {name: self._continued(guided) for name, guided in self.guided.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All models by name, the imported ones too: the rows of the tables."""
        return (*self.runs, *self.guided, *self.imported)

    def _continued(self, guided: Guided) -> Run:
        base = self.runs[guided.base]
        phase = Phase(**{name: getattr(guided, name) for name in Phase.model_fields})
        seed = base.seed if guided.seed is None else guided.seed
        return base.model_copy(update={"phases": (*base.phases, phase), "seed": seed})

    @model_validator(mode="after")
    def _check(self) -> "Params":
        taken = RESERVED_NAMES & set(self.names) | {name for name in self.names if self.names.count(name) > 1}
        if taken:
            raise ValueError(f"runs: expected another name than {', '.join(sorted(taken))}, which is taken")
        latent_size = self.latent_shape[1]
        for name, guided in self.guided.items():
            if guided.base not in self.runs:
                raise ValueError(f"guided.{name}.from: expected a run ({', '.join(self.runs)}), found {guided.base}")
            end = self.runs[guided.base].phases[-1].until_epoch
            if guided.until_epoch <= end:
                raise ValueError(
                    f"guided.{name}.until_epoch: expected more than {end:g}, where {guided.base} ends, "
                    f"found {guided.until_epoch:g}"
                )
            if self.runs[guided.base].schedule == "auto":
                raise ValueError(
                    f"guided.{name}.from: expected a run of a fixed schedule, whose end is known; found {guided.base} "
                    "with schedule auto"
                )
            if guided.reload_discriminator is not None:
                raise ValueError(f"guided.{name}.reload_discriminator: a guided run starts from its base's last D")
        for name, run in self.runs.items():
            if run.guided:
                raise ValueError(
                    f"runs.{name}.phases: a guided phase continues a run under `guided`, with `from: {name}`"
                )
        for name, run in self.models.items():
            for phase in run.phases:
                self._check_guidance(name, run, phase)
        for name, run in self.runs.items():
            patch = SIZES[run.size].patch
            if latent_size % patch:
                raise ValueError(
                    f"runs.{name}.size: expected a patch that divides the latent side {latent_size}, "
                    f"found {run.size} with patch {patch}"
                )
        return self

    def _check_guidance(self, name: str, run: Run, phase: Phase) -> None:
        if phase.guidance is None:
            return
        if self.classifier is None:
            raise ValueError(f"{name}: expected a `classifier` section, since a phase has guidance; found null")
        if (run.nfe == 1) != (phase.guidance.t is not None):
            wanted = "`t`, a range of times, for one step" if run.nfe == 1 else "`at`, target times, for several steps"
            raise ValueError(f"{name}: expected guidance with {wanted} (nfe is {run.nfe})")

    @model_validator(mode="after")
    def _check_cells(self) -> "Params":
        for name, table in self.tables.items():
            for place in table.places():
                where = f"tables.{name}: row {place.row}" + (f", column {place.column}" if place.column else "")
                try:
                    cell = self._cell(table, place)
                    for phase in cell.run.phases:
                        self._check_guidance(where, cell.run, phase)
                except ValidationError as error:
                    problem = error.errors()[0]
                    field, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
                    unknown = problem["type"] == "extra_forbidden"
                    told = "found an unknown field" if unknown else f"found {problem['input']!r}, {message}"
                    raise ValueError(f"{where}: {field}: {told}") from None
                except ValueError as error:
                    raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None
        return self

    @property
    def cells(self) -> dict[str, list["Cell"]]:
        """All cells of every table, each resolved to what is trained and measured."""
        return {name: [self._cell(table, place) for place in table.places()] for name, table in self.tables.items()}

    def _cell(self, table: StudyTable, place: Place) -> "Cell":
        own = self.study.base
        for overrides in place.overrides:
            own = deep_merge(own, overrides)
        own = dict(own)
        then, steps = own.pop("then", None), own.pop("steps", None)
        if steps is not None and (type(steps) is not int or not 1 <= steps <= 1024):
            raise ValueError(f"steps: expected a number from 1 to 1024, found {steps!r:.40}")
        train = self.train.model_dump(mode="json")
        base = Run.model_validate(deep_merge(train, own))
        run = base
        if then is not None:
            run = base.model_copy(update={"phases": (*base.phases, Phase.model_validate(then))})
        return Cell(place.row, place.column, place.seed, base, run, steps)

    @property
    def latent_spec(self) -> LatentSpec:
        """Spec of the latents, as far as params know it."""
        return self.autoencoder.latent_spec(self.data)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return self.latent_spec.shape


class Cell(NamedTuple):
    """A cell of a table, resolved: what is trained, and how many steps an any-step model is measured at."""

    row: str
    column: str
    seed: int
    base: Run
    """What is trained first; `run` itself unless one more phase continues it, as a guided run continues its base."""
    run: Run
    steps: int | None


def valid_name(name: str) -> bool:
    """Tell whether a model may be called so."""
    return re.fullmatch(NAME, name) is not None


def deep_merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `own` laid over it: mappings merge field by field, all else (lists too) is replaced."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        merged[key] = deep_merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
