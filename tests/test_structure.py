"""The rooms of the package: what lies where, and that imports go one way."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "afm_pipe"
ORDER = (
    *("runtime", "params", "distributed", "data", "autoencoders", "models", "objectives", "training", "sampling"),
    *("evaluation", "study", "planning", "reporting", "pipeline", "cli"),
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield every module of this package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if is_module(whole) else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def is_module(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def own_imports(path: Path) -> list[str]:
    return [name for name in imported(path) if name.split(".")[0] == "afm_pipe"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_root_holds_packages_only() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_only_from_rooms_before(room: str) -> None:
    allowed = {*ORDER[: ORDER.index(room) + 1], "__version__", "afm_pipe"}
    wrong = {
        f"{name_of(path)} -> {name}"
        for path in (PACKAGE / room).rglob("*.py")
        for name in own_imports(path)
        if name.partition(".")[2].split(".")[0] not in allowed and name != "afm_pipe"
    }
    assert not wrong


def test_no_cycle_between_modules() -> None:
    graph = {name_of(path): {name for name in own_imports(path) if name != name_of(path)} for path in MODULES}
    seen: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name in seen or name not in graph:
            return
        for each in graph[name]:
            visit(each, (*above, name))
        seen.add(name)

    for name in graph:
        visit(name, ())


def test_the_lock_file_pins_all_that_is_installed_for_the_package() -> None:
    script = [sys.executable, ROOT / ".ci" / "lock.py"]
    found = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in lines), "no paths, URLs or local builds"
    names = {line.partition("==")[0] for line in found if not line.startswith("#")}
    assert names - {line.partition("==")[0] for line in lines} == set(), "run `make lock`"
