"""The text of `afm-pipe why RUN`: what happened to a run, and what to try."""

from afm_pipe.cli.status import progress_text
from afm_pipe.params import Params
from afm_pipe.reporting.status import RunStatus, run_status
from afm_pipe.training.events import Event

SHOWN = 12  # events
ADVICE = {
    "identity": (
        "G returns its noise nearly unchanged: the transport loss outweighs the adversarial loss. Lower "
        "transport.start or transport.decay_epochs, or check that gradient_normalization is enabled."
    ),
    "divergence": (
        "Halve lr, raise penalty.weight or transport.start, or set gradient_clip in the phases. With monitor.policy: "
        "act, a run returns to its last good state by itself."
    ),
    "not_finite": (
        "Halve lr, raise penalty.weight or transport.start, or set gradient_clip in the phases. The last checkpoint "
        "holds the weights before that update."
    ),
    "stagnation": (
        "D overpowers G. Start a phase with reload_ema: epoch, a lower lr and reload_discriminator (phases 2 and 3 of "
        "the paper), or use schedule: auto or monitor.policy: act."
    ),
    "collapse": (
        "Samples of a class, or of different classes, are too similar. Raise penalty.weight, keep a larger transport "
        "weight for longer (transport.end, transport.decay_epochs), or lower lr_discriminator in the phases; check the "
        "labels."
    ),
}
ADVICE["mode_collapse"] = ADVICE["collapse"]
FAILED = 3  # exit code for a run that needs a person


def why(params: Params, name: str) -> tuple[str, int]:
    """Return what happened to a run and what to try, and the exit code: `FAILED` if it needs a person, else 0."""
    status = run_status(params, name)
    lines = [f"{name}: {_headline(status)}"]
    if status.update and status.state != "finished":
        lines.append(f"Update {progress_text(status)}, phase {status.phase}.")
    if status.events:
        lines += ["", "What happened:"] + [f"  {_event_text(event)}" for event in status.events[-SHOWN:]]
        if len(status.events) > SHOWN:
            lines.insert(-SHOWN, f"  {len(status.events) - SHOWN} earlier events, then:")
    lines += _last_row(status)
    if status.damaged:
        lines.append(f"{status.damaged} unreadable lines of its logs were skipped.")
    advice = _advice(status, name in params.guided)
    if advice:
        lines += ["", "What to try:"] + [f"  {text}" for text in advice]
    return "\n".join(lines), FAILED if status.state == "failed" else 0


def _headline(status: RunStatus) -> str:
    if status.state == "finished":
        note = f" ({status.note})" if status.note else ""
        count = len(status.alarms)
        alarms = f"with {count} alarm{'s' * (count > 1)}" if count else "without alarms"
        return f"finished after {status.update:,} updates{note}, {alarms}."
    words = {
        "training": f"in training, {status.note}.",
        "stopped": "stopped before its end; no process trains it.",
        "failed": f"failed at update {status.events[-1].update if status.events else status.update:,}: {status.note}.",
        "waiting": f"not begun: waiting {status.note}.",
        "not begun": "not begun.",
        "outdated": f"{status.note}; its model is not the one that params describe now.",
    }
    return words[status.state]


def _event_text(event: Event) -> str:
    values = {name: value for name, value in event.evidence.items() if value is not None}
    errors = {name: f" ± {values[f'{name}_error']:.2g}" for name in values if f"{name}_error" in values}
    shown = (name for name in values if not (name.endswith("_error") and name.removesuffix("_error") in errors))
    evidence = ", ".join(f"{name} {values[name]:.4g}{errors.get(name, '')}" for name in shown)
    action = f"; {event.action}" if event.action else ""
    return f"update {event.update:,}: {event.kind}: {event.text}" + (f" [{evidence}]" if evidence else "") + action


def _last_row(status: RunStatus) -> list[str]:
    """Describe the last row of the curves."""
    last = status.last_row
    if last is None:
        return []
    names = {
        "d_accuracy": "D accuracy {:.0%}",
        "logit_gap": "logit gap {:.2f}",
        "transport_rms": "transport distance {:.2f}",
        "transport": "transport weight {:.3g}",
        "lr": "lr {:.2g}",
    }
    found = [text.format(last[name]) for name, text in names.items() if name in last]
    return ["", f"Last row of the curves, update {int(last['update']):,}: {', '.join(found)}."]


def _advice(status: RunStatus, guided: bool) -> list[str]:
    command = f"afm-pipe {'guide' if guided else 'train'} {status.name}"
    stage = f"dvc repro {'guide' if guided else 'train'}@{status.name}"
    if status.state == "waiting":
        return [f"{stage}, which runs the missing stages first."]
    if status.state in ("not begun", "outdated"):
        return [f"{stage}, or {command} outside DVC."]
    advice = [ADVICE[kind] for kind in dict.fromkeys(event.kind for event in status.alarms) if kind in ADVICE]
    if status.state == "failed":
        return advice[-1:] + [f"Then {stage}: with changed params the run starts again."]
    if status.state == "stopped":
        return [f"{command}: it resumes where it stopped.", *advice]
    return advice
