"""The report's sections on the study, from files whose numbers are made up here to be clear, reversed or noisy."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from afm_pipe import paths
from afm_pipe.errors import UserError
from afm_pipe.params import Params
from afm_pipe.reporting import study_cells, study_checks
from afm_pipe.reporting.inputs import Inputs, Summary
from afm_pipe.reporting.page import write_report
from afm_pipe.reporting.printing import csv_text
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.study import study_sections
from afm_pipe.reporting.study_checks import Verdict
from afm_pipe.reporting.study_published import published_table
from afm_pipe.reporting.table import Table
from tests.test_reporting import COMMITTED, RUNS, Page, write_inputs

PUBLISHED = yaml.safe_load((Path(study_cells.__file__).parent / "published.yaml").read_text(encoding="utf-8"))
KEY = "fd_classifier_2k"
Number = Callable[[str, str, int], float | None]  # a cell's distance by row, column and seed; None: not finite


def check(measure: str, less: dict[str, Any], than: dict[str, Any], claim: str = "A is below B") -> dict[str, Any]:
    return {"claim": claim, "measure": measure, "less": less, "than": than}


def declared(
    rows: tuple[str, ...] = ("0", "0.2"),
    columns: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    checks: tuple[dict[str, Any], ...] = (check("distance", {"rows": ["0.2"]}, {"rows": ["0"]}),),
    paper: str | None = None,
) -> dict[str, Any]:
    across = {"title": "lambda_gp", "settings": {label: {"penalty": {"weight": 0.1}} for label in columns}}
    return {
        "title": "Transport weight",
        "question": "Does it matter?",
        "paper": paper,
        "base": {},
        "rows": {"title": "lambda_ot", "settings": {label: {"transport": 0.1} for label in rows}},
        "columns": across if columns else None,
        "seeds": list(seeds),
        "checks": list(checks),
    }


def make_params(**tables: dict[str, Any]) -> Params:
    own = {"runs": RUNS, "guided": {}, "imported": {}, "tables": tables}
    return Params.model_validate(COMMITTED | own)


def write_study(
    path: str,
    table: dict[str, Any],
    distance: Number,
    scale: str = "Made up.",
    diverged: Callable[[str, str, int], str | None] = lambda row, column, seed: None,
    accuracy: Callable[[str, str, int], float] = lambda row, column, seed: 0.9,
    units: Callable[[str, str, int], float] = lambda row, column, seed: 14.5,
) -> None:
    """Write a table's file with every cell it declares, its numbers made up."""
    cells = []
    for seed in table["seeds"]:
        for row in table["rows"]["settings"]:
            for column in (table["columns"] or {"settings": [""]})["settings"]:
                place = (row, column, seed)
                cells.append(cell(place, distance(*place), diverged(*place), accuracy(*place), units(*place)))
    write(path, {"table": table, "scale": scale, "machine": "no machine", "protocol": {}, "cells": cells})


def cell(
    place: tuple[str, str, int], distance: float | None, diverged: str | None, accuracy: float, units: float
) -> dict[str, Any]:
    metrics, intervals = {}, {}
    if distance is not None:
        metrics = {"class_accuracy": accuracy, KEY: distance}
        intervals = {KEY: [0.9 * distance, 1.1 * distance]}
    else:
        diverged = "a loss that is not finite at update 340"
    end = {"update": 1200, "epoch": 8.0, "phase": 2, "metrics": metrics, "intervals": intervals}
    first = {"update": 900, "epoch": 6.0, "phase": 1, "metrics": {KEY: 2 * (distance or 1.0)}, "intervals": {}}
    third = {"update": 400, "epoch": 2.7, "phase": None, "metrics": {KEY: 999.0}, "intervals": {}}
    return {
        "row": place[0],
        "column": place[1],
        "seed": place[2],
        "fingerprint": "ab",
        "settings": {},
        "diverged": diverged,
        "probes": [third, first, end] if distance is not None else [third],
        "metrics": metrics,
        "intervals": intervals,
        "cost": {"seconds": 60.0 if distance is not None else None, "updates": 1200, "images": 38400, "units": units}
        | {"machine": "no machine", "threads": 1},
    }


def write(path: str, value: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value))


def sections_of(params: Params) -> dict[str, Section]:
    summary = Summary(images=5000, classes=["0"])
    inputs = Inputs(params, (), summary, None, PUBLISHED)
    return {section.anchor: section for section in study_sections(inputs)}


def verdict_of(table: dict[str, Any]) -> Verdict:
    (pair,) = study_cells.read_pairs(make_params(sweep=table))
    (verdict,) = study_checks.decide(pair, 0.7)
    return verdict


def texts(table: Table) -> list[list[str]]:
    return [[each.text for each in row] for row in table.rows]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def clear(row: str, column: str, seed: int) -> float:
    return {"0": 300.0, "0.2": 60.0}[row] * (1 + 0.05 * seed * (row == "0"))


def test_seeds_that_agree_support_a_claim_with_its_factor_interval_seeds_and_scale() -> None:
    write_study("tables/sweep.json", declared(), clear)
    verdict = verdict_of(declared())
    assert verdict.outcome == "supported"
    assert verdict.interval is not None
    assert verdict.interval[1] < 0
    assert verdict.sentence == (
        "Supported at this scale: 'A is below B': distance 5.25 times lower [4.66, 5.91] for lambda_ot = 0.2 than for "
        "0, over 3 seeds of this profile."
    )


def test_a_paired_t_interval_is_the_textbooks() -> None:
    low, high = study_checks.t_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert study_checks.t_interval([1.0]) is None
    assert study_checks.t_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)


def test_seeds_are_paired() -> None:
    """What differs from seed to seed far more than between groups decides nothing unless seed is held to seed."""
    write_study("tables/sweep.json", declared(), lambda row, _, seed: 10.0 ** (seed + 1) * (1.1 if row == "0" else 1))
    verdict = verdict_of(declared())
    assert verdict.outcome == "supported"
    assert "1.10 times lower [1.10, 1.10]" in verdict.effect


def test_seeds_that_agree_on_the_reverse_do_not_support_a_claim() -> None:
    write_study("tables/sweep.json", declared(), lambda row, _, seed: 360_000 / clear(row, "", seed))
    verdict = verdict_of(declared())
    assert verdict.outcome == "not supported"
    assert verdict.sentence.startswith("Not supported at this scale: 'A is below B': distance 5.25 times higher [4.66")


def test_seeds_that_disagree_leave_a_claim_undecided() -> None:
    noisy = {("0", 0): 50.0, ("0", 1): 70.0, ("0", 2): 55.0, ("0.2", 0): 60.0, ("0.2", 1): 48.0, ("0.2", 2): 58.0}
    write_study("tables/sweep.json", declared(), lambda row, _, seed: noisy[row, seed])
    verdict = verdict_of(declared())
    assert verdict.outcome == "undecided"
    assert "times lower [0." in verdict.sentence
    assert verdict.sentence.endswith("over 3 seeds of this profile.")


@pytest.mark.parametrize(("factor", "words"), [(1, "5.00 times lower"), (-1, "5.00 times higher")])
def test_one_seed_decides_nothing_and_says_what_it_saw(factor: int, words: str) -> None:
    table = declared(seeds=(0,))
    write_study("tables/sweep.json", table, lambda row, _, seed: clear(row, "", 0) ** factor)
    verdict = verdict_of(table)
    assert verdict.outcome == "undecided"
    assert verdict.sentence == (
        f"Undecided at this scale (one seed): 'A is below B': distance {words} for lambda_ot = 0.2 than for "
        f"0, {'as claimed' if factor > 0 else 'against the claim'}, over one seed of this profile."
    )


def test_a_cell_without_a_number_is_worse_than_all_that_have_one() -> None:
    write_study("tables/sweep.json", declared(), lambda *at: None if at[0] == "0" and at[2] else clear(*at))
    verdict = verdict_of(declared())
    assert verdict.outcome == "supported"
    assert "at least 7.94 times lower" in verdict.effect  # of 300 / 60 and twice 600 / 60, the geometric mean
    assert "(2 cells without a number taken as twice the worst of the table)" in verdict.effect
    write_study("tables/sweep.json", declared(), lambda *at: None if at[0] == "0" else 60.0 + at[2])
    assert verdict_of(declared()).outcome == "supported"  # though its own are the worst that have a number
    write_study("tables/sweep.json", declared(), lambda *at: None if at[0] == "0.2" else 60.0 + at[2])
    assert verdict_of(declared()).outcome == "not supported"
    write_study("tables/sweep.json", declared(), lambda *at: None)
    verdict = verdict_of(declared())
    assert verdict.outcome == "undecided"
    assert verdict.effect.startswith("distance equal")


@pytest.mark.parametrize("flattered", ["less", "than"])
def test_a_verdict_is_not_given_to_a_group_that_a_missing_number_flatters(flattered: str) -> None:
    """One of its cells lost its number; by the one that stands in for it, the group would still be the lower."""
    groups = {"less": {"rows": ["0"]}, "than": {"rows": ["0"]}, flattered: {"rows": ["0.2", "9"]}}
    table = declared(rows=("0", "0.2", "9"), checks=(check("distance", groups["less"], groups["than"]),))
    numbers = {"0": 300.0, "9": 20.0}
    write_study("tables/sweep.json", table, lambda row, _, seed: None if row == "0.2" else numbers[row] + seed)
    verdict = verdict_of(table)
    assert verdict.interval is not None
    assert verdict.interval[0] * verdict.interval[1] > 0
    assert (verdict.difference or 0) < 0 if flattered == "less" else (verdict.difference or 0) > 0
    assert verdict.outcome == "undecided"
    assert "at most" in verdict.effect


def test_shares_are_compared_in_points_and_by_count() -> None:
    rows, columns = ("off", "on"), ("1e-4", "1e-3", "1e-2", "1e-1")
    claims = (
        check("trained", {"rows": ["off"]}, {"rows": ["on"]}, "on trains more"),
        check("diverged", {"rows": ["on"]}, {"rows": ["off"]}, "on diverges less"),
        check("accuracy", {"rows": ["off"]}, {"rows": ["on"]}, "on is righter"),
    )
    table = declared(rows, columns, checks=claims)

    def accuracy(row: str, column: str, seed: int) -> float:
        return 0.95 - 0.01 * seed * (row == "on") if row == "on" or column == "1e-3" else 0.3

    write_study(
        "tables/sweep.json",
        table,
        lambda *at: 10.0,
        accuracy=accuracy,
        diverged=lambda row, column, seed: "worse" if row == "off" and column == "1e-4" and seed < 2 else None,
    )
    (pair,) = study_cells.read_pairs(make_params(sweep=table))
    trained, diverged, accurate = study_checks.decide(pair, 0.7)
    assert trained.outcome == "supported"
    assert "share of cells that train 75.0 points lower" in trained.effect
    assert "(3 of 12 cells against 12 of 12 cells)" in trained.effect
    assert trained.interval is not None
    assert trained.interval[1] > -0.75 > trained.interval[0]  # seeds agree, but in steps of a quarter
    assert diverged.outcome == "undecided"
    assert "(0 of 12 cells against 2 of 12 cells)" in diverged.effect
    assert accurate.outcome == "supported"
    assert "right class 47.8 points lower" in accurate.effect
    (pair,) = study_cells.read_pairs(make_params(sweep=table))
    assert study_checks.decide(pair, 0.2)[0].effect.startswith("share of cells that train equal")


def test_a_cell_without_a_number_is_right_in_nothing_and_did_not_train() -> None:
    less, than = {"rows": ["0"]}, {"rows": ["0.2"]}
    checks = (check("accuracy", less, than, "right"), check("trained", less, than, "trains"))
    table = declared(checks=checks)
    write_study("tables/sweep.json", table, lambda row, *_: None if row == "0" else 50.0)
    (pair,) = study_cells.read_pairs(make_params(sweep=table))
    right, trains = study_checks.decide(pair, 0.7)
    assert right.effect.startswith("right class 90.0 points lower")
    assert trains.effect.startswith("share of cells that train 100 points lower")
    assert trains.interval is not None
    assert trains.interval[0] == -1  # no share differs by more


def test_shares_that_are_equal_over_seeds_are_called_equal() -> None:
    table = declared(columns=("a", "b", "c"), checks=(check("trained", {"rows": ["0.2"]}, {"rows": ["0"]}),))

    def accuracy(row: str, column: str, seed: int) -> float:
        return 0.9 if (column == "a" if row == "0.2" else seed == 2) else 0.1

    write_study("tables/sweep.json", table, lambda *at: 10.0, accuracy=accuracy)
    verdict = verdict_of(table)
    assert (verdict.difference, verdict.outcome) == (0, "undecided")
    assert "train equal [" in verdict.effect


@pytest.mark.parametrize(("cheap", "outcome"), [(10.3, "supported"), (14.5, "not supported"), (15.0, "not supported")])
def test_units_are_compared_exactly_with_one_seed_too(cheap: float, outcome: str) -> None:
    table = declared(seeds=(0,), checks=(check("units", {"rows": ["0.2"]}, {"rows": ["0"]}),))
    write_study("tables/sweep.json", table, lambda *at: 10.0, units=lambda row, *_: cheap if row == "0.2" else 14.5)
    verdict = verdict_of(table)
    assert verdict.outcome == outcome
    assert ("1.41 times fewer, counted" in verdict.sentence) == (cheap < 14)


def test_seeds_with_missing_cells_take_no_part() -> None:
    write_study("tables/sweep.json", declared(), clear)
    stored = json.loads(Path("tables/sweep.json").read_text())
    kept = [each for each in stored["cells"] if each["seed"] != 1 or each["row"] != "0"]
    write("tables/sweep.json", stored | {"cells": kept})
    assert verdict_of(declared()).seeds == 2
    section = sections_of(make_params(sweep=declared()))["study-sweep"]
    assert "1 of 6 cells have not been run" in section.tables[0].caption
    both = declared(checks=(check("distance", {"rows": ["0.2", "0"]}, {"rows": ["0"]}),))
    kept = [each for each in stored["cells"] if each["seed"] != 1 or each["row"] != "0.2"]
    write("tables/sweep.json", stored | {"cells": kept, "table": both})
    assert verdict_of(both).seeds == 2
    write("tables/sweep.json", stored | {"cells": [each for each in kept if each["row"] != "0"]})
    verdict = verdict_of(declared())
    assert verdict.outcome == "not run"
    assert verdict.sentence == "Not run: 'A is below B'."


def test_a_sweep_shows_spread_divergence_and_cost() -> None:
    def distance(row: str, column: str, seed: int) -> float | None:
        return {"0": None if seed else 300.0, "0.2": 50.0 + seed}[row]

    write_study("tables/sweep.json", declared(), distance, diverged=lambda row, *_: "worse" if row == "0" else None)
    section = sections_of(make_params(sweep=declared()))["study-sweep"]
    (table,) = section.tables
    assert [column.key for column in table.columns] == [
        "row",
        KEY,
        "class_accuracy",
        "diverged",
        "units",
        "seconds",
        "seeds",
    ]
    assert texts(table) == [
        ["0", "300 [270, 330]", "90.0 %", "3 of 3", "14.5", "60.0 s", "3"],
        ["0.2", "51.0 ± 1.0", "90.0 ± 0.0 %", "0 of 3", "14.5", "60.0 s", "3"],
    ]
    assert "a loss was not finite" in table.note
    assert "Made up" in table.caption
    rows = list(csv.DictReader(csv_text(table).splitlines()))
    assert [(row["row"], row[KEY], row[f"{KEY}_low"], row[f"{KEY}_high"]) for row in rows] == [
        ("0", "300.0", "270.0", "330.0"),
        ("0.2", "51.0", "50.0", "52.0"),
    ]
    (figure,) = section.figures
    assert "0.2: 51.0 [50.0, 52.0]" in figure.svg
    assert "from the lowest seed to the highest" in figure.caption
    assert figure.source == "tables/sweep.json"


def fired(kinds: dict[str, tuple[str, ...]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that gives a cell the events of its row, an action among them."""

    def with_events(cell: dict[str, Any]) -> dict[str, Any]:
        events = [{"update": 9, "kind": kind, "text": "found", "action": None} for kind in kinds[cell["row"]]]
        return cell | {"events": [*events, {"update": 9, "kind": "phase", "text": "begins", "action": "done"}]}

    return with_events


def test_alarms_of_the_watch_are_shown_and_compared() -> None:
    table = declared(checks=(check("alarms", {"rows": ["0.2"]}, {"rows": ["0"]}),))
    write_study("tables/sweep.json", table, clear)
    written = json.loads(Path("tables/sweep.json").read_text())
    give = fired({"0": ("identity", "identity", "stagnation"), "0.2": ()})
    write("tables/sweep.json", written | {"cells": [give(each) for each in written["cells"]]})
    (shown,) = sections_of(make_params(sweep=table))["study-sweep"].tables
    column = [each.key for each in shown.columns].index("alarms")
    assert [row[column] for row in texts(shown)] == ["identity 3 of 3, stagnation 3 of 3", "none of 3"]
    assert [row[column].value for row in shown.rows] == [3, 0]
    verdict = verdict_of(table)
    assert verdict.outcome == "supported"
    assert "kinds of alarms a cell 2.0" in verdict.effect
    assert verdict.difference == -2.0


def test_a_grid_shows_means_over_seeds_and_marks_divergence() -> None:
    table = declared(("0.1", "0.5"), ("0", "0.2"), checks=())

    def distance(row: str, column: str, seed: int) -> float | None:
        if (row, column) == ("0.1", "0"):
            return None
        return 100.0 + seed if column == "0" else 20.0 + seed

    write_study(
        "tables/grid.json",
        table,
        distance,
        diverged=lambda row, column, seed: "worse" if column == "0" and seed else None,
    )
    section = sections_of(make_params(grid=table))["study-grid"]
    distances, accuracies = section.tables
    assert [column.title for column in distances.columns] == ["lambda_ot", "lambda_gp 0", "lambda_gp 0.2"]
    assert texts(distances) == [
        ["0.1", "3 of 3 diverged", "21.0 ± 1.0"],
        ["0.5", "101 ± 1.0 (2 of 3 diverged)", "21.0 ± 1.0"],
    ]
    assert texts(accuracies)[0] == ["0.1", "–", "90.0 ± 0.0 %"]
    (figure,) = section.figures
    assert figure.svg.count('class="cell none"') == 1
    assert "† 3/3 at 0" in figure.svg
    assert "one of two seeds diverged" in figure.caption
    assert section.verdict is None


def test_one_seed_has_the_interval_of_its_measurement() -> None:
    table = declared(seeds=(7,))
    write_study("tables/sweep.json", table, lambda row, *_: 300.0 if row == "0" else 60.0)
    section = sections_of(make_params(sweep=table))["study-sweep"]
    assert texts(section.tables[0])[1][1] == "60.0 [54.0, 66.0]"
    assert "another seed may lie outside" in section.tables[0].note
    assert "One seed" not in section.figures[0].caption
    assert "the 95 % interval of its measurement" in section.figures[0].caption


def test_study_and_own_run_stand_side_by_side_and_what_only_the_study_has_is_marked() -> None:
    small, large = declared(seeds=(0,)), declared(rows=("0", "0.2", "1"))
    write_study("tables/sweep.json", small, lambda row, *_: 300.0 if row == "0" else 60.0, "Small scale.")
    write_study("study/sweep.json", large, lambda row, _, seed: clear("0.2" if row == "1" else row, "", seed), "Large.")
    found = sections_of(make_params(sweep=small))
    section = found["study-sweep"]
    assert [table.name for table in section.tables] == ["table_sweep", "study_sweep"]
    assert section.warning == "This profile: Small scale. The study: Large."
    assert "Small scale" in section.tables[0].caption
    assert "Large" in section.tables[1].caption
    assert [row[0] for row in texts(section.tables[1])] == ["0", "0.2", "1 °"]
    assert section.tables[1].rows[2][0].value == "1"
    assert "only in the study" in section.tables[1].note
    assert "°" not in str(texts(section.tables[0])) + section.tables[0].note
    assert len(section.figures) == 2
    assert section.verdict is not None
    assert section.verdict.endswith("over 3 seeds of the study.")  # not this profile's one seed
    (checks,) = found["checks"].tables
    assert [row[:3] for row in texts(checks)] == [["A is below B", "sweep", "supported"]]
    line = next(csv.DictReader(csv_text(checks).splitlines()))
    assert (line["verdict"], line["seeds"], line["scale"]) == ("supported", "3", "Large.")
    assert float(line["difference_low"]) < float(line["difference"]) < float(line["difference_high"]) < 0
    assert {cell.source for cell in checks.rows[0]} == {"", "study/sweep.json"}


def test_a_claim_the_study_cannot_decide_is_taken_from_the_own_run() -> None:
    new = check("distance", {"rows": ["0"]}, {"rows": ["0.2"]}, "B is below A")
    own = declared(checks=(*declared()["checks"], new))
    write_study("tables/sweep.json", own, clear)
    write_study("study/sweep.json", declared(), clear)
    (pair,) = study_cells.read_pairs(make_params(sweep=own))
    found = study_checks.decide(pair, 0.7)
    assert [(each.claim, each.outcome, each.studied and each.studied.scope) for each in found] == [
        ("A is below B", "supported", "study"),
        ("B is below A", "not supported", "table"),
    ]


def test_a_table_that_was_not_run_says_how_to_run_it() -> None:
    found = sections_of(make_params(sweep=declared(paper="ot_decay")))
    assert "Found no tables/sweep.json" in found["study-sweep"].warning
    assert "dvc repro table@sweep" in found["study-sweep"].warning
    assert found["study-sweep"].tables == ()
    assert [table.name for table in found["study-sweep"].published] == ["paper_table_sweep"]
    assert found["checks"].verdict == "Of 1 claim: 1 not run."
    write_study("study/sweep.json", declared(), clear)
    section = sections_of(make_params(sweep=declared()))["study-sweep"]
    assert [table.name for table in section.tables] == ["study_sweep"]
    assert "Found no tables/sweep.json" in section.warning
    assert sections_of(make_params()) == {}


def test_a_file_of_another_declaration_than_params_is_told() -> None:
    write_study("tables/sweep.json", declared(), clear)
    assert "otherwise" not in sections_of(make_params(sweep=declared()))["study-sweep"].warning
    changed = declared() | {"base": {"lr": 0.5}}
    assert (
        "otherwise by now: run `dvc repro table@sweep`"
        in sections_of(make_params(sweep=changed))["study-sweep"].warning
    )


def test_phases_of_a_schedule_have_the_distance_at_their_ends() -> None:
    table = declared(rows=("one step",), seeds=(0, 1), checks=(), paper="schedule")
    write_study("tables/phases.json", table, lambda row, _, seed: 10.0 + 2 * seed)
    section = sections_of(make_params(phases=table))["study-phases"]
    assert [each.name for each in section.tables] == ["table_phases", "phases_table_phases"]
    assert texts(section.tables[1]) == [["one step", "22.0 ± 2.8, epoch 6", "11.0 ± 1.4, epoch 8"]]
    (published,) = section.published
    assert texts(published)[0][:4] == ["B/2", "1", "12", "7.30, epoch 150"]


def test_the_papers_numbers_stand_as_grid_or_rows() -> None:
    grid = published_table("x", "ot_gp_grid", PUBLISHED)
    assert [column.title for column in grid.columns] == ["λ_gp", "λ_ot 0", "λ_ot 0.1", "λ_ot 0.2", "λ_ot 0.5"]
    assert texts(grid)[1] == ["0.25", "174.93 ± 2", "54.92 ± 2", "53.90 ± 1", "157.06 ± 62"]
    guided = published_table("x", "guidance_grid", PUBLISHED)
    assert texts(guided)[1] == ["U(0, 0.1)", "2.47", "2.36", "2.49"]
    assert [column.title for column in guided.columns] == ["t'", "λ_cg 0.002", "λ_cg 0.003", "λ_cg 0.005"]
    assert texts(published_table("x", "ot_decay", PUBLISHED))[1] == ["cosine 0.2 → 0.01", "8.51"]
    depth = published_table("x", "depth_vs_steps", PUBLISHED)
    assert texts(depth)[3] == ["112", "1", "120", "1.94", "2.92"]
    assert {each.origin for each in (grid, guided, depth)} == {"paper"}
    with pytest.raises(UserError, match=r"tables\.x\.paper: tabel, expected null or a key of published\.yaml: afm"):
        published_table("x", "tabel", PUBLISHED)


@pytest.mark.parametrize("scope", ["tables", "study"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: "[", "not JSON"),
        (lambda file: "[]", "wrong content"),
        (lambda file: json.dumps(file | {"scale": None}), "wrong scale"),
        (lambda file: json.dumps(file | {"cells": file["cells"][:1] * 2}), "cell 0, seed 0 stands there twice"),
        (lambda file: json.dumps(file | {"cells": [file["cells"][0] | {"row": "7"}]}), "declares no cell 7, seed 0"),
        (
            lambda file: json.dumps(file | {"cells": [file["cells"][0] | {"metrics": {KEY: float("nan")}}]}),
            "not JSON",
        ),
    ],
)
def test_a_damaged_file_is_a_clear_error(scope: str, damage: Callable[[Any], str], words: str) -> None:
    path = Path(scope, "sweep.json")
    write_study(str(path), declared(), clear)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(UserError, match=words) as found:
        sections_of(make_params(sweep=declared()))
    assert str(path) in str(found.value)
    if words != "not JSON":
        remedy = "dvc repro --force table@sweep" if scope == "tables" else "git checkout study/sweep.json"
        assert remedy in str(found.value)


def test_the_page_and_its_files_hold_the_study() -> None:
    grid = declared(("0.1", "0.5"), ("0", "0.2"), checks=(), paper="ot_gp_grid")
    params = make_params(sweep=declared(paper="ot_decay"), accuracy=grid, table_sweep=declared())
    write_inputs(params)
    write_study("tables/sweep.json", declared(paper="ot_decay"), clear)
    write_study("study/sweep.json", declared(paper="ot_decay"), clear)
    write_study("tables/accuracy.json", grid, lambda *at: 10.0)
    write_study("tables/table_sweep.json", declared(), clear)
    write_report(params, paths.REPORTS)
    page = Page((paths.REPORTS / "index.html").read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "table-published_transport_decay" not in ids  # beside ours now
    assert page.rows["table-paper_table_sweep tbody"][1] == ["cosine 0.2 → 0.01", "8.51"]
    names = [
        "table_sweep",
        "study_sweep",
        "table_accuracy",
        "accuracy_table_accuracy",
        "checks",
        "paper_table_accuracy",
    ]
    for name in names:
        assert page.rows[f"table-{name} tbody"]
        for suffix in ("csv", "md", "tex"):
            assert (paths.REPORTS / f"{name}.{suffix}").is_file()
    assert "Supported at this scale: 'A is below B': distance 5.25 times lower" in page.text
    links = {str(link["href"]) for link in page.all("a")}
    assert {"../tables/sweep.json", "../study/sweep.json"} <= links


def test_the_study_is_reported_without_torch() -> None:
    code = "import sys, afm_pipe.reporting.study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
