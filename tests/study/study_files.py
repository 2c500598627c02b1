"""Tables of the study, declared and written with made-up numbers: clear, reversed or noisy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from afm_pipe.params import Params
from afm_pipe.reporting import inputs
from afm_pipe.reporting.inputs import Inputs, Summary
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.study import study_sections
from afm_pipe.reporting.table import Table
from afm_pipe.runtime import paths
from afm_pipe.study.results import read_tables
from afm_pipe.study.verdicts import Verdict, decide
from tests.reporting.report_inputs import COMMITTED, RUNS

PUBLISHED = yaml.safe_load((Path(inputs.__file__).parent / "published.yaml").read_text(encoding="utf-8"))
KEY = "fd_classifier_2k"
Number = Callable[[str, str, int], float | None]  # a trial's distance by row, column and seed; None: non-finite loss


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
    name: str,
    table: dict[str, Any],
    distance: Number,
    scale: str = "Made up.",
    diverged: Callable[[str, str, int], str | None] = lambda row, column, seed: None,
    accuracy: Callable[[str, str, int], float] = lambda row, column, seed: 0.9,
    units: Callable[[str, str, int], float] = lambda row, column, seed: 14.5,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda trial: trial,
) -> None:
    """Write the file of a table with every trial that it declares."""
    trials = []
    for seed in table["seeds"]:
        for row in table["rows"]["settings"]:
            for column in (table["columns"] or {"settings": [""]})["settings"]:
                place = (row, column, seed)
                made = trial(place, distance(*place), diverged(*place), accuracy(*place), units(*place))
                trials.append(change(made))
    write(name, {"table": table, "scale": scale, "machine": "no machine", "protocol": {}, "trials": trials})


def trial(
    place: tuple[str, str, int], distance: float | None, diverged: str | None, accuracy: float, units: float
) -> dict[str, Any]:
    metrics, intervals = {}, {}
    if distance is not None:
        metrics = {"class_accuracy": accuracy, KEY: distance}
        intervals = {KEY: [0.9 * distance, 1.1 * distance]}
    else:
        diverged = "non-finite loss at update 340"
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


def write(name: str, value: Any) -> None:
    """Write a JSON file under results/."""
    path = paths.RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def sections_of(params: Params) -> dict[str, Section]:
    summary = Summary(images=5000, classes=["0"])
    sections = study_sections(Inputs(params, (), summary, None, PUBLISHED))
    return {section.anchor: section for section in sections}


def verdicts_of(table: dict[str, Any], trained: float = 0.7) -> list[Verdict]:
    (files,) = read_tables(make_params(sweep=table))
    return decide(files, trained)


def verdict_of(table: dict[str, Any]) -> Verdict:
    (verdict,) = verdicts_of(table)
    return verdict


def texts(table: Table) -> list[list[str]]:
    return [[each.text for each in row] for row in table.rows]


def clear(row: str, column: str, seed: int) -> float:
    return {"0": 300.0, "0.2": 60.0}[row] * (1 + 0.05 * seed * (row == "0"))
