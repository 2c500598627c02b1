"""Trials of tables: trained once, resumable, measured on the way; a diverged one is a result."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from afm_pipe import pipeline
from afm_pipe.cli.plan import trials_text
from afm_pipe.distributed.launch import Launch
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import load_tensors
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.study.statistics import divergence
from afm_pipe.study.trials import Trials
from tests.conftest import ROOT
from tests.study.measured_trials import BASE, KEY, ONE, TABLE, measurements, trainings, trials, with_row


def test_a_trial_is_measured_at_a_third_of_its_updates_and_at_the_end_of_every_phase(project: Path) -> None:
    pipeline.tables(load_params(), [], ONE)
    trial = trials("transport")["0.2"]
    assert [(probe["update"], probe["phase"]) for probe in trial["probes"]] == [(10, None), (15, 1), (30, 2)]
    assert trial["metrics"] == trial["probes"][-1]["metrics"]
    low, high = trial["intervals"][KEY]
    assert low < trial["metrics"][KEY] < high
    assert trial["cost"]["updates"] == 30
    assert 13 < trial["cost"]["units"] < 18
    assert "not the paper's scale" in json.loads(paths.table("transport").read_text())["scale"]


def test_one_worker_trains_small_trials_on_one_thread_as_a_pool_does(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pipeline.tables(load_params(), [], ONE)
    finally:
        torch.set_num_threads(before)
    assert {trial["cost"]["threads"] for trial in trials("transport").values()} == {1}


def test_tables_share_trials_and_a_changed_trial_runs_alone(declare: Callable[..., Params]) -> None:
    pipeline.tables(declare(first=TABLE), [], ONE)
    before, measured = trainings(), measurements()
    assert len(before) == 2
    pipeline.tables(declare(first=TABLE, second=with_row("0.5", "{transport: {start: 0.5}}")), [], ONE)
    after = trainings()
    assert len(after) == 3
    assert {name: after[name] for name in before} == before
    assert measured.items() < measurements().items()
    assert trials("second")["0"] == trials("first")["0"]


def test_an_interrupted_study_runs_only_missing_trials(project: Path) -> None:
    params = load_params()
    pipeline.tables(params, [], ONE)
    first, before = paths.table("transport").read_bytes(), trainings()
    lost = Trials(params).all[0]
    lost.result.unlink()
    shutil.rmtree(lost.folder)
    pipeline.tables(params, [], ONE)
    again = json.loads(paths.table("transport").read_text())
    for trial in again["trials"]:
        trial["cost"]["seconds"] = None
    expected = json.loads(first)
    for trial in expected["trials"]:
        trial["cost"]["seconds"] = None
    assert again == expected
    assert sum(before[name] == time for name, time in trainings().items()) == 1


def test_collecting_finished_trials_needs_no_torch(project: Path) -> None:
    pipeline.tables(load_params(), [], ONE)
    code = (
        "import sys; from afm_pipe import pipeline; from afm_pipe.distributed.launch import Launch;"
        "from afm_pipe.params.file import load_params;"
        "pipeline.tables(load_params(), [], Launch(device='cpu')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_non_finite_loss_is_a_result(declare: Callable[..., Params]) -> None:
    wild = "{lr: 1.0e+30, gradient_normalization: {enabled: false}}"
    pipeline.tables(declare(wild=with_row("wild", wild)), [], ONE)
    found = trials("wild")
    assert re.fullmatch(r"non-finite loss at update \d+", found["wild"]["diverged"])
    assert found["wild"]["metrics"] == {}
    assert found["0.2"]["metrics"][KEY] > 0


def test_divergence_is_distinguished_from_a_short_run_by_its_probes() -> None:
    def probe(low: float, high: float, right: float = 0.5) -> dict:
        return {"intervals": {"fd": [low, high]}, "metrics": {"class_accuracy": right}}

    assert divergence(None, [probe(90, 110), probe(40, 60)], "fd", 0.25) is None
    assert divergence(None, [probe(90, 110), probe(300, 320)], "fd", 0.25) == "worse at three times the updates"
    assert divergence(None, [probe(90, 110), probe(105, 130)], "fd", 0.25) is None  # the intervals overlap
    assert divergence(None, [probe(500, 510, 0.1), probe(250, 260, 0.2)], "fd", 0.25) == (
        "collapsed: class accuracy 20%"
    )
    assert divergence(7, [], "fd", 0.25) == "non-finite loss at update 7"


def test_then_continues_the_trained_trial_with_guidance(declare: Callable[..., Params]) -> None:
    then = "{then: {until_epoch: 5, lr: 3.0e-4, transport: 0.05, guidance: {scale: 0.1, t: [0.0, 0.1]}}}"
    pipeline.tables(declare(guided=with_row("guided", then)), [], ONE)
    found = trials("guided")
    assert [probe["update"] for probe in found["guided"]["probes"]] == [38]
    assert found["guided"]["cost"]["updates"] == 38 - 30
    assert found["guided"]["cost"]["units"] > found["0.2"]["cost"]["units"]
    assert found["guided"]["metrics"][KEY] != found["0.2"]["metrics"][KEY]
    assert len(trainings()) == 3  # its base is the trial 0.2


def test_a_trial_of_another_objective_counts_from_zero_in_the_list_and_in_training(
    declare: Callable[..., Params],
) -> None:
    run = "{objective: continuous_adversarial_flow, discriminator_updates: 1, transport: 0.0}"
    flow = "sampling: {solver: euler, steps: 2, guidance_scale: 1.0, guidance_interval: [0.0, 1.0]}"
    settings = f"objective: flow_matching, flow: {{times: uniform, label_dropout: 0.0, warmup: 1, {flow}}}"
    row = f"{{{settings}, then: {{until_epoch: 1, run: {run}}}}}"
    params = declare(continued=with_row("continued", row))
    (line,) = [line for line in trials_text(params, []).splitlines() if "continued: continued, seed 0" in line]
    pipeline.tables(params, [], ONE)
    assert re.search(r"waits for its base +8 ", line)
    assert trials("continued")["continued"]["cost"]["updates"] == 8


def test_an_any_step_model_is_trained_once_and_measured_at_each_number_of_steps(
    declare: Callable[..., Params],
) -> None:
    rows = '{title: steps, settings: {"1": {nfe: any, steps: 1}, "2": {nfe: any, steps: 2}}}'
    table = re.sub(r"rows: .*", f"rows: {rows}", TABLE, count=1).replace(TABLE.splitlines()[-1], "checks: []")
    pipeline.tables(declare(any=table), [], Launch(device="cpu", workers=2))
    assert len(trainings()) == 1
    found = trials("any")
    assert found["1"]["metrics"][KEY] != found["2"]["metrics"][KEY]


def test_a_reference_of_other_classes_is_refused_before_a_trial_is_trained(project: Path) -> None:
    summary = paths.REFERENCE / "summary.json"
    summary.write_text(summary.read_text().replace('"class1"', '"other"'))
    with pytest.raises(UserError, match="Found 'class1' as class 1 of 3 in data/latents.h5, expected 'other' of 3"):
        pipeline.tables(load_params(), [], ONE)
    assert not trainings()


def test_a_trial_that_is_also_a_run_is_trained_once(project: Path) -> None:
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["runs"]["same"] = {**yaml.safe_load(BASE), "seed": 0}
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    params = load_params()
    pipeline.train(params, "same", ONE)
    trial = next(trial for trial in Trials(params).all if trial.spec.place.row == "0.2")
    assert trial.owner == "same"
    weights = {path.name: path.stat().st_mtime_ns for path in (trial.folder / "kept").iterdir()}
    pipeline.tables(params, [], ONE)
    assert {path.name: path.stat().st_mtime_ns for path in (trial.folder / "kept").iterdir()} == weights
    assert trial.training not in trainings()


@pytest.fixture
def with_run(project: Path) -> Callable[..., Params]:
    """Return a function that declares the run `same`, with the settings of trials and others, and tables."""

    def declared(fields: dict[str, Any], **tables: str) -> Params:
        raw = yaml.safe_load((project / "params.yaml").read_text())
        raw["runs"]["same"] = {**yaml.safe_load(BASE), "seed": 0, **fields}
        raw["tables"] = {name: yaml.safe_load(text) for name, text in tables.items()}
        (project / "params.yaml").write_text(yaml.safe_dump(raw))
        return load_params()

    return declared


SELECTION = {"selection": {"every_epochs": 1.0, "samples": 100}}


def test_a_trial_that_is_a_run_with_a_selection_trains_it_as_the_run_does(with_run: Callable[..., Params]) -> None:
    params = with_run(SELECTION, t=with_row("same", "{run: same}"))
    pipeline.tables(params, [], ONE)
    folder = next(trial for trial in Trials(params).all if trial.owner == "same").folder
    trained = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert [path for path in trained if path.parent.name == "selected"]
    pipeline.train(params, "same", ONE)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == trained
    assert json.loads((paths.model("same") / "config.json").read_text())["selection"]
    assert trials("t")["same"]["metrics"] == trials("t")["0.2"]["metrics"]  # the last EMA


def test_then_continues_a_run_that_a_row_names(with_run: Callable[..., Params]) -> None:
    then = "{run: same, then: {until_epoch: 5, lr: 3.0e-4}}"
    params = with_run({"keep_discriminators": [2]}, t=with_row("longer", then))
    pipeline.train(params, "same", ONE)
    pipeline.tables(params, [], ONE)
    (trial,) = [trial for trial in Trials(params).all if trial.spec.place.row == "longer"]
    assert trial.base is not None and trial.base.owner == "same"
    assert trials("t")["longer"]["cost"]["updates"] == 38 - 30
    assert len(trainings()) == 3  # the run is not among them
    with pytest.raises(UserError, match="row more: expected no field beside `run` but `then`.*found also lr"):
        with_run({}, t=with_row("more", "{run: same, lr: 0.1, then: {until_epoch: 5}}"))


def test_a_large_run_that_a_trial_is_trains_as_a_run(
    with_run: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def run_processes(launch: Launch, command: list[str]) -> int:
        started.append(command)
        pipeline.train(load_params(), command[-1], ONE)
        return 0

    monkeypatch.setattr(pipeline.results, "is_small", lambda size: False)
    monkeypatch.setattr(pipeline.results, "run_processes", run_processes)
    params = with_run({}, t=TABLE)
    with pytest.raises(UserError, match="run `afm-pipe train same`"):
        pipeline.tables(params.model_copy(update={"seed": 7}), [], Launch(device="cpu", workers=1, nproc_per_node=2))
    pipeline.tables(params, [], Launch(device="cpu", workers=1, nproc_per_node=2))
    assert started == [["-m", "afm_pipe", "train", "same"]]
    assert len(trainings()) == 1
    shutil.rmtree(paths.model("same"))
    pipeline.tables(with_run({}, t=TABLE, other=with_row("other", "{lr: 5.0e-4}")), [], ONE)
    assert not paths.model("same").exists()  # what has a result needs no training


def test_a_forced_table_among_several_is_trained_again(declare: Callable[..., Params]) -> None:
    params = declare(first=TABLE, second=with_row("0.5", "{transport: {start: 0.5}}"))
    pipeline.tables(params, ["first", "second"], ONE)
    before = trainings()
    pipeline.tables(params, ["first", "second"], ONE)
    assert trainings() == before
    pipeline.tables(params, ["first", "second"], Launch(device="cpu", workers=1, force="table@second"))
    assert set(before) == set(trainings()) and not set(before.items()) & set(trainings().items())
    with pytest.raises(UserError, match="Found no table 'third'"):
        pipeline.tables(params, ["first", "third"], ONE)


def test_one_task_trains_a_base_by_its_identity(declare: Callable[..., Params]) -> None:
    then = "{phases: [{until_epoch: 3}], then: {until_epoch: 5, lr: 3.0e-4}}"
    params = declare(t=with_row("longer", then))
    (base,) = [trial.base for trial in Trials(params).all if trial.base is not None]
    pipeline.tables(params, [], ONE, trial=base.training)
    assert set(trainings()) == {base.training}


def test_a_table_whose_first_trial_diverged_has_the_protocol_of_the_others(declare: Callable[..., Params]) -> None:
    wild = "{lr: 1.0e+30, gradient_normalization: {enabled: false}}"
    pipeline.tables(declare(t=TABLE.replace('"0.2": {}', f'"(wild)": {wild}, "0.2": {{}}')), [], ONE)
    table = json.loads(paths.table("t").read_text())
    assert table["trials"][0]["metrics"] == {}
    assert table["protocol"]["samples"] == 20 and "class shares" in table["scale"]


def test_mistakes_in_tables_are_named(project: Path, declare: Callable[..., Params]) -> None:
    with pytest.raises(UserError, match=r"tables.t.*expected rows of the check 'It does' among 0, 0.2, found 0.3"):
        declare(t=TABLE.replace('less: {rows: ["0.2"]}', 'less: {rows: ["0.3"]}'))
    with pytest.raises(UserError, match="tables.t: row typo: lrr: found an unknown field"):
        declare(t=with_row("typo", "{lrr: 1.0}"))
    with pytest.raises(UserError, match=r"row early: expected until_epoch to rise from phase to phase"):
        declare(t=with_row("early", "{then: {until_epoch: 4}}"))
    with pytest.raises(UserError, match="Found no table 'u' in params, expected one of t"):
        pipeline.tables(declare(t=TABLE), ["u"], ONE)
    paths.LATENTS.unlink()
    with pytest.raises(UserError, match="dvc repro encode"):
        pipeline.tables(load_params(), [], ONE)


def test_the_contributing_guides_table_is_a_table(declare: Callable[..., Params]) -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    section = guide[guide.index("## Add a table") :]
    block = re.search(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert block
    tables = yaml.safe_load(block[1])["tables"]
    params = declare(**{name: yaml.safe_dump(table) for name, table in tables.items()})
    pipeline.tables(params, [], ONE)
    assert all(len(trials(name)) == 2 for name in tables)


@pytest.mark.parametrize("file", ["params.yaml", "profiles/study.yaml", "profiles/imagenet256.yaml"])
def test_every_declared_trial_resolves(file: str) -> None:
    declared = load_params(ROOT / file)
    assert declared.tables
    for name, of_table in declared.trials.items():
        assert len(of_table) == len({trial.place for trial in of_table}), name


def test_a_forced_table_trains_and_measures_its_trials_again(project: Path) -> None:
    pipeline.tables(load_params(), ["transport"], ONE)
    before = trainings(), measurements()
    pipeline.tables(load_params(), ["transport"], ONE)
    assert (trainings(), measurements()) == before
    pipeline.tables(load_params(), ["transport"], ONE.model_copy(update={"force": "table@transport"}))
    for now, then in zip((trainings(), measurements()), before, strict=True):
        assert now.keys() == then.keys() and all(now[name] > then[name] for name in then)


def test_trials_compute_in_micro_batches_with_the_numbers_of_whole_ones(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No forward pass of training sees more images than the launch setting says; results differ by rounding."""
    sizes: list[int] = []
    forward = Generator.forward

    def counted(self: Generator, x: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            sizes.append(len(x))
        return forward(self, x, *others, **more)

    monkeypatch.setattr(Generator, "forward", counted)
    found, params = [], load_params()
    for size in (None, 3):
        sizes.clear()
        pipeline.tables(params, ["transport"], ONE.model_copy(update={"micro_batch": size}))
        assert max(sizes) == (size or params.train.batch_size)
        trial = Trials(params, ["transport"]).all[0]
        found.append(load_tensors(max((trial.folder / "kept").iterdir())))
        shutil.rmtree(paths.TRIALS)
        paths.table("transport").unlink()
    for name, whole in found[0].items():
        assert torch.allclose(whole, found[1][name], rtol=1e-3, atol=1e-4), name
