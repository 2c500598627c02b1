"""A study that `afm-pipe init` begins: its files, what it leaves as it was, how it follows the package."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from afm_pipe.cli.app import app
from afm_pipe.params.file import load_params
from afm_pipe.params.versions import declared
from tests.conftest import ROOT, SMOKE

WRITTEN = {"params.yaml", "params.schema.json", "dvc.yaml", "versions.yaml", ".gitignore", ".dvc", "results"}


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def repository(project: Path) -> Path:
    """An empty git repository, as the working directory."""
    subprocess.run(["git", "init", "-q"], check=True)
    return project


def listed(stages: dict, what: str) -> set[str]:
    """Return the paths that stages list under deps, outs or metrics."""
    found = [each for stage in stages.values() for each in stage.get("do", stage).get(what, [])]
    return {next(iter(each)) if isinstance(each, dict) else each for each in found}


def test_init_writes_a_study_whose_stages_are_commands_of_the_package(repository: Path) -> None:
    done = run("init", "--profile", "smoke")
    assert done.exit_code == 0, done.output
    assert {path.name for path in repository.iterdir()} == {*WRITTEN, ".git"}
    assert load_params(Path("params.yaml")) == load_params(SMOKE)
    assert Path("params.yaml").read_text().startswith("# yaml-language-server: $schema=params.schema.json\n")
    assert Path(".gitignore").read_text() == (ROOT / ".gitignore").read_text()
    assert yaml.safe_load(Path("versions.yaml").read_text()) == {"versions": declared()}
    text = Path("dvc.yaml").read_text()
    stages = yaml.safe_load(text)["stages"]
    scripts = {path.stem for path in (ROOT / "stages").glob("[a-z]*.py")}
    assert set(re.findall(r"cmd: afm-pipe stage ([a-z]+)\b", text)) == scripts
    assert len(stages) == text.count("cmd: ") + text.count("do: *")
    assert "afm_pipe/" not in text and "stages/" not in text
    made = listed(stages, "outs") | listed(stages, "metrics")
    deps = {dep for dep in listed(stages, "deps") if not any((dep + "/" in out + "/") for out in made)}
    assert {dep for dep in deps if "${" not in dep} == {"results/study"}  # the only one that no stage makes
    assert Path("results/study").is_dir()


def test_without_a_profile_params_are_the_small_default(repository: Path) -> None:
    assert run("init").exit_code == 0
    assert Path("params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_init_again_changes_nothing_and_names_what_is_in_the_way(repository: Path) -> None:
    run("init", "--profile", "smoke")
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    assert "begun already" in run("init", "--profile", "smoke").output
    done = run("init")
    assert done.exit_code == 1 and "Found params.yaml in" in done.stderr and "nothing was written" in done.stderr
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


def test_one_file_in_the_way_keeps_all_others_from_being_written(repository: Path) -> None:
    Path("dvc.yaml").write_text("stages: {}\n")
    assert "Found dvc.yaml in" in run("init").stderr
    assert {path.name for path in repository.iterdir()} == {".git", "dvc.yaml"}


def test_rules_of_git_are_added_and_settings_of_dvc_are_kept(repository: Path) -> None:
    Path(".gitignore").write_text("/secret\n/data/")
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    remote = mine\n")
    assert run("init").exit_code == 0
    rules = Path(".gitignore").read_text().splitlines()
    assert rules[:2] == ["/secret", "/data/"] and rules.count("/data/") == 1 and "/models/" in rules
    assert Path(".dvc/config").read_text() == "[core]\n    remote = mine\n"


def test_a_folder_without_git_is_refused_unless_dvc_works_without(project: Path) -> None:
    assert "run `git init` first" in run("init").stderr
    assert not any(project.iterdir())
    assert run("init", "--no-git").exit_code == 0
    assert "no_scm = true" in Path(".dvc/config").read_text()


def test_an_unknown_profile_is_refused_with_those_there(repository: Path) -> None:
    refusal = run("init", "--profile", "imagenet").stderr
    assert "expected one of imagenet256, photos64, photos64-representation, smoke, study" in refusal
    assert not Path("params.yaml").exists()


@pytest.fixture
def outdated(repository: Path) -> Callable[[], str]:
    """A study of an earlier version of the package; return a function that reads its versions."""
    run("init", "--profile", "smoke")
    current = Path("versions.yaml").read_text()
    Path("versions.yaml").write_text(re.sub(r"objective: \d+", "objective: 0", current))
    return Path("versions.yaml").read_text


def test_any_command_brings_the_versions_of_a_study_up_to_date(outdated: Callable[[], str]) -> None:
    done = run("status")
    assert done.stderr.startswith("versions.yaml was of another version of afm-pipe and is up to date now.\n")
    assert yaml.safe_load(outdated()) == {"versions": declared()}
    assert "versions.yaml" not in run("status").stderr


def test_a_stage_that_dvc_planned_by_old_versions_does_not_run(outdated: Callable[[], str]) -> None:
    done = run("stage", "prepare")
    assert done.exit_code == 1 and "run `dvc repro` again" in done.stderr
    assert yaml.safe_load(outdated()) == {"versions": declared()} and not Path("data").exists()


def test_a_file_of_another_program_called_versions_yaml_is_left_alone(repository: Path) -> None:
    run("init", "--profile", "smoke")
    Path("versions.yaml").write_text("versions: {a: 1}\n")
    run("status")
    assert Path("versions.yaml").read_text() == "versions: {a: 1}\n"


def test_a_stage_is_named_if_it_does_not_exist(project: Path) -> None:
    assert "Found no stage 'trian', expected one of autoencoder, " in run("stage", "trian").stderr


def test_profiles_of_a_folder_come_before_those_of_the_package(project: Path) -> None:
    Path("profiles").mkdir()
    Path("profiles/smoke.yaml").write_text("# mine\n")
    Path("profiles/other.yaml").write_text("# another\n")
    lines = run("profile").output.splitlines()
    shipped = ["photos64", "photos64-representation", "smoke", "study"]
    assert [line.split()[0] for line in lines] == ["imagenet256", "other", *shipped]
    assert lines[2].split(maxsplit=1)[1] == "mine"
