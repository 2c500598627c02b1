"""Exceptions that a user sees as one message, without a stack trace."""

import os
import pwd
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_SHOWN = 60  # characters of a value
_EXPECTED = {  # pydantic's kind of error: what it expects, in the words of YAML and JSON
    "model_type": "a section of fields",
    "dict_type": "a section",
    "tuple_type": "a list",
    "list_type": "a list",
    "none_required": "null",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_parsing": "a valid integer",
    "float_parsing": "a valid number",
    "string_type": "text",
    "invalid_key": "a name that is text",
    "missing": "a value",
    "too_short": "a list or section of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "extra_forbidden": "no such field",
}


class UserError(ValueError):
    """A mistake that the user can fix: the message says what was found, what was expected, and what to do."""


class UnwritableError(UserError):
    """The disk is full or not writable; existing files are intact."""


class NotFiniteError(UserError):
    """A non-finite loss at an update: the run has diverged."""

    def __init__(self, message: str, update: int) -> None:
        super().__init__(message)
        self.update = update


class RankLostError(UserError):
    """Another process of the group ended while this one waited for it."""


def describe_denied(error: PermissionError) -> str:
    """Return one line that names the path, the operation and the user of a denied permission."""
    named = re.search(r"name = '([^']+)'", str(error))  # h5py sets no filename
    path = Path(error.filename or (named[1] if named else ""))
    if not path.name:
        return f"Found a file without the permission to use it ({error}), as {_user()}: fix its permissions."
    if not os.path.lexists(path):
        denied = next(parent for parent in path.parents if os.path.lexists(parent))
        operation = f"write to, which {path} needs" if _may(denied, os.X_OK) else f"enter, which {path} needs"
    else:
        denied, readable = path, _may(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)
        operation = "write to" if readable else "list" if path.is_dir() else "read"
    return f"Found {denied}, which {_user()} may not {operation}: fix its permissions (ls -ld {denied}) or its owner."


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _user() -> str:
    try:
        return f"user {pwd.getpwuid(os.geteuid()).pw_name}"
    except KeyError:  # no entry in the password database, as in many containers
        return f"user {os.geteuid()}"


def describe_mistake(problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as "found ..., expected ...", naming no class; a check's own message as it is."""
    kind, found = problem["type"], problem["input"]
    if kind == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    message = problem["msg"].replace("Input should be ", "").replace("String should", "text that should")
    expected = _EXPECTED[kind].format(**problem.get("ctx", {})) if kind in _EXPECTED else message
    note = ""
    if kind in ("string_type", "invalid_key") and not isinstance(found, list | dict):
        note = "; write it in quotes"
    elif kind in ("float_type", "int_type") and isinstance(found, str) and _is_number(found):
        note = f"; this is text: write {float(found):g} without quotes"
    elif kind == "int_type" and isinstance(found, float) and found.is_integer():
        note = f"; write {int(found)}"  # YAML reads 1e4 as a float
    return f"found {'nothing' if kind == 'missing' else show_value(found)}, expected {expected}{note}"


def show_value(value: Any) -> str:
    """Return a value of a YAML or JSON file as text of bounded length."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, dict):
        text = "a section" if value else "an empty section"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(map(show_value, value[:MAX_SHOWN]))}]"
    elif isinstance(value, int) and value.bit_length() > 4 * MAX_SHOWN:
        text = f"a number of {value.bit_length()} bits"
    else:
        text = repr(value) if isinstance(value, str | int | float) else str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
