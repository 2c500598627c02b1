"""What stages, status and page say of results made by other code, and of work that is not theirs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afm_pipe import pipeline
from afm_pipe.cli.status import status_text
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.params.versions import code_record, declared
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import write_json
from tests.reporting.report_inputs import make_params, write_inputs

LAUNCH = Launch(device="cpu", checkpoint_seconds=0)
SHORT = "runs.t4.phases=[{until_epoch: 2}]"  # 15 updates
NOTICE = "Made by different source code under the same version: "
OTHER = f"v{declared()['evaluation']} 00000000"


@pytest.fixture
def params(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Params]) -> Params:
    """Params of a project in which t4 is trained."""
    shutil.copytree(discs, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    params = change(SHORT, "guided.g={from: t4, until_epoch: 4}")
    pipeline.train(params, "t4", LAUNCH)
    return params


def edit_source(path: Path, *place: str) -> None:
    """Make a file say that its result was made by other source."""
    stored = json.loads(path.read_text())
    code = stored
    for name in place:
        code = code[name]
    code["objective"] = code["objective"].split()[0] + " 00000000"
    path.write_text(json.dumps(stored))


def made_elsewhere(name: str) -> None:
    edit_source(paths.model(name) / "config.json", "provenance", "code")


def notices(said: str) -> list[str]:
    return [line.strip() for line in said.splitlines() if NOTICE in line]


def test_a_model_records_its_code_and_nothing_is_said_of_todays(
    params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, place in ((paths.model("t4") / "config.json", ("provenance", "code")), (paths.costs("t4"), ("code",))):
        stored: Any = json.loads(path.read_text())
        for name in place:
            stored = stored[name]
        assert stored == code_record("train")
    pipeline.sample(params, "t4", LAUNCH)
    assert not notices(capsys.readouterr().out + status_text(params))


def test_status_and_the_stages_that_reuse_a_model_say_that_other_code_made_it(
    params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    made_elsewhere("t4")
    (line,) = notices(status_text(params))
    assert line.startswith(f"{NOTICE}t4 (objective). ")
    capsys.readouterr()
    pipeline.sample(params, "t4", LAUNCH)
    assert notices(capsys.readouterr().out) == [line.replace("t4", "models/t4")]
    pipeline.train(params, "g", LAUNCH)
    assert notices(capsys.readouterr().out) == [line.replace("t4", "models/t4")]


def test_a_run_resumed_under_other_code_keeps_the_code_it_began_with(
    params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    (begun,) = paths.WORK.glob("t4/*/code.json")
    edit_source(begun)
    shutil.rmtree(paths.model("t4"))
    capsys.readouterr()
    pipeline.train(params, "t4", LAUNCH)
    assert len(notices(capsys.readouterr().out)) == 1
    assert f"{NOTICE}t4 (objective)" in status_text(params)


def test_work_of_other_params_is_named_and_stays(
    params: Params, change: Callable[..., Params], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in paths.WORK.glob("t4/*/checkpoints/*/*")}
    (other,) = {path.relative_to(paths.WORK).parts[1] for path in before}
    capsys.readouterr()
    pipeline.train(change(SHORT, "runs.t4.lr=0.0005"), "t4", LAUNCH)
    assert f"Not resumed: work/t4/{other}, of other params, data or versions." in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_page_says_it_in_one_line(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    metrics = json.loads(paths.metrics("t4").read_text())
    for other, said in ((code_record("evaluate")["evaluation"], []), (OTHER, ["t4 (evaluation)"])):
        metrics["protocol"]["code"] = code_record("evaluate") | {"evaluation": other}
        write_json(paths.metrics("t4"), metrics)
        pipeline.report(params)
        lines = [
            line for line in (paths.REPORT / "index.html").read_text().splitlines() if "different source code" in line
        ]
        assert len(lines) == len(said)
        assert all(text in line for text, line in zip(said, lines, strict=True))
