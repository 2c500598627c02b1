"""What the sections of params.yaml are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Epochs = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # more is a slip of the hand, or meant to fill the memory
NotNegativeCount = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]  # what every random generator takes, with an index added
NAME = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
RunName = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A part of params.yaml: unknown fields, infinity and NaN are refused, types are not coerced, nothing changes."""

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
