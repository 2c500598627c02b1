"""Base class and field types of the sections of params.yaml."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Epochs = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # larger numbers are typos or exhaust the memory
NotNegativeCount = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]  # leaves room for adding an index, for every random generator
NAME = r"^([a-z][a-z0-9_-]{0,63}|0|[1-9][0-9]{0,63})$"
NAME_RULE = (
    f"expected text that should match pattern {NAME}, a name that DVC can address (dvc exp run -S runs.NAME.lr=...): a "
    "letter, then at most 63 lowercase letters, digits, dashes and underscores, without dots; or a number"
)
EMPTY = BeforeValidator(lambda value: {} if value is None else value)
"""YAML reads a section without lines, `t4:`, as null: it sets nothing."""
NULLABLE = {"selection", "flow"}
"""Sections of a run that null turns off; over any other, it is an empty section."""


def _listed(value: Any) -> Any:
    if value is None:
        raise ValueError("expected {} where there are none, since DVC goes through this section; found nothing")
    return value


LISTED = BeforeValidator(_listed)
"""Of sections that dvc.yaml goes through by `foreach`."""
RunName = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A section of params.yaml: frozen; rejects unknown fields, type coercion, infinity and NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, raw: Any) -> Any:
        return {} if raw is None else raw


def deep_merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `overrides`: mappings merge key by key; all other values, including lists, are replaced.

    Null over a mapping is an empty section, which changes nothing, except where null is a value of its own.
    """
    merged = dict(base)
    for key, value in overrides.items():
        old = base.get(key)
        if value is None and isinstance(old, dict) and key not in NULLABLE:
            continue
        merged[key] = deep_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
