"""Migrate a params file of version 0.1 in place: rename and add keys, keep comments and layout."""

from pathlib import Path
from typing import Any

import yaml

from afm_pipe.params.file import Loader, parse, read, validate
from afm_pipe.params.profiles import keep_copy
from afm_pipe.params.renames import OldKey, old_keys
from afm_pipe.runtime.files import atomic_path


def migrate(path: Path) -> tuple[list[OldKey], Path | None]:
    """Migrate a params file; return the changed keys and the path of a copy of the old file.

    Raises UserError, and writes nothing, if the result is invalid.
    """
    text = read(path)
    keys = old_keys(parse(text, path))
    migrated = _edited(text, keys)
    validate(parse(migrated, path), path)
    if not keys:
        return [], None
    kept = keep_copy(path, "migrate")
    with atomic_path(path) as temp:
        temp.write_text(migrated, encoding="utf-8", newline="")
    return keys, kept


def _edited(text: str, keys: list[OldKey]) -> str:
    root: Any = yaml.compose(text, Loader)
    edits = []  # start, end, replacement
    for key in keys:
        *parents, name = key.path
        section = _value_at(root, parents)
        if key.added and section.flow_style:  # an empty section is {}
            start = section.start_mark.index + 1
            edits.append((start, start, f"{name}: {key.new}, "))
        elif key.added:
            first = section.value[0][0].start_mark
            edits.append((first.index, first.index, f"{name}: {key.new}\n{' ' * first.column}"))
        else:
            (old,) = (node for node, _ in section.value if node.value == name)
            edits.append((old.start_mark.index, old.end_mark.index, key.new))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def _value_at(node: Any, path: list[str | int]) -> Any:
    for part in path:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[part]
        else:
            node = next(value for key, value in node.value if key.value == str(part))
    return node
