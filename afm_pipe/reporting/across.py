"""Compare one table of several checkouts, such as one for each latent space, which a table cannot vary.

The rows that all checkouts share become columns, and every checkout a row, of one table whose claims are decided as
those of any other.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from afm_pipe.params import StudyTable
from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Summary
from afm_pipe.reporting.study_verdicts import effect
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_model, write_json
from afm_pipe.runtime.tables import table_text
from afm_pipe.study.results import Probe, TableResults, TrialResult
from afm_pipe.study.verdicts import verdict_on

SHARED = ("samples", "seed", "noise", "class_shares", "reference_manifest", "uint8_rule")
"""What the protocols of all checkouts must have in common."""
SHOWN = ("fid", "fd_", "ratio_fid", "ratio_fd_", "difference_kid", "class_accuracy", "within_class_variance", "copies")
UNDECIDED = (
    "No claim is decided. Found no distance that all checkouts share, expected one in features of equal weights: add a "
    "released network, such as efficientnet, to evaluate.features of each."
)


class Compared(TableResults, frozen=True):
    """A table with the floor of its checkout."""

    floor: Summary | None = None


def compare_tables(checkouts: Mapping[str, Path], name: str, out: Path | None = None) -> str:
    """Compare table `name` of the checkouts, by label; write the merged table to `out`, if given, and return a text.

    Raises UserError where fewer than two are given, a table is missing, they have no row in common, or they were not
    measured alike. Metrics of feature networks that differ are left out; without a common distance no claim is decided.
    """
    if len(checkouts) < 2:
        raise UserError(f"Found {len(checkouts)} checkout, expected two or more to compare, as LABEL=FOLDER.")
    tables = {label: _read(folder, name) for label, folder in checkouts.items()}
    _require_alike(tables)
    merged = _merge(tables, name)
    if out is not None:
        write_json(out, merged.model_dump(mode="json", include={"table", "scale", "machine", "trials"}))
    verdicts = [verdict_on(merged, check, trained=0.0) for check in merged.table.checks]
    claims = [f"{verdict.outcome.capitalize()}: {verdict.check.claim}: {effect(verdict)}." for verdict in verdicts]
    return "\n".join([_text(merged, tables), "", *(claims or [UNDECIDED])])


def _read(folder: Path, name: str) -> Compared:
    path, summary = folder / paths.table(name), folder / paths.REFERENCE / "summary.json"
    if not path.is_file():
        raise UserError(f"Found no {path}, expected the table {name}: run `dvc repro table@{name}` in {folder}.")
    floor = read_model(Summary, summary, "run `dvc repro reference` there") if summary.is_file() else None
    return read_model(Compared, path, f"run `dvc repro --force table@{name}` there").model_copy(
        update={"floor": floor, "path": path, "name": name}
    )


def _require_alike(tables: Mapping[str, Compared]) -> None:
    first, *others = tables.items()
    for label, table in others:
        for key in SHARED:
            found = [str(each.protocol.get(key)) for each in (first[1], table)]
            if found[0] != found[1]:
                raise UserError(
                    f"Found {key} {found[0]:.40} in {first[0]} and {found[1]:.40} in {label}, expected samples "
                    "measured alike: use equal data, held_out and evaluate in all checkouts."
                )


def _merge(tables: Mapping[str, Compared], name: str) -> TableResults:
    first = next(iter(tables.values()))
    rows = [row for row in first.rows if all(row in table.rows for table in tables.values())]
    if not rows or any(table.table.columns for table in tables.values()):
        raise UserError(f"Found no common rows in the tables {name}, expected equal labels, and no columns.")
    differing = _differing_networks(tables)
    trials = [
        _without(trial, differing).model_copy(update={"row": label, "column": trial.row})
        for label, table in tables.items()
        for trial in table.trials
        if trial.row in rows
    ]
    seeds = sorted(set.intersection(*({trial.seed for trial in table.trials} for table in tables.values())))
    if not seeds:
        raise UserError(f"Found no seed that all tables {name} share, expected one at least: change their seeds.")
    claimed = rows if any(titles.is_distance(key) for trial in trials for key in trial.metrics) else []
    declared = StudyTable.model_validate(
        {
            "title": f"{first.table.title}, by checkout",
            "question": f"How do {', '.join(tables)} compare?",
            "paper": None,
            "base": {},
            "rows": {"title": "Checkout", "settings": {label: {} for label in tables}},
            "columns": {"title": first.table.rows.title, "settings": {row: {} for row in rows}},
            "seeds": seeds,
            "checks": [
                {
                    "claim": f"{one} is better than {other}, {row}",
                    "measure": "distance",
                    "less": {"rows": [one], "columns": [row]},
                    "than": {"rows": [other], "columns": [row]},
                }
                for row in claimed
                for one, other in combinations(tables, 2)
            ],
        }
    )
    return TableResults(
        table=declared,
        scale=" ".join(f"{label}: {table.scale}" for label, table in tables.items()),
        machine=", ".join(sorted({table.machine for table in tables.values()})),
        trials=tuple(trial for trial in trials if trial.seed in seeds),
        name=name,
    )


def _differing_networks(tables: Mapping[str, Compared]) -> set[str]:
    """Return the feature networks that not all checkouts have, with equal weights."""
    found = [table.protocol.get("features", {}) for table in tables.values()]
    return {name for each in found for name in each if any(other.get(name) != each[name] for other in found)}


def _without(trial: TrialResult, networks: set[str]) -> TrialResult:
    """Return a trial without the metrics of some feature networks, in its probes either."""

    def kept(measured: TrialResult | Probe) -> dict[str, Any]:
        left = [key for key in measured.metrics if not any(titles.is_of_network(key, name) for name in networks)]
        return {
            "metrics": {key: measured.metrics[key] for key in left},
            "intervals": {key: ends for key, ends in measured.intervals.items() if key in left},
        }

    probes = tuple(probe.model_copy(update=kept(probe)) for probe in trial.probes)
    return trial.model_copy(update=kept(trial) | {"probes": probes})


def _text(merged: TableResults, tables: Mapping[str, Compared]) -> str:
    measured = {key for trial in merged.trials for key in trial.metrics}
    keys = [key for key in titles.in_order(measured) if key.startswith(SHOWN)]
    header = ["", "seeds", "updates", *(titles.metric(key).title for key in keys)]
    rows = []
    for column in merged.columns:
        for label in merged.rows:
            trials = merged.at(label, column)
            updates = sorted({trial.cost.updates for trial in trials})
            values = [_mean(key, [trial.metrics.get(key) for trial in trials]) for key in keys]
            rows.append([f"{label}, {column}", str(len(trials)), "/".join(map(str, updates)), *values])
    for label, floor in ((label, table.floor) for label, table in tables.items() if table.floor):
        values = [titles.metric_text(key, floor.floor(titles.base_key(key))) for key in keys]
        rows.append([f"{label}, floor: PSNR {titles.number(floor.psnr_reconstruction)} dB", "", "", *values])
    return table_text(header, rows)


def _mean(key: str, values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return titles.MISSING
    spread = f" ± {titles.metric_text(key, statistics.stdev(found))}" if len(found) > 1 else ""
    return titles.metric_text(key, statistics.fmean(found)) + spread
