"""The report's sections on the study, from files whose numbers are made up."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afm_pipe.reporting.page import write_report
from afm_pipe.reporting.printing import csv_text
from afm_pipe.reporting.study_published import published_table
from afm_pipe.reporting.study_verdicts import effect
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import write_json
from tests.reporting.report_inputs import Page, write_inputs
from tests.study.study_files import (
    KEY,
    PUBLISHED,
    check,
    clear,
    declared,
    make_params,
    sections_of,
    texts,
    verdict_of,
    verdicts_of,
    write,
    write_study,
)

pytestmark = pytest.mark.usefixtures("project")


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
        "nfe",
        "units",
        "total_units",
        "seconds",
        "seeds",
    ]
    assert texts(table) == [
        ["0", "300 [270, 330]", "90.0 %", "3 of 3", "–", "14.5", "17,400", "60.0 s", "3"],
        ["0.2", "51.0 ± 1.0", "90.0 ± 0.0 %", "0 of 3", "–", "14.5", "17,400", "60.0 s", "3"],
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
    assert figure.source == "results/tables/sweep.json"


def test_objectives_are_drawn_over_their_cost_in_training_and_sampling() -> None:
    objectives = {"0": "flow_matching", "0.2": "adversarial_flow"}

    def measured(trial: dict[str, Any]) -> dict[str, Any]:
        costs = trial["cost"] | {"total_units": 20_000.0} if trial["row"] == "0" else trial["cost"]
        changes = {"nfe": 64 if trial["row"] == "0" else 1, "settings": {"objective": objectives[trial["row"]]}}
        return trial | changes | {"cost": costs}

    write_study("tables/sweep.json", declared(), lambda row, *_: 50.0 + 100 * float(row), change=measured)
    section = sections_of(make_params(sweep=declared()))["study-sweep"]
    assert [row[4:7] for row in texts(section.tables[0])] == [["64", "14.5", "20,000"], ["1", "14.5", "17,400"]]
    _, training, sampling = section.figures
    # The last of three measurements, and the second, 300 updates of 14.5 units before.
    assert "0, 20000: 50.0" in training.svg
    assert "0, 15650: 100" in training.svg
    assert "0.2, 17400: 70.0" in training.svg
    assert "0, 64: 50.0" in sampling.svg
    assert "0.2, 1: 70.0" in sampling.svg


@pytest.mark.parametrize("probes", [[], [400, 900]], ids=["before its first measurement", "after two"])
def test_a_seed_that_diverged_leaves_the_measurements_of_the_others(probes: list[int]) -> None:
    objectives = {"0": "flow_matching", "0.2": "adversarial_flow"}

    def diverged(trial: dict[str, Any]) -> dict[str, Any]:
        trial = trial | {"nfe": 1, "settings": {"objective": objectives[trial["row"]]}}
        if trial["row"] == "0" or trial["seed"] != 0:
            return trial
        kept = [probe for probe in trial["probes"] if probe["update"] in probes]
        ended = {"metrics": {}, "intervals": {}, "diverged": "non-finite loss at update 1000"}
        return trial | ended | {"probes": kept, "cost": trial["cost"] | {"updates": 1000, "seconds": None}}

    write_study("tables/sweep.json", declared(), lambda row, _, seed: 50.0 + seed, change=diverged)
    training = sections_of(make_params(sweep=declared()))["study-sweep"].figures[1].svg
    # 14.5 units an update: those of 400, 900 and 1,200 updates. Twice the distance at the second measurement.
    others, all_seeds = ("103 [102, 104]", "102 [100, 104]")
    assert "0.2, 5800: 999" in training
    assert f"0.2, 13050: {all_seeds if probes else others}" in training
    assert "0.2, 17400: 51.5 [51.0, 52.0]" in training
    assert f"0, 13050: {all_seeds}" in training


def test_trials_that_continue_a_run_are_drawn_after_its_units() -> None:
    objectives = {"0": "flow_matching", "0.2": "adversarial_flow"}

    def continuing(trial: dict[str, Any]) -> dict[str, Any]:
        trial = trial | {"nfe": 1, "settings": {"objective": objectives[trial["row"]]}}
        if trial["row"] == "0":
            return trial
        units = {"updates": 400, "units": 10.0, "total_units": 9000.0}  # 5,000 of its base, after 800 updates
        return trial | {"continues": "ab", "cost": trial["cost"] | units}

    write_study("tables/sweep.json", declared(), lambda *_: 50.0, change=continuing)
    training = sections_of(make_params(sweep=declared()))["study-sweep"].figures[1].svg
    assert "0.2, 6000: 100" in training and "0.2, 9000: 50.0" in training


def fired(kinds: dict[str, tuple[str, ...]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that gives a trial the events of its row, an action among them."""

    def with_events(trial: dict[str, Any]) -> dict[str, Any]:
        event = {"update": 9, "images": 288, "kind": "phase", "text": "begins", "action": "done"}
        alarms = [event | {"kind": kind, "text": "found", "action": None} for kind in kinds[trial["row"]]]
        return trial | {"events": [*alarms, event]}

    return with_events


def test_alarms_of_the_monitor_are_shown_and_compared() -> None:
    table = declared(checks=(check("alarms", {"rows": ["0.2"]}, {"rows": ["0"]}),))
    write_study("tables/sweep.json", table, clear)
    written = json.loads(Path("results/tables/sweep.json").read_text())
    give = fired({"0": ("identity", "identity", "stagnation"), "0.2": ()})
    write("tables/sweep.json", written | {"trials": [give(each) for each in written["trials"]]})
    (shown,) = sections_of(make_params(sweep=table))["study-sweep"].tables
    column = [each.key for each in shown.columns].index("alarms")
    assert [row[column] for row in texts(shown)] == ["identity 3 of 3, stagnation 3 of 3", "none of 3"]
    assert [row[column].value for row in shown.rows] == [3, 0]
    verdict = verdict_of(table)
    assert verdict.outcome == "supported"
    assert "kinds of alarms per trial 2.0" in effect(verdict)
    assert verdict.difference == -2.0


def test_trials_without_a_monitor_show_no_alarms_and_decide_nothing_about_them() -> None:
    table = declared(checks=(check("alarms", {"rows": ["0.2"]}, {"rows": ["0"]}),))
    write_study("tables/sweep.json", table, clear)
    written = json.loads(Path("results/tables/sweep.json").read_text())
    give = fired({"0": ("identity",), "0.2": ()})
    trials = [give(each) if each["row"] == "0" and each["seed"] < 2 else each for each in written["trials"]]
    write("tables/sweep.json", written | {"trials": trials})
    (shown,) = sections_of(make_params(sweep=table))["study-sweep"].tables
    column = [each.key for each in shown.columns].index("alarms")
    assert [row[column] for row in texts(shown)] == ["identity 2 of 2 monitored", "–"]
    assert verdict_of(table).seeds == 0


def test_shared_training_time_counts_once_and_that_of_a_base_never() -> None:
    write_study("tables/sweep.json", declared(checks=()), clear)  # two rows, three seeds, a minute each
    written = json.loads(Path("results/tables/sweep.json").read_text())

    def caption(**own: Callable[[Any], str]) -> str:
        trials = [each | {key: value(each["seed"]) for key, value in own.items()} for each in written["trials"]]
        write("tables/sweep.json", written | {"trials": trials})
        return sections_of(make_params(sweep=declared(checks=())))["study-sweep"].tables[0].caption

    assert "6 trials, 6.00 min of training" in caption()
    assert "exclude" not in caption()
    shared = caption(training=lambda seed: f"{seed}", continues=lambda seed: "base")
    assert "6 trials, 3.00 min of training" in shared
    assert "Updates, units and time exclude those of the run that a trial continues." in shared


def test_rows_and_columns_keep_their_declared_order() -> None:
    table = declared(rows=("5e-4", "1e-3", "2e-3"), columns=("none", "da", "cg"), checks=())
    write_study("tables/sweep.json", table, lambda row, column, seed: 10.0)
    written = json.loads(Path("results/tables/sweep.json").read_text())
    Path("results/tables/sweep.json").write_text(json.dumps(written, sort_keys=True))  # as tables are written
    shown = sections_of(make_params(sweep=table))["study-sweep"].tables[0]
    assert [row[0].text for row in shown.rows] == ["5e-4", "1e-3", "2e-3"]
    assert [column.key for column in shown.columns] == ["row", "none", "da", "cg"]


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


def test_ratios_to_held_out_images_stand_beside_the_distance() -> None:
    def with_ratio(trial: dict[str, Any]) -> dict[str, Any]:
        ratio = "ratio_fd_classifier_500"
        metrics, intervals = trial["metrics"] | {ratio: 2.5}, trial["intervals"] | {ratio: [2.0, 3.0]}
        return trial | {"metrics": metrics, "intervals": intervals}

    for columns in ((), ("0.1",)):
        table = declared(("0", "0.2"), columns, seeds=(0,), checks=())
        write_study("tables/beside.json", table, lambda *_: 20.0, change=with_ratio)
        shown = sections_of(make_params(beside=table))["study-beside"].tables
        if columns:
            assert [each.name for each in shown] == ["table_beside", "ratio_table_beside", "accuracy_table_beside"]
            assert texts(shown[1])[0] == ["0", "2.50 [2.00, 3.00]"]
        else:
            assert [column.title for column in shown[0].columns][1:3] == [
                "FD-2k (classifier)",
                "FD ratio-500 (classifier)",
            ]
            assert texts(shown[0])[0][1:3] == ["20.0 [18.0, 22.0]", "2.50 [2.00, 3.00]"]


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
    assert section.small == "This profile: Small scale. The study: Large."
    assert not section.warning
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
    assert {cell.source for cell in checks.rows[0]} == {"", "results/study/sweep.json"}


def test_a_claim_the_study_cannot_decide_is_taken_from_the_own_run() -> None:
    new = check("distance", {"rows": ["0"]}, {"rows": ["0.2"]}, "B is below A")
    own = declared(checks=(*declared()["checks"], new))
    write_study("tables/sweep.json", own, clear)
    write_study("study/sweep.json", declared(), clear)
    found = [(each.check.claim, each.outcome, each.results and each.results.scope) for each in verdicts_of(own)]
    assert found == [
        ("A is below B", "supported", "study"),
        ("B is below A", "not supported", "table"),
    ]


def test_a_table_that_was_not_run_says_how_to_run_it() -> None:
    found = sections_of(make_params(sweep=declared(paper="ot_decay")))
    assert "Found no results/tables/sweep.json" in found["study-sweep"].warning
    assert "dvc repro table@sweep" in found["study-sweep"].warning
    assert found["study-sweep"].tables == ()
    assert [table.name for table in found["study-sweep"].published] == ["paper_table_sweep"]
    assert found["checks"].verdict == "Of 1 claim: 1 not run."
    write_study("study/sweep.json", declared(), clear)
    section = sections_of(make_params(sweep=declared()))["study-sweep"]
    assert [table.name for table in section.tables] == ["study_sweep"]
    assert "Found no results/tables/sweep.json" in section.warning


def test_a_table_of_the_study_alone_is_shown_if_it_is_of_the_same_images() -> None:
    assert sections_of(make_params()) == {}
    write_study("study/sweep.json", declared(), clear)
    section = sections_of(make_params())["study-sweep"]
    assert [table.name for table in section.tables] == ["study_sweep"] and section.warning == ""
    stored = json.loads((paths.STUDY / "sweep.json").read_text())
    write_json(paths.STUDY / "sweep.json", stored | {"protocol": {"reference_manifest": "these"}})
    write_json(paths.REFERENCE / "summary.json", {"manifest": "these"})
    assert "study-sweep" in sections_of(make_params())
    write_json(paths.REFERENCE / "summary.json", {"manifest": "others"})
    assert sections_of(make_params()) == {}


def test_a_table_whose_declaration_changed_says_so() -> None:
    write_study("tables/sweep.json", declared(), clear)
    assert "changed" not in sections_of(make_params(sweep=declared()))["study-sweep"].warning
    changed = declared() | {"base": {"lr": 0.5}}
    assert (
        "changed since this table was made: run `dvc repro table@sweep`"
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
        (lambda file: "[]", "expected a section of fields"),
        (lambda file: json.dumps(file | {"scale": None}), "wrong scale"),
        (lambda file: json.dumps(file | {"trials": file["trials"][:1] * 2}), "trial 0, seed 0 occurs 2 times"),
        (lambda file: json.dumps(file | {"trials": [file["trials"][0] | {"row": "7"}]}), "declares no trial 7, seed 0"),
        (
            lambda file: json.dumps(file | {"trials": [file["trials"][0] | {"metrics": {KEY: float("nan")}}]}),
            "not JSON",
        ),
    ],
)
def test_a_damaged_file_is_a_clear_error(scope: str, damage: Callable[[Any], str], words: str) -> None:
    path = paths.RESULTS / scope / "sweep.json"
    write_study(f"{scope}/sweep.json", declared(), clear)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(UserError, match=words) as found:
        sections_of(make_params(sweep=declared()))
    assert str(path) in str(found.value)
    if words != "not JSON":
        remedy = "dvc repro --force table@sweep" if scope == "tables" else "git checkout results/study/sweep.json"
        assert remedy in str(found.value)


def test_the_page_and_its_files_hold_the_study() -> None:
    grid = declared(("0.1", "0.5"), ("0", "0.2"), checks=(), paper="ot_gp_grid")
    params = make_params(sweep=declared(paper="ot_decay"), accuracy=grid, table_sweep=declared())
    write_inputs(params)
    write_study("tables/sweep.json", declared(paper="ot_decay"), clear)
    write_study("study/sweep.json", declared(paper="ot_decay"), clear)
    write_study("tables/accuracy.json", grid, lambda *at: 10.0)
    write_study("tables/table_sweep.json", declared(), clear)
    write_report(params, paths.REPORT, paths.RENDERED)
    page = Page((paths.REPORT / "index.html").read_text(encoding="utf-8"))
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
            assert (paths.RENDERED / f"{name}.{suffix}").is_file()
    assert "Supported at this scale: 'A is below B': distance 5.25 times lower" in page.text
    links = [str(link["href"]) for link in page.all("a")]
    for source in (paths.table("sweep"), paths.STUDY / "sweep.json"):
        assert any(link.endswith(f"../{source}") for link in links)


def test_the_study_is_reported_without_torch() -> None:
    code = "import sys, afm_pipe.reporting.study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
