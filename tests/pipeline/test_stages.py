"""Which code, interpreter and launch settings a stage runs with: those beside its script, those of `dvc`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMOKE

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


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--queue"], ["--temp"]])
def test_an_experiment_in_a_copy_runs_its_own_module_with_the_workspaces_launch_settings(
    how: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "the workspace"
    for folder in ("stages", "afm_pipe"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SMOKE, root / "params.yaml")
    (root / "stages" / "x.py").write_text(
        "import _tree\nimport afm_pipe.data.order as order\nfrom afm_pipe.distributed.launch import load_launch\n"
        "from afm_pipe.params.file import load_params\n"
        "print(getattr(order, 'MARK', 'none'), load_launch().workers, load_params().runs['t4'].lr, "
        "file=open('out.txt', 'w'))\n"
    )
    (root / "dvc.yaml").write_text(
        "stages:\n  x:\n    cmd: python stages/x.py\n    params: [runs]\n    metrics: [out.txt: {cache: false}]\n"
    )
    (root / ".gitignore").write_text("/launch.toml\n__pycache__\n")
    (root / "launch.toml").write_text("workers = 7\n")
    env = os.environ | {"PYTHONPATH": str(root), "PATH": f"{BIN}:{os.environ['PATH']}"}  # as an editable install
    env |= {f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def call(*words: str) -> str:
        return run(*words, cwd=root, env=env)

    call("git", "init", "-q")
    call("dvc", "init", "-q")
    call("git", "add", "-A")
    call("git", "commit", "-qm", "x")
    module = root / "afm_pipe" / "data" / "order.py"
    before = module.read_text()
    module.write_text(before + "MARK = 'its own'\n")
    if how == ["--queue"]:
        said = call("dvc", "exp", "run", "--queue", "-S", "+runs.t4.lr=0.00002", "--name", "other")
        module.write_text(before)
        said += call("dvc", "exp", "run", "--run-all")
    else:
        said = call("dvc", "exp", "run", "--temp", "-S", "+runs.t4.lr=0.00002", "--name", "other")
        module.write_text(before)
    assert (
        call("git", "show", f"{call('dvc', 'exp', 'list', '--sha-only').split()[-1]}:out.txt") == "its own 7 2e-05\n"
    ), said


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


@pytest.fixture
def unzipped(tmp_path: Path) -> Path:
    """A downloaded zip, in a folder with a space, with an environment whose programs print their words."""
    root = tmp_path / "a project"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".dvc").mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    for program in ("python", "dvc", "afm-pipe"):
        path = root / ".venv" / "bin" / program
        path.write_text('#!/bin/sh\necho ran "$0" "$@"\n')
        path.chmod(0o755)
    return root


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("scm", ["git", "none"])
def test_make_repro_runs_in_a_folder_with_a_space(unzipped: Path, scm: str) -> None:
    if scm == "git":
        run("git", "init", "-q", cwd=unzipped)
    else:
        (unzipped / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    said = run("make", "repro", cwd=unzipped)
    assert f"ran {unzipped}/.venv/bin/python -m pip install" in said
    assert f"ran {unzipped}/.venv/bin/dvc repro" in said and "rror" not in said


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_zip_without_git_says_what_is_missing_before_it_installs_anything(unzipped: Path) -> None:
    said = run("make", "repro", cwd=unzipped)
    assert "found no git repository, which DVC needs" in said and "git init" in said and "no_scm = true" in said
    assert "ran " not in said
    assert "found VENV=a b, expected a path without spaces" in run("make", "repro", "VENV=a b", cwd=unzipped)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_gpu_check_uses_the_environment_of_a_folder_with_a_space(unzipped: Path) -> None:
    assert f"ran {unzipped}/.venv/bin/python -m pytest benchmarks/gpu" in run("make", "test-gpu", cwd=unzipped)
