"""An evaluation that is cut off at its end resumes, and one whose model was replaced is done again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.evaluation.evaluator import PICTURED, Evaluator
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.pipeline.current import evaluate_step
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import read_json, write_json
from afm_pipe.runtime.lease import LeaseLostError
from afm_pipe.sampling.sampler import Sampler
from tests.pipeline.test_measured_images import OVERRIDES, SAMPLES, measured, summary  # noqa: F401 (fixtures)
from tests.sampling.test_requests import project  # noqa: F401 (fixture)

LAUNCH = Launch(device="cpu", checkpoint_seconds=0)
WORK_DIR = paths.WORK / "one" / "evaluate"


@pytest.fixture
def params(summary: Any) -> Params:  # noqa: F811
    """Those of a copy of the measured project, in which the model `one` is not evaluated yet."""
    for path in (paths.WORK, paths.RESULTS, paths.samples("one")):
        shutil.rmtree(path, ignore_errors=True)
    return load_params(overrides=OVERRIDES)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of samples drawn at a time."""
    seen, generate = [], Sampler.images

    def images(*args: Any) -> Any:
        seen.append(len(args[1]))
        return generate(*args)

    monkeypatch.setattr(Sampler, "images", images)
    return seen


def in_nearest(monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    """Let something happen once the samples are measured, while the picture of the nearest images is drawn."""
    nearest = Evaluator.nearest

    def with_event(self: Evaluator, sampler: Sampler) -> Image.Image:
        happens()
        return nearest(self, sampler)

    monkeypatch.setattr(Evaluator, "nearest", with_event)


def test_what_was_measured_is_kept_until_the_last_file_is_written(params: Params, drawn: list[int]) -> None:
    paths.samples("one").parent.mkdir(exist_ok=True)
    paths.samples("one").touch()  # a file where the folder of the picture belongs
    with pytest.raises(FileExistsError):
        pipeline.evaluate(params, "one", LAUNCH)
    assert sum(drawn) == SAMPLES + PICTURED
    paths.samples("one").unlink()
    drawn.clear()
    pipeline.evaluate(params, "one", LAUNCH)
    assert sum(drawn) == PICTURED, "no sample is measured again"
    assert evaluate_step(params, "one").is_current
    assert not [path for path in WORK_DIR.iterdir() if path.is_dir()]


def test_an_evaluation_that_another_process_has_taken_over_writes_and_removes_nothing(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_over() -> None:
        (lease,) = WORK_DIR.glob("lease-*")
        lease.with_name("lease-000009").write_text(json.dumps({"host": "node-b", "pid": 7, "token": "its own"}))
        lease.unlink()

    in_nearest(monkeypatch, take_over)
    with pytest.raises(LeaseLostError, match=f"Found {WORK_DIR} taken over by process 7 on node-b"):
        pipeline.evaluate(params, "one", LAUNCH)
    assert not paths.metrics("one").exists() and not paths.samples("one").exists()
    (state,) = (path for path in WORK_DIR.iterdir() if path.is_dir())
    assert len([*state.iterdir()]) > 1, "the samples measured so far, beside the record of the code"


def test_a_model_that_is_replaced_while_it_is_measured_is_measured_again(
    params: Params, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = paths.model("one") / "config.json"

    def replace_model() -> None:
        write_json(config, read_json(config) | {"images_seen": 8})

    with monkeypatch.context() as patch:
        in_nearest(patch, replace_model)
        pipeline.evaluate(params, "one", LAUNCH)
    assert read_json(paths.metrics("one"))["protocol"]["images_seen"] == 0
    drawn.clear()
    pipeline.evaluate(params, "one", LAUNCH)
    assert sum(drawn) == SAMPLES + PICTURED
    assert read_json(paths.metrics("one"))["protocol"]["images_seen"] == 8
    assert Path(paths.samples("one") / "nearest.png").is_file() and evaluate_step(params, "one").is_current
