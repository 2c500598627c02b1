"""Trials of the study: their identities, folders and probes. Free of torch.

The identity of a trial's training names the folder of its weights, the identity of its measurement names its result: a
killed study resumes, only changed trials are retrained, and tables share trials.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from afm_pipe.data.latents_format import provenance_fingerprint, read_provenance
from afm_pipe.objectives.schedules import num_updates, update_at
from afm_pipe.params import Params, Run, TrialSpec
from afm_pipe.params.sizes import block_work
from afm_pipe.params.versions import run_identity, versions
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, sha256_file, write_json
from afm_pipe.runtime.identity import fingerprint

FLOW_WORK = 0.5  # of an image in flow matching beside one in an adversarial flow, with its samples of many passes


@dataclass(frozen=True)
class Trial:
    """One training of a study."""

    spec: TrialSpec
    training: str
    """Identity of its run."""
    measurement: str | None
    """Identity of its result; None for a base, which is trained only for its weights."""
    base: "Trial | None" = None
    """The trial it continues, if any."""
    owner: str | None = None
    """The equal run of params, if any; both share a folder, and the first to start trains."""

    @property
    def run(self) -> Run:
        """The run to train."""
        return self.spec.run

    @property
    def folder(self) -> Path:
        """The folder of its training state and weights."""
        return (paths.TRIALS if self.owner is None else paths.WORK / self.owner) / self.training

    @property
    def result(self) -> Path:
        """The file of its result."""
        return paths.TRIALS / "results" / f"{self.measurement}.json"

    def probes(self, num_images: int) -> dict[int, int | None]:
        """Return its probes, as the function `probes` does."""
        return probes(self.run, num_images, self.base is not None)

    def first_update(self, num_images: int) -> int:
        """Return the update of its base from which it counts on; 0 without a base, or after another objective."""
        if self.base is None or self.base.run.objective != self.run.objective:
            return 0
        return max(self.base.probes(num_images))


class Trials:
    """The trials of some tables, by default all, for the current data, reference and classifier.

    Raises UserError for an unknown table and for a missing input.
    """

    def __init__(self, params: Params, names: Iterable[str] = ()) -> None:
        self.params = params
        unknown = [name for name in names if name not in params.tables]
        if unknown:
            known = ", ".join(params.tables) or "none"
            raise UserError(f"Found no table {unknown[0]!r} in params, expected one of {known}.")
        specs = params.trials
        self.by_table = {name: [self._trial(spec) for spec in specs[name]] for name in names or params.tables}

    @property
    def all(self) -> list[Trial]:
        """Every trial once, in the order of the tables."""
        return list({trial.measurement: trial for trials in self.by_table.values() for trial in trials}.values())

    @property
    def trained(self) -> list[Trial]:
        """Every trial once, and the bases that some continue."""
        bases = {base.training: base for trial in self.all if (base := trial.base) is not None}
        return [*self.all, *bases.values()]

    @cached_property
    def _latents(self) -> str:
        return provenance_fingerprint(read_provenance(paths.LATENTS))

    @cached_property
    def _classifier(self) -> str:
        return _digest(paths.CLASSIFIER / "classifier.safetensors", "classifier")

    @cached_property
    def _measured_with(self) -> dict[str, str]:
        return {
            "reference": _digest(paths.REFERENCE / "summary.json", "reference"),
            "autoencoder": _digest(paths.AUTOENCODER_WEIGHTS, "autoencoder"),
        }

    def _trial(self, spec: TrialSpec) -> Trial:
        base = None
        if spec.run is not spec.base:
            base = Trial(spec._replace(run=spec.base), self._training(spec.base), None, owner=self._owner(spec.base))
        training = self._training(spec.run, base)
        settings = {
            "training": training,
            "steps": spec.steps,
            "study": self.params.study.model_dump(mode="json"),
            "evaluate": self.params.evaluate.model_dump(mode="json"),
            "micro_batch": self.params.sample.micro_batch,
        }
        if spec.sampling is not None:
            settings["sampling"] = spec.sampling.model_dump(mode="json")
        measurement = fingerprint(settings, self._measured_with, versions("table"))
        return Trial(spec, training, measurement, base, self._owner(spec.run))

    def _training(self, run: Run, base: Trial | None = None) -> str:
        origins = {} if base is None else {"base": base.training}
        if run.guided:
            origins["classifier"] = self._classifier
        if (
            run.selection is not None and self._owner(run) is not None
        ):  # then as `train` does; other trials select nothing
            origins["reference"] = self._measured_with["reference"]
        return run_identity(run, self.params.latent_shape, self._latents, origins)

    def _owner(self, run: Run) -> str | None:
        return next((name for name, other in self.params.runs.items() if other == run), None)


def probes(run: Run, num_images: int, continues: bool) -> dict[int, int | None]:
    """Return the updates after which a run is measured, each with the phase (from 1) that ends there, if any.

    The probe at a third of the updates distinguishes a run that got worse from one that is not trained enough. A run
    that `continues` another is measured only at its end.
    """
    ends = {update_at(run, phase.until_epoch, num_images): index + 1 for index, phase in enumerate(run.phases)}
    total = num_updates(run, num_images)
    if continues:
        return {total: len(run.phases)}
    found: dict[int, int | None] = {max(total // 3, 1): None}
    return dict(sorted((found | ends).items()))


def run_weight(run: Run, continues: bool = False) -> float:
    """Estimate the work of a run, in no particular unit; of one that `continues` another, that of its last phase."""
    ends = [0.0, *(phase.until_epoch for phase in run.phases)]
    epochs = ends[-1] - (ends[-2] if continues else 0.0)
    updated = FLOW_WORK if run.objective == "flow_matching" else (run.repeats + run.discriminator_updates) / 2
    return epochs * updated * block_work(run.size)


def write_tables(trials: Trials, out: Path | None = None) -> list[Path]:
    """Write each table from the results of its trials, which must all exist; return the files."""
    written = []
    for name, of_table in trials.by_table.items():
        results = [read_json(trial.result) for trial in of_table]
        table = {
            "table": trials.params.tables[name].model_dump(mode="json"),
            "scale": _scale(trials.params, of_table, results),
            "machine": ", ".join(sorted({result["cost"]["machine"] for result in results})),
            "protocol": _protocol(results),
            "trials": [
                trial.spec.place._asdict()
                | {"training": trial.training, "continues": trial.base and trial.base.training}
                | {key: value for key, value in result.items() if key != "protocol"}
                for trial, result in zip(of_table, results, strict=True)
            ],
        }
        path = paths.table(name) if out is None else out / f"{name}.json"
        write_json(path, table)
        written.append(path)
    return written


def _scale(params: Params, trials: list[Trial], results: list[dict[str, Any]]) -> str:
    """Describe the scale of a table in one sentence."""
    sizes = ", ".join(sorted({trial.run.size for trial in trials}))
    updates = sorted({result["cost"]["updates"] for result in results})
    span = f"{updates[0]:,}" if len(updates) == 1 else f"{updates[0]:,} to {updates[-1]:,}"
    seeds = len({trial.spec.place.seed for trial in trials})
    channels, side, _ = params.latent_shape
    shares = _protocol(results).get("class_shares")
    measured = f"{params.study.samples:,} samples of each trial" + (f" in {shares} class shares" if shares else "")
    return (
        f"Size {sizes} on {channels} x {side} x {side} latents of {params.data.source} ({params.data.image_size} "
        f"pixels); {span} updates of batch {trials[0].run.batch_size}, {seeds} seed{'s' * (seeds != 1)}, "
        f"{measured}: not the paper's scale."
    )


def _protocol(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the protocol of the trials; a trial that diverged before it was measured has none."""
    return next((result["protocol"] for result in results if result["protocol"]), {})


def _digest(path: Path, stage: str) -> str:
    if not path.is_file():
        raise UserError(f"Found no {path}, expected what stage {stage} writes: run `dvc repro {stage}`.")
    return sha256_file(path)
