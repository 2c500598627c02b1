"""A page of what is training now, written anew every few seconds; the browser reloads it by itself, without a server.

It lies under work/, not in the report: DVC and git know nothing of it.
"""

import time
from pathlib import Path

from markupsafe import Markup

from afm_pipe.params import Params
from afm_pipe.reporting import curves, titles
from afm_pipe.reporting.inputs import RunRecord, columns_of
from afm_pipe.reporting.page import environment
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import atomic_path
from afm_pipe.training.curves import scan_curves
from afm_pipe.training.events import FILE, scan_events

PAGE = paths.WORK / "watch.html"
ALIVE = 120.0  # seconds without a row after which a training is called quiet


def watch(params: Params, seconds: float, rounds: int | None = None) -> None:
    """Write the page every so many seconds, until interrupted, or so many times."""
    done = 0
    while rounds is None or done < rounds:
        with atomic_path(PAGE) as aside:
            aside.write_text(watch_page(params, seconds, time.time()), encoding="utf-8")
        done += 1
        if rounds is None or done < rounds:
            time.sleep(seconds)


def watch_page(params: Params, seconds: float, now: float) -> str:
    """Return the page: every run with unfinished or finished work, newest rows, its curves."""
    found = {path.parent.parent.name: path for path in _newest_last()}
    records, facts, per_epoch = [], [], 1
    for name, path in found.items():
        if name not in params.models:
            continue  # of other params; their settings are not known
        curve = columns_of(scan_curves(path)[0])
        events, _ = scan_events(path.parent / FILE)
        stopped = bool(events) and events[-1].kind == "stop"
        facts.append(_fact(params, name, curve, now - path.stat().st_mtime, stopped))
        if curve.get("images"):
            per_epoch = round(curve["images"][-1] / curve["epoch"][-1])
            records.append(RunRecord(name, params.models[name], curve))
    return (
        environment()
        .get_template("watch.html.j2")
        .render(
            css=Markup(f"{curves.palette_css()}\n{curves.PANEL_CSS}"),
            seconds=f"{seconds:g}",
            written=time.strftime("%H:%M:%S", time.localtime(now)),
            facts=facts,
            legend=[(record.name, Markup(curves.legend_key(index))) for index, record in enumerate(records)],
            panels=curves.draw_panels(records, per_epoch),
        )
    )


def _newest_last() -> list[Path]:
    return sorted(paths.WORK.glob("*/*/curves.csv"), key=lambda path: path.stat().st_mtime)


def _fact(params: Params, name: str, curve: dict[str, list[float]], age: float, stopped: bool) -> tuple[str, str, str]:
    """Return a run's name, how far it is, and whether it moves; it may have `stopped` early by itself."""
    until = params.models[name].phases[-1].until_epoch
    epoch = curve["epoch"][-1] if curve.get("epoch") else 0.0
    far = f"epoch {epoch:.2f} of {until:g}"
    if stopped or epoch >= until - 1e-6:
        return name, far, "finished"
    return name, far, "running" if age < ALIVE else f"quiet for {titles.duration(age)}"
