"""A stage is current where it wrote the outs that are there from the inputs that are there."""

from pathlib import Path

import pytest

from afm_pipe.distributed.launch import Launch
from afm_pipe.params.file import load_params
from afm_pipe.pipeline import pool
from afm_pipe.pipeline.current import Step
from afm_pipe.runtime.errors import UserError
from tests.conftest import SMOKE

LAUNCH, INPUT, OUT = Launch(device="cpu", workers=1), Path("input"), Path("out")


@pytest.fixture
def step(project: Path) -> Step:
    """A step that writes `out` from `input`."""
    INPUT.write_text("old")
    return Step("evaluate", "t4", [OUT], INPUT.read_text)


def test_a_stage_whose_input_is_replaced_while_it_runs_is_not_current(step: Step) -> None:
    assert not step.skip(LAUNCH)
    OUT.write_text(INPUT.read_text())
    INPUT.write_text("new")
    step.record()
    assert not step.is_current and not step.skip(LAUNCH)
    OUT.write_text(INPUT.read_text())
    step.record()
    assert step.is_current and step.skip(LAUNCH)


@pytest.mark.parametrize("error", [FileNotFoundError, UserError])
def test_an_input_that_is_missing_at_first_is_recorded_at_the_end(step: Step, error: type[Exception]) -> None:
    found: list[str] = []

    def identity() -> str:
        if not found:
            raise error("there is no input yet")
        return found[0]

    step = Step("evaluate", "t4", [OUT], identity)
    assert not step.skip(LAUNCH)
    found.append("made meanwhile")
    OUT.touch()
    step.record()
    assert step.is_current


def test_the_report_finds_a_folder_of_tables_where_params_have_none(project: Path) -> None:
    pool(load_params(SMOKE, ["tables={}"]), LAUNCH)
    assert Path("results/tables").is_dir() and not list(Path("results/tables").iterdir())
