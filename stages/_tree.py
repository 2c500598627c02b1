"""Import this first in every stage: it runs the code beside it, in the interpreter that `dvc` runs in.

`dvc exp run --queue` and `--temp` run stages in a copy of the workspace, while an editable install would import the
workspace. `/path/.venv/bin/dvc repro` leaves `python` to PATH. Imports the standard library only.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANCESTORS = 3  # dvc runs a stage through a shell, and a shim may start Python


def _dvc_python() -> str | None:
    """Return the interpreter of the `dvc` that runs this stage, where /proc tells."""
    pid = os.getppid() if "DVC_STAGE" in os.environ else 0
    for _ in range(ANCESTORS):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return None
        if "dvc" in (Path(argument).name for argument in arguments[1:3]) and "python" in Path(arguments[0]).name:
            return arguments[0]
    return None


def _installed() -> str | None:
    """Return the interpreter of the environment that `make repro` creates, if this one lacks the packages."""
    return None if importlib.util.find_spec("typer") else str(ROOT / ".venv" / "bin" / "python")


def _has_package(python: str) -> bool:
    """Return whether an interpreter's environment has this package: dvc alone may come from elsewhere, as by pipx."""
    return os.access(python, os.X_OK) and Path(python).with_name("afm-pipe").exists()


for _python in (_dvc_python(), _installed()):
    if _python and Path(_python).parent != Path(sys.executable).parent and _has_package(_python):
        os.execv(_python, [_python, *sys.argv])
if not importlib.util.find_spec("typer"):
    raise SystemExit(
        f"error: Found {sys.executable} without the package's dependencies (typer): run `make repro`, or activate the "
        "environment that dvc is installed in, and run dvc again."
    )
if (ROOT / "afm_pipe" / "__init__.py").is_file():  # not in a study's folder, which has params and stages alone
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of children
