"""Compare results with a baseline: is anything worse than measurement and seeds explain?"""

import io
import math
import re
import statistics
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Measured
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_model
from afm_pipe.runtime.tables import table_text
from afm_pipe.study.results import TableResults

WORSE, NOT_COMPARED = 1, 2  # exit codes
FOLDERS = ("metrics", "tables")  # of results/
SEED = re.compile(r"-s\d+$")  # of the name of a run that repeats another with its own seed
PROTOCOL = ("samples", "seed", "noise", "label_mode", "class_shares", "resize", "uint8_rule", "reference_manifest")
PARTS = ("sampling", "evaluation")  # of the code, whose versions must be equal


class Measurement(NamedTuple):
    """A metric of a run or trial, with its seeds."""

    values: tuple[float, ...]
    half_widths: tuple[float, ...]
    """Of the 95 % intervals of measuring."""
    protocol: dict[str, Any]
    failed: int
    """Seeds without a value: the loss was not finite."""

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)


def gate(baseline: str, results: Path = paths.RESULTS) -> tuple[str, int]:
    """Compare results with a folder like results/ or with a git revision; return a table and the exit code.

    A mean over seeds is worse if it differs in the worse direction by more than the 95 % interval of measuring and by
    more than the t-interval of the seeds. A row of one seed is given the median relative spread of rows with several.
    """
    now, old = read_measurements(results), _read_baseline(baseline)
    if not old:
        raise UserError(
            f"Found no metrics in the baseline {baseline}, expected files such as results/metrics/RUN.json."
        )
    deviations = _relative_deviations([*now.items(), *old.items()])
    rows, verdicts = [], []
    for subject, metric in dict.fromkeys([*old, *now]):
        before, after = old.get((subject, metric)), now.get((subject, metric))
        margin, verdict = _verdict(metric, before, after, deviations.get(titles.base_key(metric)))
        verdicts.append(verdict)
        shown = [
            titles.metric_text(metric, each.mean) if each and each.values else titles.MISSING
            for each in (before, after)
        ]
        margin_text = titles.metric_text(metric, margin) if margin is not None else titles.MISSING
        rows.append([subject, titles.metric(metric).title, *shown, margin_text, verdict])
    worse = sum(verdict.startswith("worse") for verdict in verdicts)
    missing = sum(verdict.startswith(("missing", "not comparable")) for verdict in verdicts)
    text = table_text(["what", "metric", "baseline", "now", "margin", "verdict"], rows)
    end = f"{worse} worse, {missing} missing or not comparable, of {len(rows)}."
    return (
        f"{text}\n{end} Margin: what measurement and seeds explain.",
        WORSE if worse else NOT_COMPARED if missing else 0,
    )


def read_measurements(results: Path) -> dict[tuple[str, str], Measurement]:
    """Return distances and class accuracies under a folder like results/, by what is measured and metric.

    Runs NAME and NAME-sK are the seeds of NAME, and so are the trials of a row and column of a table.
    """
    found = defaultdict[tuple[str, str], list[tuple[float | None, Any, dict[str, Any]]]](list)
    for subject, metrics, intervals, protocol in _read_files(results):
        for key, value in metrics.items():
            if titles.is_distance(key) or key == "class_accuracy":
                found[subject, key].append((value, intervals.get(key), protocol))
    return {
        place: Measurement(
            tuple(value for value, *_ in seeds if value is not None),
            tuple(
                (ends[1] - ends[0]) / 2 for value, ends, _ in seeds if ends and value is not None and None not in ends
            ),
            seeds[0][2],
            sum(value is None for value, *_ in seeds),
        )
        for place, seeds in found.items()
    }


def _read_files(results: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    remedy = "restore it, or choose another baseline"
    for path in sorted((results / "metrics").glob("*.json")):
        measured = read_model(Measured, path, remedy)
        yield SEED.sub("", path.stem), measured.numbers, measured.intervals, measured.protocol
    for path in sorted((results / "tables").glob("*.json")):
        table = read_model(TableResults, path, remedy)
        keys = {key for trial in table.trials for key in trial.metrics}
        for trial in table.trials:
            subject = f"{path.stem}: {trial.row}" + (f" x {trial.column}" if trial.column else "")
            metrics = {key: trial.metrics.get(key) for key in keys}
            yield subject, metrics, trial.intervals, {"scale": table.scale}


def _read_baseline(baseline: str) -> dict[tuple[str, str], Measurement]:
    if Path(baseline).is_dir():
        return read_measurements(Path(baseline))
    listed = _git("ls-tree", "-r", "--name-only", baseline, "--", *(str(paths.RESULTS / each) for each in FOLDERS))
    files = [name for name in listed.decode().splitlines() if name.endswith(".json")]
    with TemporaryDirectory() as folder:
        if files:
            archive = _git("archive", "--format=tar", baseline, "--", *files)
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                for member in tar:  # extractall with a filter needs Python 3.11.4
                    if (file := tar.extractfile(member)) is not None:
                        target = Path(folder, member.name)  # git has no path with ..
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(file.read())
        return read_measurements(Path(folder) / paths.RESULTS)


def _git(*words: str) -> bytes:
    try:
        return subprocess.run(["git", *words], capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"git is not on PATH").decode(errors="replace").strip().splitlines()
        raise UserError(
            "Found a baseline that git cannot read, expected a folder like results/ or a git revision such as HEAD: "
            f"{said[0] if said else 'git failed'}."
        ) from None


def _relative_deviations(measurements: list[tuple[tuple[str, str], Measurement]]) -> dict[str, float]:
    """Return the median relative standard deviation over seeds, by metric."""
    found = defaultdict[str, list[float]](list)
    for (_, metric), each in measurements:
        if len(each.values) > 1 and each.mean:
            found[titles.base_key(metric)].append(statistics.stdev(each.values) / abs(each.mean))
    return {metric: statistics.median(values) for metric, values in found.items()}


def _verdict(
    metric: str, before: Measurement | None, after: Measurement | None, relative: float | None
) -> tuple[float | None, str]:
    """Return the change that measurement and seeds explain, if known, and the verdict."""
    if before is None:
        return None, "new"
    if after is None:
        return None, "missing: measure it, or remove it from the baseline"
    different = _difference(before.protocol, after.protocol)
    if different:
        return None, f"not comparable: other {different}"
    if after.failed > before.failed:
        return None, f"worse: {after.failed} of {after.failed + len(after.values)} seeds diverged"
    if not (before.values and after.values):
        return None, "same" if before.failed else "new"
    if before.values == after.values:
        return 0.0, "same"
    margin = max(_measuring(before, after), _seeds(before, after, relative) or 0.0)
    change = after.mean - before.mean
    if abs(change) <= margin:
        return margin, "within"
    if _seeds(before, after, relative) is None:
        return margin, "undecided: one seed"
    return margin, "worse" if (change > 0) == (titles.metric(metric).better == "lower") else "better"


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return what differs between two protocols, as far as both record it."""
    for key in (*PROTOCOL, "scale"):
        if key in before and key in after and before[key] != after[key]:
            return f"{key} ({before[key]} before, {after[key]} now)"
    for part in PARTS:
        old, new = (str(each.get("code", {}).get(part, "")).partition(" ")[0] for each in (before, after))
        if old and new and old != new:
            return f"version of {part} ({old} before, {new} now)"
    return None


def _measuring(before: Measurement, after: Measurement) -> float:
    """Return the half-width of the 95 % interval of the difference of two means, as far as measuring causes it."""
    halves = (math.hypot(*each.half_widths) / max(len(each.half_widths), 1) for each in (before, after))
    return math.hypot(*halves)


def _seeds(before: Measurement, after: Measurement, relative: float | None) -> float | None:
    """Return the half-width of the 95 % t-interval of the difference of two means over seeds; None if unknown."""
    from scipy.special import stdtrit

    degrees = len(before.values) + len(after.values) - 2
    if degrees:
        squares = sum((value - each.mean) ** 2 for each in (before, after) for value in each.values)
        variance, quantile = squares / degrees, float(stdtrit(degrees, 0.975))
    elif relative is not None:
        variance, quantile = (relative * max(abs(before.mean), abs(after.mean))) ** 2, 2.0
    else:
        return None
    return quantile * math.sqrt(variance * (1 / len(before.values) + 1 / len(after.values)))
