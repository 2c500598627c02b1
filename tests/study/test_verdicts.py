"""Verdicts on the study's claims, from files whose numbers are made up."""

import json
from pathlib import Path

import pytest

from afm_pipe.reporting.study_verdicts import effect, sentence
from afm_pipe.study.statistics import t_interval
from tests.study.study_files import (
    check,
    clear,
    declared,
    make_params,
    sections_of,
    verdict_of,
    verdicts_of,
    write,
    write_study,
)

pytestmark = pytest.mark.usefixtures("project")


def test_seeds_that_agree_support_a_claim_with_its_factor_interval_seeds_and_scale() -> None:
    write_study("tables/sweep.json", declared(), clear)
    verdict = verdict_of(declared())
    assert verdict.outcome == "supported"
    assert verdict.interval is not None
    assert verdict.interval[1] < 0
    assert sentence(verdict) == (
        "Supported at this scale: 'A is below B': distance 5.25 times lower [4.66, 5.91] for lambda_ot = 0.2 than for "
        "0, over 3 seeds of this profile."
    )


def test_a_paired_t_interval_is_the_textbooks() -> None:
    low, high = t_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert t_interval([1.0]) is None
    assert t_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)


def test_seeds_are_paired() -> None:
    """What differs from seed to seed far more than between groups decides nothing unless seed is held to seed."""
    write_study("tables/sweep.json", declared(), lambda row, _, seed: 10.0 ** (seed + 1) * (1.1 if row == "0" else 1))
    verdict = verdict_of(declared())
    assert verdict.outcome == "supported"
    assert "1.10 times lower [1.10, 1.10]" in effect(verdict)


def test_seeds_that_agree_on_the_reverse_do_not_support_a_claim() -> None:
    write_study("tables/sweep.json", declared(), lambda row, _, seed: 360_000 / clear(row, "", seed))
    verdict = verdict_of(declared())
    assert verdict.outcome == "not supported"
    assert sentence(verdict).startswith("Not supported at this scale: 'A is below B': distance 5.25 times higher [4.66")


def test_seeds_that_disagree_leave_a_claim_undecided() -> None:
    noisy = {("0", 0): 50.0, ("0", 1): 70.0, ("0", 2): 55.0, ("0.2", 0): 60.0, ("0.2", 1): 48.0, ("0.2", 2): 58.0}
    write_study("tables/sweep.json", declared(), lambda row, _, seed: noisy[row, seed])
    verdict = verdict_of(declared())
    assert verdict.outcome == "undecided"
    assert "times lower [0." in sentence(verdict)
    assert sentence(verdict).endswith("over 3 seeds of this profile.")


@pytest.mark.parametrize(("factor", "words"), [(1, "5.00 times lower"), (-1, "5.00 times higher")])
def test_one_seed_decides_nothing_and_says_what_it_saw(factor: int, words: str) -> None:
    table = declared(seeds=(0,))
    write_study("tables/sweep.json", table, lambda row, _, seed: clear(row, "", 0) ** factor)
    verdict = verdict_of(table)
    assert verdict.outcome == "undecided"
    assert sentence(verdict) == (
        f"Undecided at this scale (one seed): 'A is below B': distance {words} for lambda_ot = 0.2 than for "
        f"0, {'as claimed' if factor > 0 else 'against the claim'}, over one seed of this profile."
    )


def test_a_trial_without_a_number_is_worse_than_all_with_one() -> None:
    write_study("tables/sweep.json", declared(), lambda *at: None if at[0] == "0" and at[2] else clear(*at))
    verdict = verdict_of(declared())
    assert verdict.outcome == "supported"
    assert "at least 7.94 times lower" in effect(verdict)  # of 300 / 60 and twice 600 / 60, the geometric mean
    assert "(2 trials without a number taken as twice the worst of the table)" in effect(verdict)
    write_study("tables/sweep.json", declared(), lambda *at: None if at[0] == "0" else 60.0 + at[2])
    assert verdict_of(declared()).outcome == "supported"  # though its own are the worst that have a number
    write_study("tables/sweep.json", declared(), lambda *at: None if at[0] == "0.2" else 60.0 + at[2])
    assert verdict_of(declared()).outcome == "not supported"
    write_study("tables/sweep.json", declared(), lambda *at: None)
    verdict = verdict_of(declared())
    assert verdict.outcome == "undecided"
    assert effect(verdict).startswith("distance equal")


@pytest.mark.parametrize("flattered", ["less", "than"])
def test_no_verdict_is_given_that_a_missing_number_favors(flattered: str) -> None:
    """One of its trials lost its number; by the number that replaces it, the group would still be lower."""
    groups = {"less": {"rows": ["0"]}, "than": {"rows": ["0"]}, flattered: {"rows": ["0.2", "9"]}}
    table = declared(rows=("0", "0.2", "9"), checks=(check("distance", groups["less"], groups["than"]),))
    numbers = {"0": 300.0, "9": 20.0}
    write_study("tables/sweep.json", table, lambda row, _, seed: None if row == "0.2" else numbers[row] + seed)
    verdict = verdict_of(table)
    assert verdict.interval is not None
    assert verdict.interval[0] * verdict.interval[1] > 0
    assert (verdict.difference or 0) < 0 if flattered == "less" else (verdict.difference or 0) > 0
    assert verdict.outcome == "undecided"
    assert "at most" in effect(verdict)


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
    trained, diverged, accurate = verdicts_of(table)
    assert trained.outcome == "supported"
    assert "fraction of trained trials 75.0 points lower" in effect(trained)
    assert "(3 of 12 trials against 12 of 12 trials)" in effect(trained)
    assert trained.interval is not None
    assert trained.interval[1] > -0.75 > trained.interval[0]  # seeds agree, but in steps of a quarter
    assert diverged.outcome == "undecided"
    assert "(0 of 12 trials against 2 of 12 trials)" in effect(diverged)
    assert accurate.outcome == "supported"
    assert "class accuracy 47.8 points lower" in effect(accurate)
    assert effect(verdicts_of(table, 0.2)[0]).startswith("fraction of trained trials equal")


def test_a_trial_without_a_number_has_no_accuracy_and_did_not_train() -> None:
    less, than = {"rows": ["0"]}, {"rows": ["0.2"]}
    checks = (check("accuracy", less, than, "right"), check("trained", less, than, "trains"))
    table = declared(checks=checks)
    write_study("tables/sweep.json", table, lambda row, *_: None if row == "0" else 50.0)
    accurate, trained = verdicts_of(table)
    assert effect(accurate).startswith("class accuracy 90.0 points lower")
    assert effect(trained).startswith("fraction of trained trials 100 points lower")
    assert trained.interval is not None
    assert trained.interval[0] == -1  # no share differs by more


def test_shares_that_are_equal_over_seeds_are_called_equal() -> None:
    table = declared(columns=("a", "b", "c"), checks=(check("trained", {"rows": ["0.2"]}, {"rows": ["0"]}),))

    def accuracy(row: str, column: str, seed: int) -> float:
        return 0.9 if (column == "a" if row == "0.2" else seed == 2) else 0.1

    write_study("tables/sweep.json", table, lambda *at: 10.0, accuracy=accuracy)
    verdict = verdict_of(table)
    assert (verdict.difference, verdict.outcome) == (0, "undecided")
    assert "trials equal [" in effect(verdict)


@pytest.mark.parametrize(("cheap", "outcome"), [(10.3, "supported"), (14.5, "not supported"), (15.0, "not supported")])
def test_units_are_compared_exactly_with_one_seed_too(cheap: float, outcome: str) -> None:
    table = declared(seeds=(0,), checks=(check("units", {"rows": ["0.2"]}, {"rows": ["0"]}),))
    write_study("tables/sweep.json", table, lambda *at: 10.0, units=lambda row, *_: cheap if row == "0.2" else 14.5)
    verdict = verdict_of(table)
    assert verdict.outcome == outcome
    assert ("1.41 times fewer, counted" in sentence(verdict)) == (cheap < 14)


def test_seeds_with_missing_trials_are_left_out() -> None:
    write_study("tables/sweep.json", declared(), clear)
    stored = json.loads(Path("results/tables/sweep.json").read_text())
    kept = [each for each in stored["trials"] if each["seed"] != 1 or each["row"] != "0"]
    write("tables/sweep.json", stored | {"trials": kept})
    assert verdict_of(declared()).seeds == 2
    section = sections_of(make_params(sweep=declared()))["study-sweep"]
    assert "1 of 6 trials have not been run" in section.tables[0].caption
    both = declared(checks=(check("distance", {"rows": ["0.2", "0"]}, {"rows": ["0"]}),))
    kept = [each for each in stored["trials"] if each["seed"] != 1 or each["row"] != "0.2"]
    write("tables/sweep.json", stored | {"trials": kept, "table": both})
    assert verdict_of(both).seeds == 2
    write("tables/sweep.json", stored | {"trials": [each for each in kept if each["row"] != "0"]})
    verdict = verdict_of(declared())
    assert verdict.outcome == "not run"
    assert sentence(verdict) == "Not run: 'A is below B'."
