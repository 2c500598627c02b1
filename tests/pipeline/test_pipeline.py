"""The pipeline as DVC runs it, in a clone of its own, on the smoke profile's settings and a few images."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT, SMOKE, write_images

MADE = {"dvc.lock", "results"}  # what the pipeline gives to git
SMALLER: dict[str, object] = {
    "data.source": "folder",
    "data.min_images": 10,
    "autoencoder.train.updates": 20,
    "train.batch_size": 8,
    "train.phases": [{"until_epoch": 2}],
    "tables.transport.rows.settings": {
        "0.2": {},
        "0": {"transport": {"start": 0.0, "end": 0.0}},
        "guided": {"then": {"until_epoch": 3, "guidance": {"scale": 0.03, "t": [0.0, 0.1]}}},
    },
    "evaluate.samples": 60,
}
RUN_STAGES = ["train", "sample", "evaluate"]


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which this Python runs, on the clone's own package."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder)}


def shell(folder: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def repro(folder: Path) -> list[str]:
    """Run `dvc repro` and return the stages that ran."""
    return re.findall(r"Running stage '([^']+)'", shell(folder, "dvc", "repro"))


# Runs a stage and says whether it imported torch, which takes seconds: a current stage has no need of it.
RUN_STAGE = """
import runpy, sys
sys.argv, sys.path[0] = sys.argv[1:], "stages"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("with torch" if "torch" in sys.modules else "without torch")
"""


def make_clone(folder: Path) -> Path:
    """Make a git repository with this working tree's files and the smoke profile."""
    folder.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        made = name.split("/")[0] in MADE and not name.startswith("results/study/")
        if not made and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copy(SMOKE, folder / "params.yaml")
    shell(folder, "git", "init", "-q")
    shell(folder, "git", "config", "user.email", "test@example.org")
    shell(folder, "git", "config", "user.name", "test")
    return folder


def edit(folder: Path, place: str, value: object) -> None:
    raw = yaml.safe_load((folder / "params.yaml").read_text())
    *parents, last = place.split(".")
    here = raw
    for name in parents:
        here = here[name]
    here[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone on images of discs, after its first `dvc repro`."""
    folder = make_clone(tmp_path_factory.mktemp("clone") / "afm-pipe")
    write_images(folder / "data" / "images")
    for place, value in SMALLER.items():
        edit(folder, place, value)
    shell(folder, "git", "add", "-A")
    shell(folder, "git", "commit", "-qm", "clone")
    assert set(repro(folder)) == set(shell(folder, "dvc", "stage", "list", "--name-only").split())
    return folder


def test_every_output_is_there_and_git_stays_clean(clone: Path) -> None:
    for name in ("t4", "t4-no-transport"):
        metrics = json.loads((clone / "results" / "metrics" / f"{name}.json").read_text())
        assert {"fd_classifier_60", "kid_classifier_60", "class_accuracy", "within_class_variance"} < metrics.keys()
        assert (clone / "samples" / name / "grid.png").stat().st_size > 1000
        assert (clone / "samples" / name / "interpolation.png").stat().st_size > 1000
        assert (clone / "results" / "report" / "runs" / f"{name}.html").stat().st_size > 10_000
    assert "t4-no-transport" in (clone / "results" / "report" / "index.html").read_text()
    new = {line[3:].strip('"').split("/")[0] for line in shell(clone, "git", "status", "--porcelain").splitlines()}
    assert new <= MADE


def test_the_stages_find_what_the_pool_made_current(clone: Path) -> None:
    made = {path.stem for path in (clone / "work" / "current").glob("*.json")}
    of_runs = {f"{stage}-{name}" for stage in RUN_STAGES for name in ("t4", "t4-no-transport")}
    assert made == {*of_runs, "classifier-", "toy-", "table-transport"}
    code = json.loads((clone / "results" / "costs" / "t4.json").read_text())
    assert code["threads"] == 1
    for stage, *names in (*([stage, "t4"] for stage in RUN_STAGES), ["table", "transport"], ["classifier"], ["toy"]):
        said = shell(clone, "python", "-c", RUN_STAGE, f"stages/{stage}.py", *names)
        assert said.endswith("current.\nwithout torch\n"), said


def test_a_table_is_in_the_report_with_a_verdict(clone: Path) -> None:
    cells = json.loads((clone / "results" / "tables" / "transport.json").read_text())["trials"]
    assert [(cell["row"], cell["cost"]["updates"] > 0) for cell in cells] == [
        ("0.2", True),
        ("0", True),
        ("guided", True),
    ]
    checks = (clone / "results" / "rendered" / "checks.md").read_text()
    assert "Without the transport loss samples are worse | transport | undecided" in checks  # one seed decides nothing


def test_a_second_repro_runs_nothing(clone: Path) -> None:
    assert repro(clone) == []


def test_a_fresh_clone_of_current_results_still_uses_all_cores(clone: Path, tmp_path: Path) -> None:
    """Its lock is of the same work, but its runs and trials are missing: the pool has to run before their stages."""
    fresh = tmp_path / "fresh"
    shell(clone, "git", "clone", "-q", str(clone), str(fresh))
    shutil.copy(clone / "dvc.lock", fresh)
    found = json.loads(shell(fresh, "dvc", "status", "--json", "pool"))
    assert {"changed outs": {"data/pool.done": "not in cache"}} in found["pool"]


def test_an_edited_docstring_reruns_nothing_and_status_says_it(clone: Path) -> None:
    source = clone / "afm_pipe" / "training" / "trainer.py"
    before = source.read_text()
    source.write_text(before.replace('"""', '"""Edited. ', 1))
    assert repro(clone) == []
    (said,) = [line for line in shell(clone, "afm-pipe", "status").splitlines() if "different source code" in line]
    assert "t4, t4-no-transport, table transport (objective)" in said
    source.write_text(before)


def test_an_inherited_default_changes_all_that_inherit_it_and_one_run_itself(clone: Path) -> None:
    before = (clone / "params.yaml").read_text()

    def changed(place: str, value: object) -> set[str]:
        edit(clone, place, value)
        found = set(json.loads(shell(clone, "dvc", "status", "--json")))
        (clone / "params.yaml").write_text(before)
        return found

    inherited = {"pool", "train@t4", "train@t4-no-transport", "table@transport", "report"}
    assert changed("train.logit_centering", 0.02) == inherited
    own = {"pool", "train@t4", "table@transport", "report"}  # a row of a table may be a run
    assert changed("runs.t4.lr", 0.0011) == own


def test_dvc_shows_metrics_and_plots(clone: Path) -> None:
    shown = json.loads(shell(clone, "dvc", "metrics", "show", "--json"))
    files = shown[""]["data"]
    assert "class_accuracy" in files["results/metrics/t4.json"]["data"]
    assert files["results/costs/t4.json"]["data"]["updates"] > 0
    page = shell(clone, "dvc", "plots", "show", "-o", "plots").strip()
    text = (clone / page.removeprefix("file://").split("/afm-pipe/")[-1]).read_text()
    assert all(part in text for part in ("logit_gap", "transport_rms", "t4-no-transport"))
    assert "grid.png" in text


@pytest.mark.slow  # four stages import torch again
def test_two_settings_are_compared_by_experiments(clone: Path) -> None:
    shell(clone, "git", "add", "-A")
    shell(clone, "git", "commit", "-qm", "results")
    said = shell(clone, "dvc", "exp", "run", "-S", "+runs.t4.transport.start=0.3", "--name", "more-transport")
    ran = re.findall(r"Running stage '([^']+)'", said)
    assert ran == ["pool", *(f"{stage}@t4" for stage in RUN_STAGES), "table@transport", "report"]
    table = shell(clone, "dvc", "exp", "show", "--only-changed", "--drop", "protocol", "--csv")
    header, *rows = table.splitlines()
    assert "runs.t4.transport.start" in header
    assert any("more-transport" in row for row in rows)
    page = shell(clone, "dvc", "plots", "diff", "HEAD", "more-transport", "-o", "diff").strip()
    text = (clone / page.removeprefix("file://").split("/afm-pipe/")[-1]).read_text()
    assert '"rev": "more-transport"' in text  # rows of both in one plot
    assert '"rev": "HEAD"' in text
    for rev in ("HEAD", "more-transport"):
        assert any((clone / "diff" / "static").glob(f"{rev}*t4*grid.png"))


def test_a_typo_in_params_stops_the_first_stage(clone: Path) -> None:
    edit(clone, "train.logit_centring", 0.02)
    done = subprocess.run(
        ["dvc", "repro"], cwd=clone, env=environment(clone), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "train.logit_centring: found an unknown field, did you mean logit_centering?" in done.stderr


@pytest.mark.slow
def test_the_smoke_profile_runs_to_its_end_on_digits(tmp_path: Path) -> None:
    folder = make_clone(tmp_path / "afm-pipe")
    shell(folder, "git", "add", "-A")
    shell(folder, "git", "commit", "-qm", "clone")
    assert set(repro(folder)) == set(shell(folder, "dvc", "stage", "list", "--name-only").split())
    assert "200 samples" in (folder / "results" / "report" / "index.html").read_text()


def many_classes(folder: Path, classes: int, per_class: int) -> Path:
    """Make a clone of the smoke profile on images of many classes."""
    make_clone(folder)
    for index in range(classes * per_class):
        path = folder / "data" / "images" / f"{index % classes:04d}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32), np.uint8)).save(path)
    for place in ("data.source", "data.min_images"):
        edit(folder, place, SMALLER[place])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "per_class", "missing"),
    [
        (1000, 1, ["no class with two different images among 1000 images of 1000 classes", "evaluate.samples 200 for"]),
        (500, 2, ["evaluate.samples 200 for 500 classes, expected at least 1000", "reference.thumbnails 200 for"]),
    ],
)
def test_many_classes_of_few_images_stop_in_prepare_with_all_that_is_missing(
    classes: int, per_class: int, missing: list[str], tmp_path: Path
) -> None:
    folder = many_classes(tmp_path / "afm-pipe", classes, per_class)
    done = subprocess.run(
        ["dvc", "repro"], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert re.findall(r"Running stage '([^']+)'", done.stdout) == ["prepare"]
    assert "Found what later stages cannot work with:" in done.stderr and "Traceback" not in done.stderr
    assert all(f"\n  {each}" in done.stderr for each in missing)


@pytest.mark.slow
def test_500_classes_of_two_images_go_through_with_what_prepare_names(tmp_path: Path) -> None:
    folder = many_classes(tmp_path / "afm-pipe", 500, 2)
    enough = {"evaluate.samples": 1000, "study.samples": 1000, "reference.thumbnails": 501}
    for place, value in (SMALLER | enough).items():
        edit(folder, place, value)
    shell(folder, "git", "add", "-A")
    shell(folder, "git", "commit", "-qm", "clone")
    assert set(repro(folder)) == set(shell(folder, "dvc", "stage", "list", "--name-only").split())
    metrics = json.loads((folder / "results" / "metrics" / "t4.json").read_text())
    assert metrics["protocol"]["samples"] == 1000 and metrics["fd_classifier_1k"] > 0
