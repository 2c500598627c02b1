"""One table of several checkouts: merged, decided like any other, refused where samples were not measured alike."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.reporting.across import compare_tables
from afm_pipe.runtime.errors import UserError
from tests.conftest import ROOT

Change = Callable[[dict[str, Any]], None]


def committed() -> dict[str, Any]:
    """The committed table of runs."""
    table: dict[str, Any] = json.loads((ROOT / "results" / "tables" / "runs.json").read_text())
    return table


def checkout(folder: Path, change: Change = lambda table: None) -> Path:
    """A checkout with the committed table of runs, changed."""
    table = committed()
    change(table)
    path = folder / "results" / "tables" / "runs.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(table))
    return folder


def scale(factor: float) -> Change:
    def change(table: dict[str, Any]) -> None:
        for trial in table["trials"]:
            trial["metrics"]["fd_classifier_1k"] *= factor

    return change


def test_a_checkout_whose_distances_are_all_half_as_large_is_better(tmp_path: Path) -> None:
    half = checkout(tmp_path / "half", scale(0.5))
    out = tmp_path / "merged.json"
    text = compare_tables({"half": half, "whole": checkout(tmp_path / "whole")}, "runs", out)
    assert "Supported: half is better than whole, one step: distance 2.00 times lower" in text
    merged = json.loads(out.read_text())
    rows = {(trial["row"], trial["column"]) for trial in merged["trials"]}
    assert ("half", "one step, guided") in rows and len(merged["trials"]) == 2 * len(committed()["trials"])
    trials = {(trial["row"], trial["column"], trial["seed"]): trial["metrics"] for trial in merged["trials"]}
    for (row, column, seed), metrics in trials.items():
        other = trials["whole", column, seed]["fd_classifier_1k"]
        assert math.isclose(metrics["fd_classifier_1k"], other * (0.5 if row == "half" else 1))


def test_one_common_seed_leaves_claims_undecided(tmp_path: Path) -> None:
    def alone(table: dict[str, Any]) -> None:
        table["table"]["seeds"] = [1]
        table["trials"] = [trial for trial in table["trials"] if trial["seed"] == 1]

    text = compare_tables({"a": checkout(tmp_path / "a", alone), "b": checkout(tmp_path / "b", scale(0.1))}, "runs")
    assert "Undecided: a is better than b, one step" in text
    assert "Supported" not in text


def measured_in(features: dict[str, str], **distances: float) -> Change:
    """Return a change of the networks of a table, with further distances of its trials and of their probes."""

    def change(table: dict[str, Any]) -> None:
        table["protocol"]["features"] = features
        for trial in table["trials"]:
            for measured in (trial, *trial["probes"]):
                measured["metrics"] |= distances
                measured["intervals"] |= {key: [0.9 * value, 1.1 * value] for key, value in distances.items()}

    return change


def test_a_judge_that_differs_is_left_out_and_claims_are_decided_on_a_common_distance(tmp_path: Path) -> None:
    a = measured_in({"classifier": "1" * 64, "dinov2": "2" * 64}, fd_dinov2_1k=5.0)
    b = measured_in({"classifier": "0" * 64, "dinov2": "2" * 64}, fd_dinov2_1k=10.0)
    out = tmp_path / "merged.json"
    text = compare_tables({"a": checkout(tmp_path / "a", a), "b": checkout(tmp_path / "b", b)}, "runs", out)
    assert "(classifier)" not in text and "Class accuracy" not in text
    assert "Copies" in text
    assert "Supported: a is better than b, one step: distance 2.00 times lower" in text
    assert "classifier_" not in json.dumps(json.loads(out.read_text())["trials"])


def test_without_a_common_distance_no_claim_is_decided(tmp_path: Path) -> None:
    a = measured_in({"classifier": "1" * 64})
    b = measured_in({"classifier": "0" * 64, "inception_legacy_tensorflow": "3" * 64}, fid_1k=7.0)
    out = tmp_path / "merged.json"
    text = compare_tables({"a": checkout(tmp_path / "a", a), "b": checkout(tmp_path / "b", b)}, "runs", out)
    assert "No claim is decided. Found no distance that all checkouts share" in text
    assert "a is better than b" not in text and "FID" not in text
    assert "Copies" in text
    assert json.loads(out.read_text())["table"]["checks"] == []


def test_samples_that_were_not_measured_alike_are_refused(tmp_path: Path) -> None:
    def other_data(table: dict[str, Any]) -> None:
        table["protocol"]["reference_manifest"] = "another"

    with pytest.raises(UserError, match="Found reference_manifest .* in a and another in b"):
        compare_tables({"a": checkout(tmp_path / "a"), "b": checkout(tmp_path / "b", other_data)}, "runs")


def test_tables_without_a_common_seed_are_refused(tmp_path: Path) -> None:
    def other_seeds(table: dict[str, Any]) -> None:
        table["table"]["seeds"] = [7]
        table["trials"] = [trial | {"seed": 7} for trial in table["trials"] if trial["seed"] == 0]

    with pytest.raises(UserError, match="Found no seed that all tables runs share"):
        compare_tables({"a": checkout(tmp_path / "a"), "b": checkout(tmp_path / "b", other_seeds)}, "runs")


def test_the_command_names_what_is_missing(tmp_path: Path) -> None:
    runner, one = CliRunner(), checkout(tmp_path / "one")
    for words, said in (
        ([str(one)], "expected LABEL=FOLDER"),
        ([f"a={one}"], "expected two or more"),
        ([f"a={one}", f"b={tmp_path}"], "expected the table runs"),
    ):
        result = runner.invoke(app, ["compare", *words])
        assert result.exit_code == 1 and said in result.output, result.output
    result = runner.invoke(app, ["compare", f"a={one}", f"b={checkout(tmp_path / 'two')}"])
    assert result.exit_code == 0 and "a, one step" in result.output
