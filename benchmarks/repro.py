"""Time the parts of `make repro`, in a clone whose environment is installed, and write benchmarks/repro.md.

make repro 2>&1 | python -m benchmarks.repro
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.commands import user_command
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.machine import usable_cores

PAGE = Path("benchmarks/repro.md")
STAGE = re.compile(r"Running stage '([^'@]+)")


class Times(NamedTuple):
    """Seconds of a `dvc repro`: of each stage, summed over its runs, and until the first picture and the end."""

    stages: dict[str, float]
    first_picture: float | None
    total: float


@user_command
def main() -> None:
    """Read the output of `make repro`, pass it on, and write the page."""
    found, params = timed(sys.stdin, next(iter(load_params().names))), load_params()
    if "pool" not in found.stages:
        raise UserError("Found no line \"Running stage 'pool'\", expected a `make repro` with all its work to do.")
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    PAGE.write_text(page(found, training_seconds(params), commit), encoding="utf-8")
    print(PAGE)


def timed(lines: Iterable[str], first: str) -> Times:
    """Pass `lines` on as they come, and return the times of the stages they name; `first` has the first picture."""
    begin, seen, stages = time.monotonic(), [], dict[str, float]()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            if (paths.samples(first) / "grid.png").is_file():
                seen.append(time.monotonic() - begin)
                return

    threading.Thread(target=look, daemon=True).start()
    stage, since = "start", begin
    for line in lines:
        print(line, end="", flush=True)
        if (match := STAGE.search(line)) is not None:
            now = time.monotonic()
            stages[stage] = stages.get(stage, 0.0) + now - since
            stage, since = match[1], now
    end = time.monotonic()
    done.set()
    stages[stage] = stages.get(stage, 0.0) + end - since
    return Times(stages, next(iter(seen), None), end - begin)


def training_seconds(params: Params) -> float:
    """Return the seconds of training of all runs and trials, each counted once."""
    runs = {name: json.loads(paths.costs(name).read_text())["seconds"] for name in params.models}
    trials = {}
    for name in params.tables:
        for trial in json.loads(paths.table(name).read_text())["trials"]:
            trials[trial["training"]] = trial["cost"]["seconds"] or 0.0
    owned = {path.parent.name for name in params.runs for path in (paths.WORK / name).glob("*/trained.json")}
    return sum(runs.values()) + sum(seconds for training, seconds in trials.items() if training not in owned)


def page(found: Times, training: float, commit: str) -> str:
    """Return the page: a table of parts, the first picture, and the share of the pool's time that is training."""
    rows = "\n".join(f"| {stage} | {seconds:.0f} |" for stage, seconds in found.stages.items())
    share = training / (found.stages["pool"] * usable_cores())
    first = "" if found.first_picture is None else f"The first picture was there after {found.first_picture:.0f} s. "
    return f"""# The parts of `make repro`

Measured at commit `{commit}` on {usable_cores()} cores, by `make repro 2>&1 | python -m benchmarks.repro`.
{first}Training took {training:.0f} s in all, {share:.0%} of the time of all cores in the pool, which also decodes and
measures samples and runs the toy.

| part | seconds |
| --- | ---: |
{rows}
| **all** | **{found.total:.0f}** |
"""


if __name__ == "__main__":
    main()
