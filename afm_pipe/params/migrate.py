"""Migrate a params file of version 0.1 in place: rename and add keys, keep comments and layout."""

import json
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode, SequenceNode

from afm_pipe.params.file import parse, read, validate
from afm_pipe.params.profiles import keep_copy
from afm_pipe.params.renames import OldKey, old_keys
from afm_pipe.params.yaml import compose_yaml
from afm_pipe.runtime.files import atomic_path

STRING_TAG = "tag:yaml.org,2002:str"


def migrate(path: Path) -> tuple[list[OldKey], Path | None]:
    """Migrate a params file; return the changed keys and the path of a copy of the old file.

    Raises UserError, and writes nothing, if the result is invalid.
    """
    text = read(path)
    parse(text, path)
    quoted = _with_quoted_keys(text)
    keys = old_keys(parse(quoted, path))
    migrated = _edited(quoted, keys)
    validate(parse(migrated, path), path)
    if migrated == text:
        return [], None
    kept = keep_copy(path, "migrate")
    with atomic_path(path) as temp:
        temp.write_text(migrated, encoding="utf-8", newline="")
    return keys, kept


def _with_quoted_keys(text: str) -> str:
    """Quote keys such as 5e-4, which are text in YAML 1.1 and numbers in YAML 1.2."""
    nodes, keys = [compose_yaml(text)], []
    for node in nodes:
        if isinstance(node, MappingNode):
            keys += [key for key, _ in node.value if key.tag != STRING_TAG and key.value != "<<"]
            nodes += [value for _, value in node.value]
        elif isinstance(node, SequenceNode):
            nodes += node.value
    return _replaced(text, [(key.start_mark.index, key.end_mark.index, json.dumps(key.value)) for key in keys])


def _edited(text: str, keys: list[OldKey]) -> str:
    root: Any = compose_yaml(text)
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
    return _replaced(text, edits)


def _replaced(text: str, edits: list[tuple[int, int, str]]) -> str:
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def _value_at(node: Any, path: list[str | int]) -> Any:
    for part in path:
        if isinstance(node, SequenceNode):
            node = node.value[part]
        else:
            node = next(value for key, value in node.value if key.value == str(part))
    return node
