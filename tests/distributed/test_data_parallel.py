"""One run on 1, 2 and 3 processes, whole and in micro-batches: the same numbers, and all end with the same bits."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.distributed.worker import BATCH, GROUPS, UPDATES

Outcomes = dict[tuple[int, int], dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What each process of each group found, by (group, rank)."""
    folder = tmp_path_factory.mktemp("processes")
    worker = [sys.executable, "-m", "tests.distributed.worker", str(folder)]
    done = subprocess.run(worker, check=False, cwd=ROOT, timeout=900, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    files = {(g, r): folder / f"group{g}-rank{r}.json" for g, size in enumerate(GROUPS) for r in range(size)}
    return {key: json.loads(file.read_text()) for key, file in files.items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two curves, relative where figures are above 1."""
    assert [row["update"] for row in one["rows"]] == [row["update"] for row in other["rows"]]
    pairs = [(a[name], b[name]) for a, b in zip(one["rows"], other["rows"], strict=True) for name in a]
    return max(abs(a - b) / max(abs(a), 1) for a, b in pairs)


@pytest.mark.parametrize(
    ("group", "case"),
    [
        (0, "parts"),
        (1, "guided"),
        (1, "flow"),
        (1, "adversary"),
        (1, "steps"),
        (1, "classifier"),
        (1, "parts"),
        (2, "guided"),
        (2, "flow"),
        (2, "adversary"),
        (2, "parts"),
    ],
)
def test_numbers_do_not_depend_on_processes_and_micro_batches(outcomes: Outcomes, group: int, case: str) -> None:
    alone, found = outcomes[0, 0]["guided" if case == "parts" else case], outcomes[group, 0][case]
    assert len(alone["rows"]) == UPDATES // 10
    assert difference(alone, found) < 1e-8
    for name, buffer in alone["buffers"].items():
        assert buffer == pytest.approx(found["buffers"][name], rel=1e-8)
    for part, weights in alone["weights"].items():
        assert weights == pytest.approx(found["weights"][part], abs=1e-8)


def test_losses_in_float32_are_near(outcomes: Outcomes) -> None:
    assert difference(outcomes[0, 0]["float32"], outcomes[1, 0]["float32"]) < 1e-3


def test_all_processes_end_with_the_same_bits(outcomes: Outcomes) -> None:
    for (group, _), found in outcomes.items():
        assert {**found, "read": 0} == {**outcomes[group, 0], "read": 0}
        assert len(found["handed on"]["monitor"]["probes"]) == group + 1


def test_a_process_reads_its_own_latents_alone(outcomes: Outcomes) -> None:
    for group, size in ((0, 1), (1, 2), (2, 3)):
        assert [outcomes[group, rank]["read"] for rank in range(size)] == [2 * UPDATES * BATCH // size] * size


def test_a_run_resumes_with_another_number_of_processes(outcomes: Outcomes) -> None:
    never, handed_on = outcomes[0, 0]["never handed on"], outcomes[2, 0]["handed on"]
    assert difference(never, handed_on) < 1e-8
    assert outcomes[3, 0]["handed on"]["rows"][:3] == handed_on["rows"], "the last group goes on from their checkpoint"
