"""A live page of the runs in training, rewritten every few seconds; the browser reloads it, without a server.

It is written into work/, which DVC and git ignore.
"""

import time
from pathlib import Path

from afm_pipe.params import Params
from afm_pipe.reporting import curves, titles
from afm_pipe.reporting.inputs import RunRecord, columns_of
from afm_pipe.reporting.page import render
from afm_pipe.reporting.status import by_age
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import atomic_path
from afm_pipe.training.curves import scan_curves
from afm_pipe.training.events import FILE, scan_events

PAGE = paths.WORK / "watch.html"
ALIVE = 120.0  # seconds without a row after which a run is called quiet


def watch(params: Params, seconds: float, rounds: int | None = None) -> None:
    """Rewrite the page every `seconds`, `rounds` times or until interrupted."""
    done = 0
    while rounds is None or done < rounds:
        time.sleep(seconds if done else 0)
        with atomic_path(PAGE) as temp:
            temp.write_text(watch_page(params, seconds, time.time()), encoding="utf-8")
        done += 1


def watch_page(params: Params, seconds: float, now: float) -> str:
    """Return the page: progress and curves of every run that has training state."""
    newest = {path.parent.parent.name: (changed, path) for changed, path in by_age(paths.WORK.glob("*/*/curves.csv"))}
    records, facts, per_epoch = [], [], 1
    for name, (changed, path) in newest.items():
        if name not in params.models:
            continue  # of other params
        rows, _ = scan_curves(path)
        facts.append((name, *_progress(params, path, rows[-1]["epoch"] if rows else 0.0, now - changed)))
        if rows:
            per_epoch = round(rows[-1]["images"] / rows[-1]["epoch"])
            records.append(RunRecord(name, params.models[name], columns_of(rows)))
    return render(
        "watch.html.j2",
        PAGE.parent,
        seconds=f"{seconds:g}",
        written=time.strftime("%H:%M:%S", time.localtime(now)),
        facts=facts,
        legend=curves.legend(records),
        panels=curves.draw_panels(records, per_epoch),
    )


def _progress(params: Params, path: Path, epoch: float, age: float) -> tuple[str, str]:
    """Return a run's progress and its state `age` seconds after its last row.

    An automatic schedule may end it before its last epoch.
    """
    until = params.models[path.parent.parent.name].phases[-1].until_epoch
    events, _ = scan_events(path.parent / FILE)
    state = "running" if age < ALIVE else f"quiet for {titles.duration(age)}"
    if epoch >= until - 1e-6 or (events and events[-1].kind == "stop"):
        state = "finished"
    return f"epoch {epoch:.2f} of {until:g}", state
