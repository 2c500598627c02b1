"""What the cells of tables are, where their results lie, and the tables made of them; free of torch, so quick.

A cell is known by two fingerprints: of its training, under which its weights are kept, and of its measurement, under
which its result is. A killed study goes on where it stopped, one changed cell runs alone, tables share their cells.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from afm_pipe.data.latents_format import provenance_fingerprint, read_provenance
from afm_pipe.objectives.schedules import num_updates, update_at
from afm_pipe.params import Cell, Params, Run
from afm_pipe.params.versions import run_identity, versions
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, sha256_file, write_json
from afm_pipe.runtime.identity import fingerprint


class Units(Protocol):
    """Counts what an update costs."""

    def __call__(self, params: Params, base: Run, run: Run, config: Any) -> float:
        """Return the cost of an update of `run`, whose D and G are those of `base`, in forward passes of G."""


class Trial(NamedTuple):
    """A cell with its fingerprints; `base_training` is that of what it continues, if anything.

    `owner` and `base_owner` are the runs of params, if any, that are the same trainings.
    """

    cell: Cell
    training: str
    measurement: str
    base_training: str | None
    owner: str | None = None
    base_owner: str | None = None

    @property
    def folder(self) -> Path:
        """Where it is trained and its weights are kept."""
        return paths.TRIALS / self.training if self.owner is None else paths.WORK / self.owner / self.training

    @property
    def result(self) -> Path:
        """Where its result is, once it is measured."""
        return paths.TRIALS / "results" / f"{self.measurement}.json"

    def probes(self, num_images: int) -> dict[int, int | None]:
        """Return when it is measured, as `probes` does."""
        return probes(self.cell.run, num_images, self.base_training is not None)

    @property
    def base(self) -> "Trial | None":
        """The job that trains what it continues, without being measured for itself."""
        if self.base_training is None:
            return None
        cell = self.cell._replace(run=self.cell.base)
        return Trial(cell, self.base_training, self.base_training, None, self.base_owner)


class Trials:
    """The cells of some tables as jobs, on the data, the reference and the classifier at hand.

    Raises UserError when one of these is missing.
    """

    def __init__(self, params: Params, names: Iterable[str]) -> None:
        self.params = params
        unknown = [name for name in names if name not in params.tables]
        if unknown:
            known = ", ".join(params.tables) or "none"
            raise UserError(f"Found no table {unknown[0]!r} in params, expected one of {known}.")
        cells = params.cells
        self.by_table = {name: [self._job(cell) for cell in cells[name]] for name in names or params.tables}

    @property
    def all(self) -> list[Trial]:
        """Every job once, in the order of the tables."""
        return list({job.measurement: job for jobs in self.by_table.values() for job in jobs}.values())

    @cached_property
    def provenance(self) -> dict[str, str]:
        """Provenance of the latents."""
        return read_provenance(paths.LATENTS)

    @cached_property
    def _latents(self) -> str:
        return provenance_fingerprint(self.provenance)

    @cached_property
    def _classifier(self) -> str:
        return sha256_file(_needed(paths.CLASSIFIER / "classifier.safetensors", "classifier"))

    @cached_property
    def _measured_with(self) -> dict[str, str]:
        return {
            "reference": sha256_file(_needed(paths.REFERENCE / "summary.json", "reference")),
            "autoencoder": sha256_file(_needed(paths.AUTOENCODER_WEIGHTS, "autoencoder")),
        }

    def _job(self, cell: Cell) -> Trial:
        base = self._training(cell.base, {}) if cell.run is not cell.base else None
        origins = {} if base is None else {"base": base}
        if cell.run.guided:
            origins["classifier"] = self._classifier
        training = self._training(cell.run, origins)
        settings = {
            "training": training,
            "steps": cell.steps,
            "study": self.params.study.model_dump(mode="json"),
            "evaluate": self.params.evaluate.model_dump(mode="json"),
            "micro_batch": self.params.sample.micro_batch,
        }
        measurement = fingerprint(settings, self._measured_with, versions("table"))
        return Trial(cell, training, measurement, base, self._owner(cell.run), base and self._owner(cell.base))

    def _training(self, run: Run, origins: dict[str, str]) -> str:
        return run_identity(run, self.params.latent_shape, self._latents, origins)

    def _owner(self, run: Run) -> str | None:
        """Return the run of params that is the same training, if there is one: whoever comes first trains it."""
        return next((name for name, other in self.params.runs.items() if other == run), None)


def probes(run: Run, num_images: int, continues: bool) -> dict[int, int | None]:
    """Return the updates after which a cell is measured, and of which phase (from 1) each is the end, if of one.

    A third of the way tells a training that got worse from one that has not come far. One that `continues` another is
    measured at its end.
    """
    ends = {update_at(run, phase.until_epoch, num_images): index + 1 for index, phase in enumerate(run.phases)}
    total = num_updates(run, num_images)
    if continues:
        return {total: len(run.phases)}
    found: dict[int, int | None] = {max(total // 3, 1): None}
    return dict(sorted((found | ends).items()))


def write_tables(jobs: Trials, out: Path | None = None) -> list[Path]:
    """Write each table from its cells' results, all of which must be there; return the files."""
    written = []
    for name, of_table in jobs.by_table.items():
        results = [read_json(job.result) for job in of_table]
        cells = [
            {
                "row": job.cell.row,
                "column": job.cell.column,
                "seed": job.cell.seed,
                "training": job.training,
                "continues": job.base_training,
                **result,
            }
            for job, result in zip(of_table, results, strict=True)
        ]
        table = {
            "table": jobs.params.tables[name].model_dump(mode="json"),
            "scale": _scale(jobs, of_table, results),
            "machine": ", ".join(sorted({result["cost"]["machine"] for result in results})),
            "protocol": results[0]["protocol"],
            "trials": [{key: value for key, value in cell.items() if key != "protocol"} for cell in cells],
        }
        path = paths.table(name) if out is None else out / f"{name}.json"
        write_json(path, table)
        written.append(path)
    return written


def _scale(jobs: Trials, of_table: list[Trial], results: list[dict[str, Any]]) -> str:
    """Say in one sentence at what scale a table was made."""
    runs, data = [job.cell.run for job in of_table], jobs.params.data
    sizes = ", ".join(sorted({run.size for run in runs}))
    updates = sorted({result["cost"]["updates"] for result in results})
    span = f"{updates[0]:,}" if len(updates) == 1 else f"{updates[0]:,} to {updates[-1]:,}"
    seeds = len({job.cell.seed for job in of_table})
    channels, side, _ = jobs.params.latent_shape
    return (
        f"Size {sizes} on {channels} x {side} x {side} latents of {data.source} ({data.image_size} pixels); {span} "
        f"updates of batch {runs[0].batch_size}, {seeds} seed{'s' * (seeds != 1)}, {jobs.params.study.samples:,} "
        "samples of each cell: not the paper's scale."
    )


def _needed(path: Path, stage: str) -> Path:
    if not path.is_file():
        raise UserError(f"Found no {path}, expected what stage {stage} writes: run `dvc repro {stage}`.")
    return path
