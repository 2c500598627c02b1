"""The trainer survives: interrupted, damaged, out of disk or out of range, it resumes to the same weights."""

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.process_group import SINGLE_PROCESS
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.lease import hold_lease
from afm_pipe.training.checkpoints import checkpoints, load_latest
from afm_pipe.training.learner import Learner
from afm_pipe.training.state import TrainingState
from tests.training.running import same_weights, weights

OFTEN = Launch(device="cpu", checkpoint_seconds=0)
RARELY = Launch(device="cpu", checkpoint_seconds=1e9)
SMALL = ("runs.t4.size=s4", "runs.t4.phases=[{until_epoch: 4}]")
STAGE = """
import sys, torch
torch.set_num_threads(1)
from afm_pipe import pipeline
from afm_pipe.runtime.commands import user_command
from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.process_group import SINGLE_PROCESS
from afm_pipe.params.file import load_params
print("ready", flush=True)
user_command(pipeline.train)(load_params(), "t4", Launch(device="cpu", checkpoint_seconds=0))
"""


@pytest.fixture(scope="module")
def small(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with latents encoded, ready to train a run t4 of 30 updates. Copy it before you write."""
    project = tmp_path_factory.mktemp("small") / "project"
    shutil.copytree(discs, project)
    params = load_params(project / "params.yaml", SMALL).model_dump(mode="json")
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    return project


@pytest.fixture(scope="module")
def params(small: Path) -> Params:
    return load_params(small / "params.yaml")


@pytest.fixture
def project(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the small project, as the working directory."""
    shutil.copytree(small, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    torch.set_num_threads(1)
    return tmp_path / "project"


@pytest.fixture
def change(small: Path) -> Callable[..., Params]:
    """Return a function from overrides to the params with them."""
    return lambda *overrides: load_params(small / "params.yaml", overrides)


@pytest.fixture(scope="module")
def uninterrupted(small: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the run t4 was trained without a break."""
    project = tmp_path_factory.mktemp("uninterrupted") / "project"
    shutil.copytree(small, project)
    before = Path.cwd()
    os.chdir(project)
    try:
        pipeline.train(params, "t4", OFTEN)
    finally:
        os.chdir(before)
    return project


def same_outputs(one: Path, other: Path) -> bool:
    files = [paths.model("t4") / name for name in ("generator.safetensors", "discriminator.safetensors", "config.json")]
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in [*files, paths.curves("t4")])


def work_dir(project: Path) -> Path:
    (folder,) = [path for path in (project / "work" / "t4").iterdir() if path.is_dir()]
    return folder


def test_training_writes_model_curves_and_cost(uninterrupted: Path, params: Params) -> None:
    config = json.loads((uninterrupted / paths.model("t4") / "config.json").read_text())
    weights = load_file(uninterrupted / paths.model("t4") / "generator.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == config["generator_parameters"]
    assert config["run"] == json.loads(json.dumps(params.runs["t4"].model_dump()))
    rows = (uninterrupted / paths.curves("t4")).read_text().splitlines()
    assert len(rows) == 1 + config["updates"] // 10
    cost = json.loads((uninterrupted / paths.costs("t4")).read_text())
    assert cost["images"] == config["images_seen"]
    assert 0 < cost["data_wait_share"] < 1


def test_a_run_that_is_finished_is_not_trained_again(
    uninterrupted: Path, params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    shutil.rmtree(paths.model("t4"))
    before = (work_dir(Path.cwd()) / "checkpoints").stat().st_mtime_ns
    pipeline.train(params, "t4", OFTEN)
    assert same_outputs(Path.cwd(), uninterrupted)
    assert (work_dir(Path.cwd()) / "checkpoints").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    uninterrupted: Path, project: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted / "work", "work", dirs_exist_ok=True)
    newest = checkpoints(work_dir(project) / "checkpoints")[-1]
    os.truncate(newest / "ema.safetensors", 1000)
    pipeline.train(params, "t4", OFTEN)
    assert "ema.safetensors does not match the manifest" in capsys.readouterr().out
    assert same_outputs(project, uninterrupted)


def lose(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def zero(*patterns: str) -> Callable[[Path], None]:
    """Return a function that leaves files their sizes and takes their bytes, as a power cut does."""

    def zeroed(folder: Path) -> None:
        files = [path for pattern in patterns for path in folder.glob(pattern)]
        assert files
        for path in files:
            path.write_bytes(bytes(path.stat().st_size))

    return zeroed


@pytest.mark.parametrize(
    "damage",
    [
        lose("manifest.json"),
        lose("generator.safetensors"),
        lose("curves.csv"),
        lose("extra.json", "ema.safetensors", "buffers.safetensors", "manifest.json"),
        zero("curve.safetensors"),
        zero("extra.json"),
        zero("manifest.json"),
        zero("*"),
    ],
    ids=["no manifest", "no G", "no curves", "half", "zeroed sums", "zeroed extra", "zeroed manifest", "all zeroed"],
)
def test_a_damaged_or_half_deleted_checkpoint_is_passed_over(
    uninterrupted: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(work_dir(uninterrupted), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    earlier, newest = checkpoints(folder)
    damage(newest)
    state, fingerprint = fresh_state(uninterrupted), work_dir(uninterrupted).name
    assert len(load_latest(folder, state, fingerprint)) == 1
    assert state.update == int(earlier.name.removeprefix("update-"))


def test_a_checkpoint_of_other_params_is_refused(uninterrupted: Path) -> None:
    folder = work_dir(uninterrupted) / "checkpoints"
    with pytest.raises(UserError, match="of other params, data or versions"):
        load_latest(folder, fresh_state(uninterrupted), "0" * 16)


def test_other_params_start_from_nothing(
    uninterrupted: Path, project: Path, params: Params, change: Callable[..., Params]
) -> None:
    shutil.copytree(uninterrupted / "work", "work", dirs_exist_ok=True)
    pipeline.train(change("runs.t4.lr=0.002"), "t4", RARELY)
    assert len([path for path in Path("work/t4").iterdir() if path.is_dir()]) == 2
    assert not same_outputs(project, uninterrupted)


@pytest.mark.usefixtures("project")
def test_a_second_trainer_of_the_same_run_is_refused(params: Params) -> None:
    with hold_lease(Path("work/t4")), pytest.raises(UserError, match=f"held by process {os.getpid()} on"):
        pipeline.train(params, "t4", OFTEN)


def test_a_full_disk_leaves_the_last_checkpoint_whole(project: Path, uninterrupted: Path, params: Params) -> None:
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n{STAGE}"
    failed = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "not writable" in failed.stderr and "error: Found work/t4/" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(Path("work").rglob("update-*"))
    assert not list(Path("work").rglob("*.partial"))
    assert not paths.model("t4").exists()
    pipeline.train(params, "t4", RARELY)
    assert same_outputs(project, uninterrupted)


def test_a_clock_that_jumps_changes_nothing(
    project: Path, uninterrupted: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, itertools.cycle([0.0, 1e7, -1e7, 3600.0])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    pipeline.train(params, "t4", RARELY)
    assert same_outputs(project, uninterrupted)
    cost = json.loads(paths.costs("t4").read_text())
    assert 0 < cost["seconds"] < 1000


def test_a_loss_that_is_not_finite_stops_before_the_update(project: Path, change: Callable[..., Params]) -> None:
    with pytest.raises(UserError, match=r"loss of (nan|inf) at update \d+, expected a finite one"):
        pipeline.train(change("runs.t4.lr=1.0e+20"), "t4", OFTEN)
    assert not paths.model("t4").exists()


def test_a_run_too_large_for_memory_is_refused_before_allocating(project: Path, change: Callable[..., Params]) -> None:
    params = change("runs.t4.size=b2", "runs.t4.batch_size=65536")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"GiB of memory free on cpu, expected [\d.]+ GiB for the run t4"):
        pipeline.train(params, "t4", OFTEN)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10


def fresh_state(project: Path) -> TrainingState:
    config = json.loads((project / paths.model("t4") / "config.json").read_text())
    run, model = Run.model_validate(config["run"]), ModelConfig.model_validate(config["model"])
    return TrainingState.fresh(build_objective(run, model), torch.device("cpu"))


def test_initial_weights_depend_on_the_seed_alone(smoke_run: Run) -> None:
    config = run_config(smoke_run, (4, 8, 8), 3)

    def fresh(seed: int) -> TrainingState:
        torch.rand(seed + 1)  # elsewhere numbers are drawn, too
        run = smoke_run.model_copy(update={"seed": seed})
        return TrainingState.fresh(build_objective(run, config), torch.device("cpu"))

    before = torch.random.get_rng_state()
    first, again, other = fresh(1), fresh(1), fresh(2)
    torch.random.set_rng_state(before)
    assert same_weights(first, again)
    assert not same_weights(first, other)
    generator, x = first.networks["generator"], torch.randn(2, 4, 8, 8)
    assert not generator(x, torch.zeros(2, dtype=torch.int64)).any(), "the last layer starts at zero"
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), first.ema.parameters(), strict=True))


@pytest.mark.slow
def test_one_full_update_of_b2_at_the_papers_shape(smoke_run: Run) -> None:
    run = smoke_run.model_copy(update={"size": "b2", "batch_size": 4})
    objective = build_objective(run, run_config(run, (4, 32, 32), 1000))
    state = TrainingState.fresh(objective, torch.device("cpu"))
    draw = objective.example_batch(4)
    ((part,),) = draw.discriminator
    torch.manual_seed(0)
    for latents in (part.batch.real, part.batch.source, part.noise.real, part.noise.fake):
        latents.normal_()
    before = {name: tensor.clone() for name, tensor in weights(state).items()}
    learner = Learner(state, run.ema, SINGLE_PROCESS)
    figures = objective.update(learner, draw, objective.hyperparameters(0, 1_281_167))
    assert figures.isfinite().all()
    now = weights(state)
    assert not torch.equal(now["generator.final_layer.linear.weight"], before["generator.final_layer.linear.weight"])
    assert not torch.equal(now["discriminator.dis_embed"], before["discriminator.dis_embed"])
