"""One training on 1, 2 and 3 ranks, whole and in parts: the same numbers, one writer, and an end for all."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.rank_worker import BATCH, UPDATES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """What each rank of each group found: by (group, rank), of groups of 1, 2, 3 and again 1 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, "-m", "tests.rank_worker", str(folder)], check=True, cwd=ROOT, timeout=300)
    files = {(g, r): folder / f"group{g}-rank{r}.json" for g, size in enumerate((1, 2, 3, 1)) for r in range(size)}
    return {key: json.loads(file.read_text()) for key, file in files.items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two curves, relative where figures are above 1."""
    assert [row["update"] for row in one["rows"]] == [row["update"] for row in other["rows"]]
    pairs = [(a[name], b[name]) for a, b in zip(one["rows"], other["rows"], strict=True) for name in a]
    return max(abs(a - b) / max(abs(a), 1) for a, b in pairs)


@pytest.mark.parametrize("case", ["guided", "steps", "parts"])
@pytest.mark.parametrize("group", [0, 1, 2], ids=["1 rank", "2 ranks", "3 ranks"])
def test_losses_do_not_depend_on_ranks_nor_parts(
    outcomes: dict[tuple[int, int], dict[str, Any]], group: int, case: str
) -> None:
    alone = outcomes[0, 0]["guided" if case == "parts" else case]
    assert len(alone["rows"]) == UPDATES // 10
    found = outcomes[group, 0][case]
    assert difference(alone, found) < 1e-8
    assert alone["mean_square"] == pytest.approx(found["mean_square"], rel=1e-8)


@pytest.mark.parametrize("group", [1, 2], ids=["2 ranks", "3 ranks"])
def test_losses_in_float32_are_near(outcomes: dict[tuple[int, int], dict[str, Any]], group: int) -> None:
    assert difference(outcomes[0, 0]["float32"], outcomes[group, 0]["float32"]) < 1e-3


def test_all_ranks_end_with_the_same_bits(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    for (group, _), found in outcomes.items():
        assert {**found, "read": 0} == {**outcomes[group, 0], "read": 0}


def test_a_rank_reads_its_own_latents_alone(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    for group, size in ((0, 1), (1, 2), (2, 3)):
        assert [outcomes[group, rank]["read"] for rank in range(size)] == [2 * UPDATES * BATCH // size] * size


def test_a_training_goes_on_with_other_ranks_and_back(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    never, passed_on = outcomes[0, 0]["never passed on"], outcomes[2, 0]["passed on"]
    assert difference(never, passed_on) < 1e-8
    assert outcomes[3, 0]["passed on"]["rows"][:3] == passed_on["rows"]  # what the last rank, alone again, took up
