"""Base class and field types of the sections of params.yaml."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Epochs = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # larger numbers are typing errors or exhaust the memory
NotNegativeCount = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]  # valid for every random generator, plus an index
NAME = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
RunName = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A section of params.yaml: frozen, without unknown fields, type coercion, infinity and NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def deep_merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by `own`: mappings merge field by field, everything else, lists too, is replaced."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        merged[key] = deep_merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
