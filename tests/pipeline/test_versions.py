"""What DVC runs again: what depends on a raised version and nothing else, and nothing for an edit of the source."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

from afm_pipe.params.versions import FILE, PARTS, declared
from tests.conftest import ROOT

VERSIONS = str(FILE.relative_to(ROOT))
PARAMS = """
seed: 0
data: {image_size: 32}
held_out: null
autoencoder: {kind: kl}
encode: {precision: fp32}
reference: {thumbnails: 1, class_shares: data}
train: {lr: 1.0}
runs: {t4: {seed: 0}}
classifier: {lr: 1.0}
guided: {g: {from: t4, until_epoch: 1.0}, h: {from: i, until_epoch: 1.0, run: {objective: flow_matching}}}
imported: {i: {file: weights.pth}}
sample: {seed: 0, micro_batch: 1, classes: 1, per_class: 1, keep_images: false}
evaluate: {samples: 2, seed: 0}
toy: {seeds: 2}
study: {samples: 2}
tables: {transport: {title: Transport}}
"""  # as much as DVC reads: it parses the file once a stage
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project with this dvc.yaml in which every stage has run, as far as DVC knows."""
    folder = tmp_path_factory.mktemp("dvc") / "project"
    for name in ("dvc.yaml", VERSIONS, "benchmarks/results.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "weights.pth").write_text("weights")
    (folder / "params.yaml").write_text(PARAMS)
    with contextlib.chdir(folder), Repo.init(no_scm=True) as repo:
        for out in repo.index.outs:
            path = Path(out.fs_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
        (folder / "results" / "study").mkdir(parents=True)
        repo.commit(force=True)
    return folder


@pytest.fixture
def changed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[str]]]:
    """Return a function that names the stages that `dvc repro` would run, in a copy of the finished project."""
    shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    with Repo(os.curdir) as repo:
        yield lambda: {name.split("@")[0] for name in repo.status()}


def test_raising_a_version_reruns_what_depends_on_it_and_no_more(changed: Callable[[], set[str]]) -> None:
    assert changed() == set()
    for part in declared():
        raised = declared() | {part: declared()[part] + 1}
        Path(VERSIONS).write_text(yaml.safe_dump({"versions": raised}))
        of_part = {stage for stage, parts in PARTS.items() if part in parts}
        also = {f"{stage}-{kind}" for stage in of_part & {"sample", "evaluate"} for kind in ("guided", "imported")}
        assert changed() == of_part | also


@pytest.mark.parametrize(
    ("param", "stages"),
    [
        ("encode.precision", {"encode", "reference"}),
        ("runs.t4.seed", {"pool", "train", "table"}),  # a row of a table may be a run
        ("guided.g.until_epoch", {"pool", "guide", "table"}),
        ("toy.seeds", {"pool", "toy"}),
        ("sample.keep_images", {"pool", "sample", "sample-guided", "sample-imported"}),
        ("reference.class_shares", {"reference", "sample", "sample-guided", "sample-imported"}),
        ("reference.thumbnails", {"reference"}),
        ("study.samples", {"pool", "table"}),
    ],
)
def test_changing_a_param_reruns_what_reads_it(changed: Callable[[], set[str]], param: str, stages: set[str]) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    *sections, name = param.split(".")
    section = params
    for each in sections:
        section = section[each]
    section[name] = "other" if isinstance(section[name], str) else section[name] + 1
    Path("params.yaml").write_text(yaml.safe_dump(params))
    assert changed() == stages | {"report"}


@pytest.mark.parametrize(("model", "stage"), [("t4", "guide@g"), ("i", "guide@h")], ids=["run", "imported"])
def test_a_guided_run_runs_again_after_the_model_that_it_continues(
    changed: Callable[[], set[str]], model: str, stage: str
) -> None:
    (Path("models") / model).write_text("other")
    with Repo(os.curdir) as repo:
        order = [each.addressing for each in plan_repro(get_active_graph(repo.index.graph), repo.stage.collect(stage))]
        assert stage in repo.status()
    assert order.index("train@t4" if model == "t4" else "import@i") < order.index(stage)


def test_images_of_imported_weights_are_drawn_after_the_reference_whose_class_shares_they_take(finished: Path) -> None:
    with contextlib.chdir(finished), Repo(os.curdir) as repo:
        (stage,) = repo.stage.collect("sample-imported@i")
        order = [each.addressing for each in plan_repro(get_active_graph(repo.index.graph), [stage])]
    assert "reference" in order[: order.index("sample-imported@i")]


def test_what_an_earlier_version_made_is_kept_by_a_commit(changed: Callable[[], set[str]]) -> None:
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    for name in ("prepare", "autoencoder", "encode"):
        del lock["stages"][name]["params"][VERSIONS]  # version 0.1 had none
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    assert changed() == {"prepare", "autoencoder", "encode"}
    with Repo(os.curdir) as repo:
        for name in ("prepare", "autoencoder", "encode"):
            repo.commit(name, force=True)
    assert changed() == set()


def test_each_stage_lists_the_versions_that_its_identity_rests_on() -> None:
    listed = {}
    for name, stage in STAGES.items():
        for each in stage.get("do", stage).get("params", []):
            if isinstance(each, dict) and VERSIONS in each:
                listed[name] = {key.removeprefix("versions.") for key in each[VERSIONS]}
    whole = {name: set(declared()) if parts == {"versions"} else parts for name, parts in listed.items()}
    also = {f"{stage}-{kind}": set(PARTS[stage]) for stage in ("sample", "evaluate") for kind in ("guided", "imported")}
    assert whole == {stage: set(parts) for stage, parts in PARTS.items()} | also


def test_the_pool_runs_before_the_stages_whose_work_it_does_and_no_stage_needs_it(finished: Path) -> None:
    with contextlib.chdir(finished), Repo(os.curdir) as repo:
        graph = get_active_graph(repo.index.graph)
        order, alone = (
            [stage.addressing for stage in plan_repro(graph, collect_stages(repo, [target]))]
            for target in ("dvc.yaml", "train@t4")
        )
    pooled = {"train", "guide", "sample", "sample-guided", "evaluate", "evaluate-guided", "table", "toy"}
    assert pooled <= {name.split("@")[0] for name in order[order.index("pool") + 1 :]}
    assert order.index("classifier") < order.index("pool"), "it shapes the identity of the trials that it guides"
    assert "pool" not in alone and alone[-1] == "train@t4"


def test_after_make_clean_the_pool_runs_and_is_not_taken_from_the_cache(
    changed: Callable[[], set[str]],
) -> None:
    Path("stages").mkdir()
    Path("stages/pool.py").write_text("open('data/pool.done', 'w').write('pool.done')\nopen('ran', 'w')\n")
    shutil.copy(ROOT / "Makefile", "Makefile")
    subprocess.run(["make", "clean"], check=True)
    with Repo(os.curdir) as repo:
        repo.checkout([each.def_path for each in repo.stage.collect("pool")[0].deps if "yaml" not in each.def_path])
        repo.reproduce("pool", single_item=True)
    assert Path("ran").exists() and "pool" not in changed()


def test_no_source_file_is_a_dep() -> None:
    deps = [dep for stage in STAGES.values() for dep in stage.get("do", stage).get("deps", [])]
    assert deps
    assert not [dep for dep in deps if dep.endswith(".py") or dep.split("/")[0] in ("afm_pipe", "stages")]
