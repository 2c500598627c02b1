"""Exceptions that a user sees as one message, without a stack trace."""

from collections.abc import Mapping
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
    "too_short": "at least {min_length} in this list or section",
    "too_long": "at most {max_length} in this list",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text like {pattern}",
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


def describe_mistake(problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as "found ..., expected ...", naming no class; a check's own message as it is."""
    kind, found = problem["type"], problem["input"]
    if kind == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    message = problem["msg"].replace("Input should be ", "")
    expected = (
        _EXPECTED.get(kind, message).format(**problem.get("ctx", {})).replace(r"^[0-9a-f]{64}$", "0-9a-f, 64 times")
    )
    note = ""
    if kind in ("string_type", "invalid_key") and not isinstance(found, list | dict):
        note = "; write it in quotes"
    elif kind in ("float_type", "int_type") and isinstance(found, str) and _is_number(found):
        note = f"; this is text: write {float(found):g} without quotes"
    return f"found {'nothing' if kind == 'missing' else show_value(found)}, expected {expected}{note}"


def show_value(value: Any) -> str:
    """Return a value of a YAML or JSON file as text of bounded length."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, dict):
        text = "a section"
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
