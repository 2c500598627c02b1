"""Keys of params.yaml that version 0.1 named differently, for the error that names the new key and for `migrate`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

RENAMED = {  # the last parts of the old path: the new key
    ("centring",): "logit_centering",
    ("watch",): "monitor",
    ("penalty", "share"): "batch_fraction",
    ("identity", "move"): "transport_rms",
    ("divergence", "scale"): "output_scale",
    ("collapse", "right_class"): "class_accuracy",
    ("tables", "watch_healthy"): "monitor_healthy",
    ("tables", "watch_provoked"): "monitor_provoked",
}
ADDED = {("train", "objective"): "adversarial_flow"}  # section and key: the value that version 0.1 implied
USER_NAMED = {"runs", "guided", "imported", "tables", "settings"}  # their keys are names, not fields

Path = tuple[str | int, ...]


class OldKey(NamedTuple):
    """A key of version 0.1 and its new name, or a required key that version 0.1 did not have and its value."""

    path: Path
    new: str
    added: bool = False

    def __str__(self) -> str:
        dotted = ".".join(map(str, self.path))
        return f"{dotted}: found nothing, expected {self.new}" if self.added else f"{dotted}: now called {self.new}"


def old_keys(raw: dict[str, Any]) -> list[OldKey]:
    """Return the keys of a parsed params file that the current version names differently or requires."""
    added = [
        OldKey((section, key), value, added=True)
        for (section, key), value in ADDED.items()
        if isinstance(raw.get(section), dict) and key not in raw[section]
    ]
    return [*_renamed(raw, ()), *added]


def _renamed(value: Any, path: Path) -> Iterator[OldKey]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        here = (*path, key)
        for old, new in RENAMED.items():
            if here[-len(old) :] == old and not (len(old) == 1 and path[-1:] and path[-1] in USER_NAMED):
                yield OldKey(here, new)
        yield from _renamed(inner, here)
