"""What a stage has already written: a stage whose inputs and outs have not changed since does nothing.

The pool trains, samples and measures everything that `dvc repro` is about to ask for, one stage after the other; those
stages then find their outs current. In a copy of the workspace (`dvc exp run --temp`) the records are the workspace's.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from afm_pipe.data.latents_format import provenance_fingerprint, read_provenance
from afm_pipe.params import Params
from afm_pipe.params.versions import origin_files, run_identity, versions
from afm_pipe.runtime import paths
from afm_pipe.runtime.environment import env_rank
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import json_value, sha256_file, write_json
from afm_pipe.runtime.identity import fingerprint


class Step(NamedTuple):
    """A stage of one name (of a run, or empty), its outs, and a hash of all that shapes them."""

    stage: str
    name: str
    outs: Sequence[Path]
    identity: Callable[[], str]
    """Raises OSError or UserError where an input is missing."""

    @property
    def _record(self) -> Path:
        return paths.WORK / "current" / f"{self.stage}-{self.name}.json"

    @property
    def is_current(self) -> bool:
        """Whether this stage wrote the outs that are there, from the inputs that are there."""
        record = paths.local(self._record)
        recorded = json_value(record, "outs"), json_value(record, "identity")
        if recorded[0] is None:
            return False
        try:
            return recorded == (_hashes(self.outs), self.identity())
        except (OSError, UserError):
            return False

    def skip(self) -> bool:
        """Return whether the stage is current, and say so."""
        if not self.is_current:
            return False
        if env_rank() == 0:
            print(f"{' '.join(map(str, self.outs))}: current.")
        return True

    def record(self) -> None:
        """Record that the outs have been written from the inputs that are there."""
        write_json(self._record, {"outs": _hashes(self.outs), "identity": self.identity()})


def train_step(params: Params, name: str) -> Step:
    """Return the step that trains a run or guided run."""
    outs = [paths.model(name), paths.curves(name), paths.events(name), paths.costs(name)]
    return Step("train", name, outs, partial(_run_identity, params, name))


def sample_step(params: Params, name: str) -> Step:
    """Return the step that draws a model's pictures."""
    settings = [params.sample.model_dump(mode="json"), params.evaluate.samples, params.evaluate.seed]
    folder, inputs = paths.samples(name), [paths.model(name), paths.AUTOENCODER]
    outs = [folder / "grid.png", folder / "interpolation.png"]
    return Step("sample", name, outs, partial(_identity, "sample", settings, inputs))


def evaluate_step(params: Params, name: str) -> Step:
    """Return the step that measures a model."""
    settings = [params.evaluate.model_dump(mode="json"), params.sample.micro_batch]
    inputs = [paths.model(name), paths.AUTOENCODER, paths.REFERENCE]
    outs = [paths.metrics(name), paths.samples(name) / "nearest.png"]
    return Step("evaluate", name, outs, partial(_identity, "evaluate", settings, inputs))


def classifier_step(params: Params) -> Step:
    """Return the step that trains the classifier of guidance."""
    settings = [params.seed, params.classifier and params.classifier.model_dump(mode="json")]
    return Step(
        "classifier",
        "",
        [paths.CLASSIFIER],
        partial(_latents_identity, "classifier", settings),
    )


def toy_step(params: Params) -> Step:
    """Return the step of the 1-D toy experiment."""
    settings = [params.seed, params.toy.model_dump(mode="json")]
    return Step("toy", "", [paths.TOY], partial(_identity, "toy", settings, ()))


def table_step(params: Params, name: str) -> Step:
    """Return the step that trains and measures the trials of a table."""
    return Step("table", name, [paths.table(name)], partial(_table_identity, params, name))


def _table_identity(params: Params, name: str) -> str:
    from afm_pipe.study.trials import Trials

    settings = [
        params.tables[name].model_dump(mode="json"),
        [trial.measurement for trial in Trials(params, [name]).all],
    ]
    return _identity("table", settings, ())


def _identity(stage: str, settings: Any, inputs: Iterable[Path]) -> str:
    return fingerprint(settings, _hashes(inputs), versions(stage))


def _latents_identity(stage: str, settings: Any) -> str:
    return fingerprint(settings, {"latents": _latents()}, versions(stage))


def _run_identity(params: Params, name: str) -> str:
    origins = {part: sha256_file(file) for part, file in origin_files(params, name).items()}
    identity = run_identity(params.model(name), params.latent_shape, _latents(), origins)
    needed = {file.parent / "config.json" for part, file in origin_files(params, name).items() if part != "reference"}
    return fingerprint(identity, _hashes(sorted(needed)), {})  # their classes are checked, too


def _latents() -> str:
    return provenance_fingerprint(read_provenance(paths.LATENTS))


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of every file, also in folders, by path."""
    found = (path for each in files for path in (sorted(each.rglob("*")) if each.is_dir() else [each]))
    return {
        str(path): _sha256(path, (at := path.stat()).st_size, at.st_mtime_ns) for path in found if not path.is_dir()
    }


@lru_cache(maxsize=10_000)
def _sha256(path: Path, size: int, modified: int) -> str:
    return sha256_file(path)
