"""Which code, interpreter and launch settings a stage runs with: those beside its script, those of `dvc`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BIN = Path(sys.executable).parent
BARE = os.environ | {"PATH": "/usr/bin:/bin"}
BARE.pop("PYTHONPATH", None)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A tree of its own, whose package says from where it is imported, also in a spawned process."""
    root = tmp_path / "a copy"
    shutil.copytree(ROOT / "stages", root / "stages")
    (root / "afm_pipe").mkdir()
    (root / "afm_pipe" / "__init__.py").write_text("print('imported', __file__, flush=True)\n")
    (root / "stages" / "x.py").write_text(
        "import _tree, sys, multiprocessing\nimport afm_pipe\n"
        "if __name__ == '__main__':\n"
        "    print(sys.executable, flush=True)\n"
        "    multiprocessing.get_context('spawn').Process(target=print, args=('child',)).start()\n"
        "    import subprocess; subprocess.run([sys.executable, '-c', 'import afm_pipe'], cwd='/')\n"
    )
    return root


def run(*words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("stage", sorted(path.name for path in (ROOT / "stages").glob("[a-z]*.py")))
def test_every_stage_first_imports_what_selects_its_code(stage: str) -> None:
    lines = (ROOT / "stages" / stage).read_text().splitlines()
    assert next(line for line in lines if line.startswith(("import ", "from "))).startswith("import _tree")


def test_the_code_beside_a_stage_runs_also_in_its_children(copy: Path, tmp_path: Path) -> None:
    other = os.environ | {"PYTHONPATH": str(ROOT)}  # stands for the editable install
    lines = run(sys.executable, copy / "stages" / "x.py", cwd=tmp_path, env=other).splitlines()
    imported = [line for line in lines if line.startswith("imported")]
    assert imported == [f"imported {copy / 'afm_pipe' / '__init__.py'}"] * 3


def test_dvc_called_by_its_path_runs_stages_in_its_own_interpreter(copy: Path) -> None:
    bare = Path("/usr/bin/python3")
    if not bare.exists() or not (BIN / "dvc").exists():
        pytest.skip("needs a second Python, and dvc beside the first")
    (copy / "bin").mkdir()
    (copy / "bin" / "python").symlink_to(bare)
    env = BARE | {"PATH": f"{copy / 'bin'}:/usr/bin:/bin"}
    run("git", "init", "-q", cwd=copy, env=env)
    run(BIN / "dvc", "init", "-q", cwd=copy, env=env)
    (copy / "dvc.yaml").write_text("stages:\n  x:\n    cmd: python stages/x.py\n")
    said = run(BIN / "dvc", "repro", cwd=copy, env=env)
    assert f"\n{BIN / 'python'}" in said, said


def test_an_interpreter_without_the_packages_uses_the_environment_beside_the_stages_or_says_so(copy: Path) -> None:
    bare = [Path("/usr/bin/python3"), "-S", copy / "stages" / "x.py"]
    if not bare[0].exists():
        pytest.skip("needs a second Python")
    said = run(*bare, cwd=copy, env=BARE)
    assert "without the package's dependencies (typer): run `make repro`, or activate" in said
    assert "Traceback" not in said
    (copy / ".venv").symlink_to(BIN.parent)
    assert str(copy / ".venv" / "bin" / "python") in run(*bare, cwd=copy, env=BARE)
