"""The training loop survives: killed, damaged, out of disk or out of range, it goes on to the same weights."""

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
from safetensors.torch import load_file

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.models.model_files import ModelConfig
from afm_pipe.params import Params, Run
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.lease import hold_lease
from afm_pipe.training.checkpoints import checkpoints, load_latest
from afm_pipe.training.state import TrainingState

# Launch settings under which every row of the curves, 10 updates apart, is a checkpoint.
OFTEN = Launch(device="cpu", checkpoint_seconds=0)
STAGE = """
import sys, torch
torch.set_num_threads(1)
from afm_pipe import pipeline
from afm_pipe.runtime.commands import user_command
from afm_pipe.distributed.launch import Launch
from afm_pipe.params.file import load_params
print("ready", flush=True)
user_command(pipeline.train)(load_params(), "t4", Launch(device="cpu", checkpoint_seconds=0))
"""


@pytest.fixture
def project(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own with latents encoded, ready to train."""
    shutil.copytree(discs, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    torch.set_num_threads(1)
    return tmp_path / "project"


@pytest.fixture(scope="module")
def uninterrupted(discs: Path, discs_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the run t4 was trained without a break."""
    project = tmp_path_factory.mktemp("uninterrupted") / "project"
    shutil.copytree(discs, project)
    before = Path.cwd()
    os.chdir(project)
    try:
        pipeline.train(discs_params, "t4", OFTEN)
    finally:
        os.chdir(before)
    return project


def same_outputs(one: Path, other: Path) -> bool:
    files = [paths.model("t4") / name for name in ("generator.safetensors", "discriminator.safetensors", "config.json")]
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in [*files, paths.curves("t4")])


def work_dir(project: Path) -> Path:
    (folder,) = [path for path in (project / "work" / "t4").iterdir() if path.is_dir()]
    return folder


def test_training_writes_model_curves_and_cost(uninterrupted: Path, discs_params: Params) -> None:
    config = json.loads((uninterrupted / paths.model("t4") / "config.json").read_text())
    weights = load_file(uninterrupted / paths.model("t4") / "generator.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == config["generator_parameters"]
    assert config["run"] == json.loads(json.dumps(discs_params.runs["t4"].model_dump()))
    rows = (uninterrupted / paths.curves("t4")).read_text().splitlines()
    assert len(rows) == 1 + config["updates"] // 10
    cost = json.loads((uninterrupted / paths.costs("t4")).read_text())
    assert cost["images"] == config["images_seen"]
    assert 0 < cost["data_wait_share"] < 1


def test_a_run_that_is_finished_is_not_trained_again(
    uninterrupted: Path, discs_params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    shutil.rmtree(paths.model("t4"))
    before = (work_dir(Path.cwd()) / "checkpoints").stat().st_mtime_ns
    pipeline.train(discs_params, "t4", OFTEN)
    assert same_outputs(Path.cwd(), uninterrupted)
    assert (work_dir(Path.cwd()) / "checkpoints").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    uninterrupted: Path, project: Path, discs_params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted / "work", "work", dirs_exist_ok=True)
    newest = checkpoints(work_dir(project) / "checkpoints")[-1]
    os.truncate(newest / "ema.safetensors", 1000)
    pipeline.train(discs_params, "t4", OFTEN)
    assert "ema.safetensors is not what the manifest says" in capsys.readouterr().out
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
        lose("extra.json", "ema.safetensors", "normalizer.safetensors", "manifest.json"),
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
    with pytest.raises(UserError, match="made with other params, data or code"):
        load_latest(folder, fresh_state(uninterrupted), "0" * 16)


def test_other_params_start_from_nothing(
    uninterrupted: Path, project: Path, discs_params: Params, change: Callable[..., Params]
) -> None:
    shutil.copytree(uninterrupted / "work", "work", dirs_exist_ok=True)
    pipeline.train(change("runs.t4.lr=0.002"), "t4", OFTEN)
    assert len([path for path in Path("work/t4").iterdir() if path.is_dir()]) == 2
    assert not same_outputs(project, uninterrupted)


def test_a_second_trainer_of_the_same_run_is_refused(project: Path, discs_params: Params) -> None:
    with hold_lease(Path("work/t4")), pytest.raises(UserError, match=f"held by process {os.getpid()} on"):
        pipeline.train(discs_params, "t4", OFTEN)


def test_a_full_disk_leaves_the_last_checkpoint_whole(project: Path, uninterrupted: Path) -> None:
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))\n{STAGE}"
    failed = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "not writable" in failed.stderr and "error: Found work/t4/" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(Path("work").rglob("update-*"))
    assert not list(Path("work").rglob("*.partial"))
    assert not paths.model("t4").exists()
    subprocess.run([sys.executable, "-c", STAGE], check=True, capture_output=True)
    assert same_outputs(project, uninterrupted)


def test_a_clock_that_jumps_changes_nothing(
    project: Path, uninterrupted: Path, discs_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, itertools.cycle([0.0, 1e7, -1e7, 3600.0])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    pipeline.train(discs_params, "t4", OFTEN)
    assert same_outputs(project, uninterrupted)
    cost = json.loads(paths.costs("t4").read_text())
    assert 0 < cost["seconds"] < 1000


def test_a_loss_that_is_not_finite_stops_before_the_update(project: Path, change: Callable[..., Params]) -> None:
    with pytest.raises(UserError, match=r"loss of (nan|inf) at update \d+, expected a finite one"):
        pipeline.train(change("runs.t4.lr=1.0e+20"), "t4", OFTEN)
    assert not paths.model("t4").exists()


def test_a_run_too_large_for_memory_is_refused_before_allocating(project: Path, change: Callable[..., Params]) -> None:
    params = change("runs.t4.size=xl2", "runs.t4.batch_size=4096")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"GiB of memory free on cpu, expected [\d.]+ GiB for the run t4"):
        pipeline.train(params, "t4", OFTEN)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10


def fresh_state(project: Path) -> TrainingState:
    config = json.loads((project / paths.model("t4") / "config.json").read_text())
    return TrainingState.fresh(
        ModelConfig.model_validate(config["model"]), Run.model_validate(config["run"]), torch.device("cpu")
    )
