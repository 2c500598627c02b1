"""Base class and field types of the sections of params.yaml."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Epochs = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # larger numbers are typos or exhaust the memory
NotNegativeCount = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]  # leaves room for adding an index, for every random generator
NAME = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
RunName = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A section of params.yaml: frozen; rejects unknown fields, type coercion, infinity and NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def deep_merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `overrides`: mappings merge key by key; all other values, including lists, are replaced."""
    merged = dict(base)
    for key, value in overrides.items():
        old = base.get(key)
        merged[key] = deep_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
