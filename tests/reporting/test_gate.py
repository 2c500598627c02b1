"""The gate: what is worse than measurement and seeds explain does not pass."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from afm_pipe.reporting.gate import NOT_COMPARED, WORSE, gate, read_measurements
from afm_pipe.runtime.errors import UserError
from tests.conftest import ROOT

SEEDS = {"t4": 10.0, "t4-s1": 11.0, "t4-s2": 12.0}


def write(folder: Path, runs: dict[str, float], half: float = 0.5, **protocol: Any) -> Path:
    for name, distance in runs.items():
        path = folder / "metrics" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        intervals = {"fd_classifier_5k": [distance - half, distance + half]}
        content = {"fd_classifier_5k": distance, "kid_classifier_5k": 1.0, "intervals": intervals}
        path.write_text(json.dumps(content | {"protocol": {"samples": 5000} | protocol}))
    return folder


def verdicts(text: str) -> list[str]:
    return [line.split("  ")[-1].strip() for line in text.splitlines() if "FD-" in line]


@pytest.mark.parametrize(
    ("now", "verdict", "code"),
    [
        ({"t4": 12.0, "t4-s1": 13.0, "t4-s2": 11.5}, "within", 0),  # 1.17 more; seeds explain 2.1
        ({"t4": 14.0, "t4-s1": 15.0, "t4-s2": 13.5}, "worse", WORSE),
        ({"t4": 7.0, "t4-s1": 7.5, "t4-s2": 8.0}, "better", 0),
        ({"t4": 16.0}, "worse", WORSE),
        ({"other": 11.0}, "missing: measure it, or remove it from the baseline", NOT_COMPARED),
    ],
)
def test_a_mean_is_worse_if_neither_seeds_nor_measuring_explain_it(
    tmp_path: Path, now: dict[str, float], verdict: str, code: int
) -> None:
    old = write(tmp_path / "old", SEEDS)
    text, found = gate(str(old), write(tmp_path / "now", now))
    assert (verdicts(text)[0], found) == (verdict, code)
    assert "KID" not in text


def test_a_difference_within_the_measuring_interval_passes(tmp_path: Path) -> None:
    old, worse = write(tmp_path / "old", SEEDS, half=9.0), {"t4": 14.0, "t4-s1": 15.0, "t4-s2": 13.5}
    text, code = gate(str(old), write(tmp_path / "now", worse, half=9.0))
    assert (verdicts(text), code) == (["within"], 0)


def test_one_seed_borrows_the_spread_of_other_rows_or_stays_undecided(tmp_path: Path) -> None:
    old, now = write(tmp_path / "old", {"a": 10.0}), write(tmp_path / "now", {"a": 13.0})
    text, code = gate(str(old), now)
    assert (verdicts(text), code) == (["undecided: one seed"], 0)
    write(old, {"b": 10.0, "b-s1": 10.1})
    write(now, {"b": 10.0, "b-s1": 10.1})
    text, code = gate(str(old), now)
    assert (verdicts(text), code) == (["worse", "same"], WORSE)


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ({"samples": 1000}, "other samples (5000 before, 1000 now)"),
        ({"code": {"evaluation": "v2 abc"}}, "other version of evaluation (v1 before, v2 now)"),
        ({"code": {"evaluation": "v1 def"}}, None),
        ({"generator_sha256": "other"}, None),
    ],
)
def test_another_protocol_or_version_is_not_compared(
    tmp_path: Path, protocol: dict[str, Any], said: str | None
) -> None:
    old = write(tmp_path / "old", SEEDS, code={"evaluation": "v1 abc"}, generator_sha256="one")
    text, code = gate(str(old), write(tmp_path / "now", SEEDS, **protocol))
    assert (f"not comparable: {said}" in text, code) == (said is not None, NOT_COMPARED if said else 0)


def test_tables_are_compared_by_row_and_column_and_a_diverged_seed_is_worse(tmp_path: Path) -> None:
    for name in ("old", "now"):
        (tmp_path / name / "tables").mkdir(parents=True)
        shutil.copy(ROOT / "results" / "tables" / "transport_sweep.json", tmp_path / name / "tables")
    assert gate(str(tmp_path / "old"), tmp_path / "now")[1] == 0
    path = tmp_path / "now" / "tables" / "transport_sweep.json"
    table = json.loads(path.read_text())
    table["trials"][0] |= {"metrics": {}, "intervals": {}, "diverged": "non-finite loss at update 7"}
    path.write_text(json.dumps(table))
    text, code = gate(str(tmp_path / "old"), tmp_path / "now")
    assert code == WORSE and "worse: 1 of 1 seeds diverged" in text
    assert any(subject.startswith("transport_sweep: ") for subject, _ in read_measurements(tmp_path / "now"))


def test_the_baseline_may_be_a_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("results"), SEEDS)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], check=True)
    assert gate("HEAD")[1] == 0
    write(Path("results"), {"t4": 99.0})
    write(Path("results"), {"t4-s1": 98.0})
    write(Path("results"), {"t4-s2": 97.0})
    assert gate("HEAD")[1] == WORSE
    with pytest.raises(UserError, match="a git revision such as HEAD: fatal: Not a valid object name nope"):
        gate("nope")
    with pytest.raises(UserError, match="no metrics in the baseline"):
        gate(str(tmp_path))
