"""Training objectives: one module each, looked up by name (`params.objectives`)."""

import importlib
from typing import TYPE_CHECKING, Any, TypeVar

from afm_pipe.params.objectives import OBJECTIVES
from afm_pipe.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from afm_pipe.models.model_files import ModelConfig
    from afm_pipe.objectives.base import Objective
    from afm_pipe.params import Run

_registered: dict[str, "type[Objective]"] = {}
T = TypeVar("T", bound="type[Objective]")


def register(objective: T) -> T:
    """Class decorator that registers an objective by its name."""
    _registered[objective.name] = objective
    return objective


def find_objective(name: str) -> Any:
    """Return the class of an objective. Raises UserError for an unknown name."""
    if name not in _registered and name in OBJECTIVES:
        importlib.import_module(OBJECTIVES[name])
    if name not in _registered:
        raise UserError(f"Found no objective {name!r}, expected one of {', '.join(OBJECTIVES)}.")
    return _registered[name]


def build_objective(run: "Run", config: "ModelConfig", classifier: "nn.Module | None" = None) -> "Objective":
    """Build the objective of a run for its model; phases with guidance need the `classifier`."""
    return find_objective(run.objective)(run, config, classifier)
