"""Notices that a stage prints, a line each: unused working state, and results of other source code."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from afm_pipe.params.versions import code_notice, recorded_code
from afm_pipe.runtime.environment import env_rank
from afm_pipe.runtime.files import json_value


def begin_work(folder: Path, stage: str) -> dict[str, str]:
    """Return the code that began the working state in `folder`, which is named by its identity; begin it if it is new.

    Prints which states of other identities are beside it, and whether other source code began this one.
    """
    siblings = [path for path in folder.parent.glob("*/") if re.fullmatch("[0-9a-f]{16}", path.name)]
    if not folder.exists():
        notice_unused(siblings)
    code = recorded_code(folder, stage)
    notice_code([(str(folder), code)])
    return code


def notice_model(folder: Path) -> None:
    """Print a notice if a model was made by source code that differs from today's under an equal version."""
    notice_code([(str(folder), json_value(folder / "config.json", "provenance", "code"))])


def notice_code(recorded: Iterable[tuple[str, Any]]) -> None:
    """Print which results, given as (name, recorded code), were made by other source code under an equal version."""
    line = code_notice((name, code) for name, code in recorded if code is not None)
    if line is not None and env_rank() == 0:
        print(line)


def notice_unused(others: Sequence[Path]) -> None:
    """Print which unfinished work has another identity or is of version 0.1: it is neither resumed nor removed."""
    if others and env_rank() == 0:
        names = ", ".join(str(path) for path in sorted(others))
        print(f"Not resumed: {names}, of other params, data or versions. Remove what you no longer need.")
