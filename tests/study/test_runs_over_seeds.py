"""A table whose rows are runs, and the summary that shows it."""

from typing import Any

import pytest
from pydantic import ValidationError

from afm_pipe.cli.status import summary_text
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from tests.reporting.report_inputs import write_inputs
from tests.study.study_files import declared, make_params, write_study

pytestmark = pytest.mark.usefixtures("project")


def test_rows_may_be_runs_and_the_summary_shows_them_over_seeds_in_80_columns() -> None:
    table = declared(rows=("a plain GAN", "one step"), checks=())
    table["rows"]["settings"] = {"a plain GAN": {"run": "t4-no-transport"}, "one step": {"run": "t4"}}
    params = make_params(runs=table)
    first, *_ = (spec for spec in params.trials["runs"] if spec.place.row == "one step" and spec.place.seed == 0)
    assert first.run is first.base and first.run == params.runs["t4"]
    assert {spec.run.seed for spec in params.trials["runs"]} == {0, 1, 2}
    write_study("tables/runs.json", table, lambda row, column, seed: (20.0 if row == "one step" else 60.0) + seed)
    text = summary_text(params)
    assert all(len(line) <= 80 for line in text.splitlines())
    (line,) = [line for line in text.splitlines() if line.strip().startswith("t4 ")]
    assert line.split() == ["t4", "one", "step", "21.0", "±", "1.0", "90.0", "±", "0.0", "%"]


def test_the_summary_says_over_how_many_seeds_a_mean_is_where_others_have_no_value() -> None:
    table = declared(rows=("a plain GAN", "one step"), checks=())
    table["rows"]["settings"] = {"a plain GAN": {"run": "t4-no-transport"}, "one step": {"run": "t4"}}

    def distance(row: str, column: str, seed: int) -> float | None:
        return None if row == "a plain GAN" and seed == 1 else 20.0 + seed

    write_study("tables/runs.json", table, distance)
    text = summary_text(make_params(runs=table))
    assert "21.0 ± 1.4, 2 of 3" in text and "90.0 ± 0.0 %, 2 of 3" in text
    assert text.count("2 of 3") == 2
    assert text.endswith("\nN of 3: the other seeds have no value, as after a non-finite loss.")
    write_study("tables/runs.json", table, lambda *_: 20.0)
    assert " of 3" not in summary_text(make_params(runs=table))


def test_the_summary_names_the_runs_that_are_not_measured() -> None:
    params = make_params()
    write_inputs(params)
    assert "Not measured" not in summary_text(params)
    paths.metrics("t4-no-transport").unlink()
    text = summary_text(params)
    assert "8.12" in text
    assert text.endswith("\nNot measured: t4-no-transport; run `dvc repro`.")
    paths.metrics("t4").unlink()
    with pytest.raises(UserError, match="Found no results/metrics/t4.json"):
        summary_text(params)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"run": "t5"}, "run: expected one of t4, t4-no-transport, found 't5'"),
        ({"run": "t4", "lr": 0.1}, "expected no field beside `run` but `then`.*; found also lr"),
    ],
)
def test_a_row_that_is_a_run_names_one_and_changes_nothing(fields: dict[str, Any], words: str) -> None:
    table = declared(rows=("a",), checks=())
    table["rows"]["settings"] = {"a": fields}
    with pytest.raises(ValidationError, match=f"tables.runs: row a.*{words}"):
        make_params(runs=table)
