"""A small project with a reference, and tables declared in it."""

import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import yaml

from afm_pipe import pipeline
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from tests.study.measured_trials import BASE, ONE, TABLE


@pytest.fixture(scope="session")
def measured(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of the discs with a reference and a classifier."""
    project = tmp_path_factory.mktemp("measured") / "project"
    shutil.copytree(discs, project)
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["evaluate"] |= {"samples": 20, "kid_subsets": 2, "kid_subset_size": 10}
    raw["study"] = {"samples": 20, "trained": 0.7, "collapsed": 0.0, "base": yaml.safe_load(BASE)}
    raw["tables"] = {"transport": yaml.safe_load(TABLE)}
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    with chdir(project):
        params = load_params()
        pipeline.reference(params, ONE)
        pipeline.classifier(params, ONE)
    return project


@pytest.fixture
def project(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(measured, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def declare(project: Path) -> Callable[..., Params]:
    """Return a function that writes tables into params.yaml and loads it."""

    def write(**tables: str) -> Params:
        raw = yaml.safe_load((project / "params.yaml").read_text())
        raw["tables"] = {name: yaml.safe_load(text) for name, text in tables.items()}
        (project / "params.yaml").write_text(yaml.safe_dump(raw))
        return load_params()

    return write
