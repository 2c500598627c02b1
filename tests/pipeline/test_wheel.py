"""The package installed from a wheel, outside the checkout: a study from its beginning to its report."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOT_SOURCE = (".git", ".venv", "build", "data", "models", "reference", "results", "samples", "work", "*.egg-info")


def call(folder: Path, *words: str | Path, **variables: str) -> str:
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this working tree, built in a copy of it."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE, "__pycache__", "tests"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    call(folder, *pip, "-w", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_what_a_study_needs(wheel: Path) -> None:
    inside = {name.removeprefix("afm_pipe/project_files/") for name in zipfile.ZipFile(wheel).namelist()}
    for folder, pattern in (("stages", "*.py"), ("profiles", "*.yaml")):
        assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)} <= inside
    assert {"params.yaml", "params.schema.json", "dvc.yaml", ".gitignore", ".dvc/config", ".dvc/.gitignore"} <= inside
    assert {"afm_pipe/reporting/published.yaml", "afm_pipe/reporting/page.html.j2"} <= inside


@pytest.mark.slow
def test_a_study_outside_the_checkout_runs_from_init_to_its_report(wheel: Path, tmp_path: Path) -> None:
    site, study = tmp_path / "site", tmp_path / "a study"
    call(tmp_path, sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    study.mkdir()
    path = os.pathsep.join([str(site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    installed = {"PYTHONPATH": str(site), "PATH": path, "OMP_NUM_THREADS": "1"}
    where = call(study, sys.executable, "-c", "import afm_pipe; print(afm_pipe.__file__)", **installed)
    assert Path(where.strip()).is_relative_to(site)
    call(study, "git", "init", "-q")
    call(study, "afm-pipe", "init", "--profile", "smoke", **installed)
    stages = call(study, "dvc", "stage", "list", "--name-only", **installed).split()
    said = call(study, "dvc", "repro", **installed)
    assert set(re.findall(r"Running stage '([^']+)'", said)) == set(stages)
    assert "200 samples" in (study / "results" / "report" / "index.html").read_text()
    changed = {line[3:].strip('"').split("/")[0] for line in call(study, "git", "status", "--porcelain").splitlines()}
    assert changed == {".dvc", ".gitignore", "dvc.yaml", "dvc.lock", "params.yaml", "params.schema.json"} | {
        *("versions.yaml", "results")
    }
    assert "Running stage" not in call(study, "dvc", "repro", **installed)
    assert "finished" in call(study, "afm-pipe", "status", **installed)
    assert "imagenet256" in call(study, "afm-pipe", "profile", **installed)
    call(study, "afm-pipe", "sample", "t4", "--count", "2", "--grid", "grid.png", **installed)
    assert (study / "grid.png").is_file()
