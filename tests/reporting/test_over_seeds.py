"""The main table: runs over seeds, and the summary's facts that come from it."""

from pathlib import Path
from typing import Any

import pytest

from afm_pipe.params import Params
from afm_pipe.reporting import gallery
from afm_pipe.reporting.summary import lowest_row
from afm_pipe.runtime import paths
from afm_pipe.study.results import runs_over_seeds
from tests.reporting.report_inputs import COMMITTED, Page, built, write_inputs, write_picture
from tests.study.study_files import check, declared, write_study

RUNS: dict[str, dict[str, Any]] = {"alpha": {}, "beta": {"lr": 5.0e-4}, "gamma": {"nfe": 2, "form": "residual"}}
DISTANCES = {"alpha": 40.0, "beta": 38.0, "gamma": 200.0}
LABELS = {"gamma": "two steps"}  # the others are labeled with their names
SPREAD = {"alpha": (0.0, 4.0, -4.0), "beta": (3.0, -3.0, 0.0), "gamma": (-5.0, 5.0, 0.0)}  # over seeds


def with_runs_over_seeds(
    seeds: tuple[int, ...] = (0, 1, 2), missing: str = "", checks: tuple[dict[str, Any], ...] = ()
) -> Params:
    """Write the files of a report, with a table of three runs over seeds; `missing` has no distance for its last."""
    table = declared(checks=checks, seeds=seeds)
    table["title"] = "Runs, over three seeds"
    table["rows"] = {"title": "Run", "settings": {LABELS.get(name, name): {"run": name} for name in RUNS}}

    def distance(row: str, column: str, seed: int) -> float | None:
        name = table["rows"]["settings"][row]["run"]
        return None if name == missing and seed == seeds[-1] else DISTANCES[name] + SPREAD[name][seed]

    write_study("tables/runs.json", table, distance)
    own = {"runs": RUNS, "guided": {}, "imported": {}, "tables": {"runs": table}}
    params = Params.model_validate(COMMITTED | own)
    write_inputs(params)
    return params


def test_runs_over_seeds_come_first_and_single_runs_are_folded_below(project: Path) -> None:
    page = built(with_runs_over_seeds())
    rows = [row[:4] for row in page.rows["table-table_runs tbody"]]
    assert rows == [
        ["alpha", "The shared settings", "40.0 ± 4.0", "90.0 ± 0.0 %"],
        ["beta", "Learning rate 0.0005", "38.0 ± 3.0", "90.0 ± 0.0 %"],
        ["gamma", "two steps", "200 ± 5.0", "90.0 ± 0.0 %"],
    ]
    tables = [str(each["id"]) for each in page.all("table")]
    assert tables.index("table-table_runs") < tables.index("table-runs")
    text = (paths.REPORT / "index.html").read_text()
    before = text[: text.index('id="table-runs"')]
    assert before.count("<details") == before.count("</details>") + 1  # folded
    links = [str(link["href"]) for link in Page(text[text.index('id="table-table_runs"') :]).all("a")]
    assert links[0] == "runs/alpha.html"


def test_facts_are_over_seeds_and_name_what_cannot_be_told_apart(project: Path) -> None:
    text = built(with_runs_over_seeds()).text
    assert "run beta, mean ± standard deviation over 3 seeds; the lowest; over these seeds" in text
    assert "the difference from alpha is undecided (95 %" in text
    summary = text[text.index("Lowest distance") :]
    assert "38.0 ± 3.0" in summary[:60]
    assert "90.0 ± 0.0 %" in summary[: summary.index("of the samples of run beta show their class")]


def test_the_page_opens_with_the_verdicts_on_main_claims_in_one_line_each(project: Path) -> None:
    worse = check("distance", {"rows": ["beta"]}, {"rows": ["two steps"]}, "One step is better than two")
    close = check("distance", {"rows": ["beta"]}, {"rows": ["alpha"]}, "A lower rate is better")
    page = built(with_runs_over_seeds(checks=(worse, close)))
    summary = " ".join(page.text[page.text.index("Summary") : page.text.index("Lowest distance")].split())
    first, second = summary.index("supported One step"), summary.index("undecided A lower rate is better: distance")
    assert first < second
    assert "One step is better than two: distance 5.27 times lower [4.07, 6.83] for beta than for two steps" in summary
    assert "Of 2 claims: 1 supported, 1 undecided." in summary
    assert {"href": "#study-runs"} in page.all("a")


def test_photographs_stand_beside_the_samples_where_they_were_sampled(project: Path) -> None:
    params, path = with_runs_over_seeds(), gallery.PHOTOS / "samples.png"
    assert "photographs" not in built(params).text
    write_picture(path, 5)
    page = built(params)
    assert any("photographs of clothes" in str(each["alt"]) for each in page.all("img"))
    assert {"href": f"../../{path}"} in page.all("a")
    (gallery.PHOTOS / "report").mkdir()
    (gallery.PHOTOS / "report" / "index.html").touch()
    assert {"href": f"../../{gallery.PHOTOS / 'report' / 'index.html'}"} in built(params).all("a")


def test_a_run_that_is_clear_of_all_others_is_called_lower(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DISTANCES, "beta", 10.0)
    assert "over 3 seeds; lower than every other run (95 % t-intervals over seeds" in built(with_runs_over_seeds()).text


def test_one_seed_ranks_nothing(project: Path) -> None:
    assert "run beta, one seed; the lowest; one seed ranks nothing" in built(with_runs_over_seeds(seeds=(1,))).text


def test_a_run_without_the_distance_of_a_seed_is_not_the_lowest(project: Path) -> None:
    results = runs_over_seeds(with_runs_over_seeds(missing="beta"))
    assert results is not None
    assert lowest_row(results) == "alpha"
