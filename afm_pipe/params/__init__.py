"""The schema of params.yaml: every setting that changes a number, typed, with its unit and its place in the paper.

These fields have no defaults, so that all values are in the file and DVC sees them change. A run is the `train` section
overridden by the run's own fields.
"""

from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from afm_pipe.params.autoencoders import AutoencoderParams
from afm_pipe.params.base import EMPTY, LISTED, RunName, Section, Seed, deep_merge
from afm_pipe.params.images import (
    AdmReference,
    Data,
    Encode,
    Evaluate,
    FeatureClassifier,
    HeldOut,
    Imported,
    Reference,
    Sample,
)
from afm_pipe.params.latent_spec import LatentSpec
from afm_pipe.params.objectives import VELOCITIES
from afm_pipe.params.sizes import SIZES
from afm_pipe.params.study import Check, Group, Place, Study, StudyTable, TableName, TrialSpec
from afm_pipe.params.toy import Toy
from afm_pipe.params.training import (
    Affine,
    Augmentation,
    Classifier,
    Ema,
    Guidance,
    Guided,
    Phase,
    Run,
    Selection,
    Transport,
)
from afm_pipe.runtime.errors import UserError, describe_mistake

RESERVED_NAMES = {  # in models/ or work/
    *("autoencoder", "classifier", "encode", "trials", "dvclive", "tensorboard", "wandb", "watch.html")
}


class Params(Section):
    """The content of params.yaml."""

    seed: Seed
    """Seed of the data, the autoencoder and the classifiers, and default seed of the runs."""
    data: Data
    held_out: HeldOut | None
    """Real images beside which samples are measured; null: none are held out."""
    autoencoder: SerializeAsAny[AutoencoderParams]
    encode: Encode
    reference: Reference
    train: Run
    """Settings that all runs inherit."""
    runs: Annotated[dict[RunName, Run], Field(min_length=1), EMPTY]
    classifier: Classifier | None
    """Required by phases with guidance."""
    guided: Annotated[dict[RunName, Guided], LISTED]
    imported: Annotated[dict[RunName, Imported], LISTED]
    """Models trained elsewhere, sampled and measured like the runs; guided runs may continue them."""
    sample: Sample
    evaluate: Evaluate
    toy: Toy
    study: Study
    tables: Annotated[dict[TableName, StudyTable], LISTED]
    """Views over trials: the paper's tables, and checks of questions that the paper leaves open."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("train"), dict):
            return raw
        train = {"seed": raw["seed"], **raw["train"]} if "seed" in raw else raw["train"]
        runs = raw.get("runs")
        if isinstance(runs, dict):
            runs = {
                name: deep_merge(train, run or {}) if isinstance(run, dict | None) else run
                for name, run in runs.items()
            }
        return raw | {"train": train, "runs": runs}

    @property
    def models(self) -> dict[str, Run]:
        """All trained models by name: the runs, and the guided runs with all their phases."""
        return self.runs | {name: self._continued(guided) for name, guided in self.guided.items()}

    def model(self, name: str) -> Run:
        """Return a run, or a guided run with all its phases, by name. Raises UserError for an unknown name."""
        if name not in self.models:
            raise UserError(
                f"Found no run {name!r} in params, expected one of {', '.join(self.models)}; `afm-pipe profile` lists "
                "params with other runs."
            )
        return self.models[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all models, including imported ones."""
        return (*self.runs, *self.guided, *self.imported)

    def run_before(self, name: str) -> Run | None:
        """Return the run of which a guided run is a further phase; None where epochs count from 0."""
        guided = self.guided.get(name)
        return None if guided is None or guided.begins_anew else self.runs[guided.base]

    def _base(self, guided: Guided) -> Run:
        """The run that a guided run continues, or `train`, since imported weights have no run."""
        return self.runs.get(guided.base, self.train)

    def _continued(self, guided: Guided) -> Run:
        base = self._base(guided)
        if isinstance(guided.reload_discriminator, float | int):  # the run starts with that D: nothing to reload
            guided = guided.model_copy(update={"reload_discriminator": None})
        seed = base.seed if guided.seed is None else guided.seed
        return guided.continued(base).model_copy(update={"seed": seed})

    @model_validator(mode="after")
    def _check(self) -> "Params":
        taken = RESERVED_NAMES & set(self.names) | {name for name in self.names if self.names.count(name) > 1}
        if taken:
            raise ValueError(f"runs: expected another name than {', '.join(sorted(taken))}, which is taken")
        latent_size = self.latent_shape[1]
        for name, guided in self.guided.items():
            if guided.base in self.imported:
                self._check_imported_base(name, guided)
            else:
                self._check_base(name, guided)
            try:
                guided.continued(self._base(guided))
            except ValidationError as error:
                raise ValueError(f"guided.{name}.run: {_mistake(error)}") from None
        for name, run in self.runs.items():
            if run.guided:
                raise ValueError(
                    f"runs.{name}.phases: expected no guidance; put guided phases under `guided`, with `from: {name}`"
                )
        for name, run in self.models.items():
            for phase in run.phases:
                self._check_guidance(name, run, phase)
        for name, run in self.models.items():
            patch = SIZES[run.size].patch
            if latent_size % patch:
                where = f"runs.{name}" if name in self.runs else f"guided.{name}.run"
                raise ValueError(
                    f"{where}.size: expected a patch that divides the latent side {latent_size}, "
                    f"found {run.size} with patch {patch}"
                )
        return self

    def _check_base(self, name: str, guided: Guided) -> None:
        if guided.base not in self.runs:
            known = ", ".join((*self.runs, *self.imported))
            raise ValueError(f"guided.{name}.from: expected a run or imported model ({known}), found {guided.base}")
        base, reload = self.runs[guided.base], guided.reload_discriminator
        end = base.phases[-1].until_epoch
        if guided.until_epoch <= end and not guided.begins_anew:
            raise ValueError(
                f"guided.{name}.until_epoch: expected more than {end:g}, where {guided.base} ends, "
                f"found {guided.until_epoch:g}"
            )
        if base.schedule == "auto":
            raise ValueError(
                f"guided.{name}.from: expected a run with schedule fixed, whose end is known; found {guided.base} "
                "with schedule auto"
            )
        if isinstance(reload, float | int) and reload not in base.keep_discriminators:
            known = ", ".join(f"{epoch:g}" for epoch in base.keep_discriminators) or "none"
            raise ValueError(
                f"guided.{name}.reload_discriminator: expected one of runs.{guided.base}.keep_discriminators "
                f"({known}), found {reload:g}"
            )

    def _check_imported_base(self, name: str, guided: Guided) -> None:
        objective = guided.run.get("objective")
        if objective not in sorted(VELOCITIES):
            raise ValueError(
                f"guided.{name}.run.objective: expected {' or '.join(sorted(VELOCITIES))}, since {guided.base} is "
                f"imported and has no discriminator to continue; found {objective or 'none'}"
            )

    def _check_guidance(self, name: str, run: Run, phase: Phase) -> None:
        if phase.guidance is None:
            return
        if self.classifier is None:
            raise ValueError(f"{name}: expected a `classifier` section, since a phase has guidance; found null")
        if (run.nfe == 1) != (phase.guidance.t is not None):
            wanted = "`t`, a range of times, for one step" if run.nfe == 1 else "`at`, target times, for several steps"
            raise ValueError(f"{name}: expected guidance with {wanted} (nfe is {run.nfe})")

    @model_validator(mode="after")
    def _check_trials(self) -> "Params":
        for name, table in self.tables.items():
            for place in table.places:
                where = f"tables.{name}: row {place.row}" + (f", column {place.column}" if place.column else "")
                try:
                    run = self._trial(table, place).run
                    for phase in run.phases:
                        self._check_guidance(where, run, phase)
                except ValidationError as error:
                    raise ValueError(f"{where}: {_mistake(error)}") from None
                except ValueError as error:
                    raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None
        return self

    @property
    def trials(self) -> dict[str, list[TrialSpec]]:
        """All trials of every table, resolved."""
        return {name: [self._trial(table, place) for place in table.places] for name, table in self.tables.items()}

    def _trial(self, table: StudyTable, place: Place) -> TrialSpec:
        return table.trial(place, self.train.model_dump(mode="json"), self.study.base, self._bases)

    @cached_property
    def _bases(self) -> dict[str, tuple[Run, Run]]:
        """The run that each model trains first and the model itself, by name; the same but for guided runs.

        Lacks guided runs that begin with an earlier D, since trials continue with the last, and those that continue
        imported weights, since trials train what they continue.
        """
        runs = {name: (run, run) for name, run in self.runs.items()}
        guided = {
            name: each
            for name, each in self.guided.items()
            if each.reload_discriminator in (None, "stall") and each.base in self.runs
        }
        return runs | {name: (self.runs[each.base], self._continued(each)) for name, each in guided.items()}

    @property
    def latent_spec(self) -> LatentSpec:
        """Spec of the latents, as far as params determine it."""
        return self.autoencoder.latent_spec(self.data)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return self.latent_spec.shape


def _mistake(error: ValidationError) -> str:
    """Return the first mistake in a run."""
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    mistake = "found an unknown field" if problem["type"] == "extra_forbidden" else describe_mistake(problem)
    return f"{field}: {mistake}" if field else mistake
