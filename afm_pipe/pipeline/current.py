"""What a stage has already written: a stage whose inputs and outs have not changed since does nothing.

The pool trains, samples and measures everything that `dvc repro` is about to ask for, one stage after the other; those
stages then find their outs current. In a copy of the workspace (`dvc exp run --temp`) the records are the workspace's.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from afm_pipe.data.latents_format import provenance_fingerprint, read_provenance
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.params.sizes import SIZES
from afm_pipe.params.versions import origin_files, run_identity, versions
from afm_pipe.runtime import paths
from afm_pipe.runtime.environment import env_rank
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import json_value, sha256_file, write_json
from afm_pipe.runtime.identity import fingerprint


@dataclass
class Step:
    """A stage of one name (of a run, or empty), its outs, and a hash of all that shapes them."""

    stage: str
    name: str
    outs: Sequence[Path]
    identity: Callable[[], str]
    """Raises OSError or UserError where an input is missing."""
    state: Callable[[], Iterable[Path]] = tuple
    """Folders and files under work/ from which the stage would take its result instead of computing it again."""
    _begun_with: str | None = field(default=None, init=False)
    """The identity before the stage loaded anything; None before `skip`, or where an input was missing."""

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

    def skip(self, launch: Launch) -> bool:
        """Return whether the stage is current, and say so.

        Where the launch settings force it, discard what earlier sessions left under work/ instead, and return False: if
        it is interrupted, the same command resumes it, since it is then no longer current. Call this before anything is
        loaded: what the stage then records are the inputs of now.
        """
        with suppress(OSError, UserError, ValueError):  # ValueError: a name with a null byte, which the stage refuses
            self._begun_with = self.identity()
        if not self.is_current:
            return False
        forced = launch.forces(self.stage, self.name)
        if env_rank() == 0:
            outs = " ".join(map(str, self.outs))
            print(f"{outs}: current, and done again, as AFM_FORCE says." if forced else f"{outs}: current.")
        if forced and env_rank() == 0:
            for path in (self._record, *self.state()):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return not forced

    def record(self) -> None:
        """Record that the outs have been written from the inputs that `skip` found, or without it, from those there.

        Where an input was replaced meanwhile, such as the model by a run that ended, the stage is then not current.
        """
        write_json(self._record, {"outs": _hashes(self.outs), "identity": self._begun_with or self.identity()})


def train_step(params: Params, name: str) -> Step:
    """Return the step that trains a run or guided run."""
    outs = [paths.model(name), paths.curves(name), paths.events(name), paths.costs(name)]
    identity, state = partial(_run_identity, params, name), partial(_run_state, params, name)
    return Step("train", name, outs, identity, state)


def sample_step(params: Params, name: str) -> Step:
    """Return the step that draws a model's pictures, and the images that `evaluate` measures if they are kept."""
    settings = [params.sample.model_dump(mode="json"), params.evaluate.samples, params.evaluate.seed]
    folder, inputs = paths.samples(name), [paths.model(name), paths.AUTOENCODER]
    outs = [folder / "grid.png", folder / "interpolation.png"]
    if params.sample.keep_images:  # in the class shares of the reference
        summary = paths.REFERENCE / "summary.json"
        settings.append([json_value(summary, "classes"), json_value(summary, "class_counts")])
        outs.append(folder / "images")
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
        partial(_classifier_state, params),
    )


def _classifier_state(params: Params) -> list[Path]:
    return [paths.WORK / "classifier" / classifier_identity(params, _latents())] if params.classifier else []


def classifier_identity(params: Params, latents: str) -> str:
    """Return the identity of the training of guidance's classifier, which names its folder under work/classifier."""
    assert params.classifier is not None, "there is nothing to train"
    described = {"classifier": params.classifier.model_dump(), "seed": params.seed}
    shaped = [described, SIZES[params.classifier.size]]
    return fingerprint(shaped, {"latents": latents}, versions("classifier"))


def toy_step(params: Params) -> Step:
    """Return the step of the 1-D toy experiment."""
    settings = [params.seed, params.toy.model_dump(mode="json")]
    return Step("toy", "", [paths.TOY], partial(_identity, "toy", settings, ()))


def table_step(params: Params, name: str) -> Step:
    """Return the step that trains and measures the trials of a table."""
    identity, state = partial(_table_identity, params, name), partial(_table_state, params, name)
    return Step("table", name, [paths.table(name)], identity, state)


def _table_identity(params: Params, name: str) -> str:
    from afm_pipe.study.trials import Trials

    settings = [
        params.tables[name].model_dump(mode="json"),
        [trial.measurement for trial in Trials(params, [name]).all],
    ]
    return _identity("table", settings, ())


def _table_state(params: Params, name: str) -> list[Path]:
    """Return the results of a table's trials, and their training; that of runs in params stays."""
    from afm_pipe.study.trials import Trials

    trials = Trials(params, [name]).all
    trained = [each for trial in trials for each in (trial, trial.base) if each is not None and each.owner is None]
    return [*(trial.result for trial in trials), *dict.fromkeys(trial.folder for trial in trained)]


def _identity(stage: str, settings: Any, inputs: Iterable[Path]) -> str:
    return fingerprint(settings, _hashes(inputs), versions(stage))


def _latents_identity(stage: str, settings: Any) -> str:
    return fingerprint(settings, {"latents": _latents()}, versions(stage))


def _run_identity(params: Params, name: str) -> str:
    identity = _run_fingerprint(params, name)
    needed = {file.parent / "config.json" for part, file in origin_files(params, name).items() if part != "reference"}
    return fingerprint(identity, _hashes(sorted(needed)), {})  # their classes are checked, too


def _run_state(params: Params, name: str) -> list[Path]:
    return [paths.WORK / name / _run_fingerprint(params, name)]


def _run_fingerprint(params: Params, name: str) -> str:
    origins = {part: sha256_file(file) for part, file in origin_files(params, name).items()}
    return run_identity(params.model(name), params.latent_shape, _latents(), origins)


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
