"""Modules that are imported when they are first used, so that what does not need them starts at once."""

import importlib
from typing import Any


class Lazy:
    """A module of this package, imported on the first look into it.

    The standard library's LazyLoader stands in sys.modules meanwhile, which packages whose parts import each other do
    not survive.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
