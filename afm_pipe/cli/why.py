"""What `afm-pipe status` and `afm-pipe why` say of runs, in plain words."""

from collections.abc import Sequence

from afm_pipe.params import Params
from afm_pipe.reporting.status import Event, Standing, finite, printable, standing, standings, trials_line

SHOWN = 12  # events
ADVICE = {
    "identity": (
        "G returns its noise nearly unchanged: the transport loss outweighs the adversarial one. Lower transport.start "
        "or let it decay sooner (transport.decay_epochs), or check that gradient_normalization is enabled."
    ),
    "divergence": (
        "Lower lr (halve it), raise penalty.weight, or raise transport.start; set phases' gradient_clip; with "
        "watch.policy: act a run goes back to its last good state by itself."
    ),
    "not_finite": (
        "Lower lr (halve it), raise penalty.weight or transport.start, or set phases' gradient_clip. The weights "
        "before that update are in the last checkpoint."
    ),
    "stagnation": (
        "D has overpowered G. Begin a phase with reload_ema: epoch, a lower lr and reload_discriminator (paper, phases "
        "2 and 3), or let schedule: auto or watch.policy: act do it."
    ),
    "collapse": (
        "Samples of a class, or those of different classes, are too much alike. Raise penalty.weight, keep more "
        "transport for longer (transport.end, transport.decay_epochs), or lower D's rate (phases' lr_discriminator); "
        "check that labels are right."
    ),
}
ADVICE["mode_collapse"] = ADVICE["collapse"]
FAILED = 3  # exit code of `why` for a run that needs a person


def status_text(params: Params) -> str:
    """Return a table of all runs, and a line on the trials of tables."""
    from afm_pipe.runtime.tables import table_text

    header = ["run", "state", "phase", "updates", "left", "health", "last event", "note"]
    rows = []
    for each in standings(params):
        last = each.events[-1] if each.events else None
        rows.append(
            [
                each.name,
                each.state,
                each.phase,
                _progress(each),
                _duration(each.seconds_left) if each.seconds_left is not None else "-",
                each.health,
                f"{last.kind} at {last.update:,}" if last else "-",
                each.why if len(each.why) <= 60 else f"{each.why[:57]}...",
            ]
        )
    line = trials_line(params)
    return table_text(header, rows).replace("\n\n", "\n").strip("\n") + (f"\n  {line}" if line else "")


def why(params: Params, name: str) -> tuple[str, int]:
    """Return what happened to a run and what to try, and an exit code: `FAILED` where it needs a person, else 0."""
    each = standing(params, name)
    lines = [f"{name}: {_headline(each)}"]
    if each.update and each.state != "finished":
        lines.append(f"It is at update {_progress(each)}, phase {each.phase}.")
    if each.events:
        lines += ["", "What happened:"] + [f"  {_told(event)}" for event in each.events[-SHOWN:]]
        if len(each.events) > SHOWN:
            lines.insert(-SHOWN, f"  {len(each.events) - SHOWN} earlier events, then:")
    lines += _figures(each)
    if each.unread:
        lines.append(f"{each.unread} lines of its logs could not be read and were passed over.")
    advice = _advice(each, name in params.guided)
    if advice:
        lines += ["", "What to try:"] + [f"  {text}" for text in advice]
    return "\n".join(lines), FAILED if each.state == "failed" else 0


def _headline(each: Standing) -> str:
    if each.state == "finished":
        note = f" ({each.why})" if each.why else ""
        if each.alarms:
            return f"finished after {each.update:,} updates{note}, with {len(each.alarms)} alarms on the way."
        return f"finished after {each.update:,} updates{note}; no alarm was raised."
    words = {
        "training": f"being trained now, {each.why}.",
        "stopped": "begun and stopped; nobody trains it now.",
        "failed": f"failed at update {each.events[-1].update if each.events else each.update:,}: {each.why}.",
        "waiting": f"not begun; it waits {each.why}.",
        "not begun": "not begun.",
        "outdated": f"{each.why}; its model is in place, but is not what params describe now.",
    }
    return words[each.state]


def _told(event: Event) -> str:
    evidence = ", ".join(f"{printable(k)} {v:.4g}" for k, v in event.evidence.items() if v is not None)
    action = f"; {printable(event.action)}" if event.action else ""
    return f"update {event.update:,}: {event.kind}: {event.text}" + (f" [{evidence}]" if evidence else "") + action


def _figures(each: Standing) -> list[str]:
    """Say what the curves show at their end."""
    rows = list(finite(each.rows))
    if not rows:
        return []
    last = rows[-1]
    names = {
        "d_accuracy": "D tells {:.0%} of pairs apart",
        "logit_gap": "its logit gap is {:.2f}",
        "transport_rms": "G moves its noise by {:.2f} of its size",
        "transport": "transport weight {:.3g}",
        "lr": "lr {:.2g}",
    }
    said = [text.format(last[name]) for name, text in names.items() if name in last]
    return ["", f"Last row of the curves, update {int(last['update']):,}: {', '.join(said)}."]


def _advice(each: Standing, guided: bool) -> list[str]:
    command = f"afm-pipe {'guide' if guided else 'train'} {each.name}"
    stage = f"dvc repro {'guide' if guided else 'train'}@{each.name}"
    if each.state == "waiting":
        return [f"{stage}, which makes what it waits for first."]
    if each.state in ("not begun", "outdated"):
        return [f"{stage}, or {command} outside DVC."]
    advice = [ADVICE[kind] for kind in dict.fromkeys(event.kind for event in each.alarms) if kind in ADVICE]
    if each.state == "failed":
        return advice[-1:] + [f"Then {stage}: changed params begin anew under another fingerprint."]
    if each.state == "stopped":
        return [f"{command}: it goes on where it stopped.", *advice]
    return advice


def _progress(each: Standing) -> str:
    if each.total is None:
        return f"{each.update:,}" if each.update else "-"
    share = f" ({min(each.update / each.total, 1):.0%})" if each.total else ""
    return f"{each.update:,} of {each.total:,}{share}"


def _duration(seconds: float) -> str:
    parts: Sequence[tuple[float, str]] = ((86400, "d"), (3600, "h"), (60, "min"))
    return next((f"{seconds / size:.1f} {unit}" for size, unit in parts if seconds >= size), f"{seconds:.0f} s")
