"""Keys of params.yaml that changed since version 0.1, for error messages and for `migrate`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

RENAMED = {  # suffix of the old path: new key
    ("centring",): "logit_centering",
    ("watch",): "monitor",
    ("penalty", "share"): "batch_fraction",
    ("identity", "move"): "transport_rms",
    ("divergence", "scale"): "output_scale",
    ("collapse", "right_class"): "class_accuracy",
    ("tables", "watch_healthy"): "monitor_healthy",
    ("tables", "watch_provoked"): "monitor_provoked",
}
ADDED = {  # path of a required key that version 0.1 did not have: the implied or the usual value
    ("data", "orientation"): "ignore",
    ("held_out",): "null",
    ("train", "objective"): "adversarial_flow",
    ("train", "discriminator_updates"): "1",
    ("train", "keep_discriminators"): "[]",
    ("train", "selection"): "null",
    ("train", "penalty", "precision"): "fp32",
    ("train", "monitor", "significance"): "2.33",
    ("train", "monitor", "probe", "batch_size"): "64",
    ("train", "monitor", "probe", "width"): "24",
    ("train", "monitor", "collapse", "drop"): "0.3",
    ("train", "monitor", "auto", "transport"): "0.001",
    ("reference", "class_shares"): "data",
    ("toy", "strong_discriminator"): "null",
}
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
    return [*_renamed(raw, ()), *_added(raw)]


def _added(raw: dict[str, Any]) -> Iterator[OldKey]:
    old_names = {new: old[0] for old, new in RENAMED.items() if len(old) == 1}
    for (*sections, key), value in ADDED.items():
        here: Any = raw
        path: Path = ()
        if not sections and not isinstance(raw.get("data"), dict):
            continue  # no params file: other messages say so
        for section in sections:
            found = isinstance(here, dict) and next((n for n in (section, old_names.get(section)) if n in here), None)
            if not found:
                break
            here, path = here[found], (*path, found)
        else:
            if isinstance(here, dict) and key not in here:
                yield OldKey((*path, key), value, added=True)


def _renamed(value: Any, path: Path) -> Iterator[OldKey]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        here = (*path, key)
        for old, new in RENAMED.items():
            if here[-len(old) :] == old and not (len(old) == 1 and path[-1:] and path[-1] in USER_NAMED):
                yield OldKey(here, new)
        yield from _renamed(inner, here)
