"""A run that is killed, sent a termination signal or orphaned resumes to the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.training.checkpoints import checkpoints
from afm_pipe.training.trainer import Trainer
from tests.conftest import ROOT
from tests.crash import OVERRIDES, RUN, crash, result, start, train, wait

# As DVC does it: a shell in between, and no signal to the stage when it ends.
PARENT = """
import os, subprocess, sys
os.environ["DVC_STAGE"] = "train@t4"
subprocess.Popen(["/bin/sh", "-c", f"{sys.executable} stage.py; true"]).wait()
"""
STAGE = f"""
import torch; torch.set_num_threads(1)
from afm_pipe.runtime.commands import user_command
from afm_pipe.params.file import load_params
from tests.crash import train
open("stage.pid", "w").write(str(__import__("os").getpid()))
user_command(train(load_params(overrides={OVERRIDES}), 1000.0))()
"""


@pytest.fixture(scope="module")
def params(discs: Path) -> Params:
    return load_params(discs / "params.yaml", OVERRIDES)


@pytest.fixture(scope="module")
def expected(discs: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run makes."""
    project, before = tmp_path_factory.mktemp("alone") / "project", Path.cwd()
    shutil.copytree(discs, project)
    os.chdir(project)
    try:
        assert wait(start(train(params, 1000))) == 0
        return result()
    finally:
        os.chdir(before)


@pytest.fixture
def project(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(discs, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # stages here are scripts that import these tests
    return tmp_path / "project"


def until(true: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.01)


def rows() -> int:
    return sum(len(path.read_text().splitlines()) - 1 for path in paths.WORK.glob(f"{RUN}/*/curves.csv"))


def updates() -> list[int]:
    (folder,) = paths.WORK.glob(f"{RUN}/*/checkpoints")
    return [json.loads((path / "manifest.json").read_text())["update"] for path in checkpoints(folder)]


def test_runs_killed_at_random_moments_end_with_the_same_bits(discs: Path, params: Params) -> None:
    found = crash(discs, params, 5, random.Random(int(time.time())))
    assert found["kills"] == found["identical"] == 5, found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_termination_signal_writes_a_checkpoint_and_says_what_to_do(
    project: Path, params: Params, expected: dict[str, bytes], number: signal.Signals, code: int
) -> None:
    child = start(train(params, 1000), project / "said")
    until(lambda: rows() >= 1)
    os.kill(child, number)
    assert wait(child) == code
    assert len(updates()) == 1
    said = (project / "said").read_text()
    assert f"stopped by {number.name}: " in said
    assert ("exit code 75 requests a restart" if code == 75 else "to resume, run the same command again.") in said
    assert "Traceback" not in said
    assert not list(paths.WORK.glob(f"{RUN}/lease-*"))
    assert wait(start(train(params, 1000))) == 0
    assert result() == expected


def test_a_second_interrupt_ends_a_run_at_once(
    project: Path, params: Params, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def long(self: Trainer, batch: list[Any]) -> torch.Tensor:
        if self.state.update == 15:
            Path("busy").touch()
            time.sleep(60)
        return update(self, batch)

    monkeypatch.setattr(Trainer, "update", long)
    child = start(train(params, 0), project / "said")
    monkeypatch.undo()
    os.chdir(project)
    until(Path("busy").exists)
    began = time.monotonic()
    os.kill(child, signal.SIGINT)
    time.sleep(0.3)
    os.kill(child, signal.SIGINT)
    assert wait(child) == 130
    assert time.monotonic() - began < 30
    assert "stopped at once by SIGINT" in (project / "said").read_text()
    assert wait(start(train(params, 1000))) == 0
    assert result() == expected


def test_data_cut_short_in_mid_epoch_end_a_run_with_a_checkpoint(
    project: Path, params: Params, expected: dict[str, bytes]
) -> None:
    whole = paths.LATENTS.read_bytes()
    child = start(train(params, 1000), project / "said")
    until(lambda: rows() >= 1)
    os.truncate(paths.LATENTS, 5000)
    assert wait(child) == 1
    assert "latents.h5 changed while it was read, from" in (project / "said").read_text()
    assert len(updates()) == 1
    paths.LATENTS.write_bytes(whole)
    assert wait(start(train(params, 1000))) == 0
    assert result() == expected


@pytest.mark.slow  # three processes import torch
def test_a_stage_whose_dvc_is_gone_ends_with_a_checkpoint(project: Path, expected: dict[str, bytes]) -> None:
    Path("stage.py").write_text(STAGE)
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stderr=subprocess.DEVNULL)
    until(lambda: rows() >= 1)
    parent.terminate()
    parent.wait()
    stage = int(Path("stage.pid").read_text())
    until(lambda: not Path(f"/proc/{stage}").exists())
    assert len(updates()) == 1
    subprocess.run([sys.executable, "stage.py"], check=True, capture_output=True)
    assert result() == expected


@pytest.mark.slow  # dvc and the stage import what they need, twice
def test_a_terminated_dvc_repro_leaves_no_trainer_and_resumes(
    project: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"{sys.executable} stage.py"
    stage = {"cmd": command, "deps": ["params.yaml"], "outs": [{str(paths.model(RUN)): {"cache": False}}]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": {"foreach": [RUN], "do": stage}}}))
    Path("stage.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    dvc = [sys.executable, "-m", "dvc", "repro", f"train@{RUN}"]
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    running = subprocess.Popen(dvc, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: rows() >= 1)
    running.terminate()
    running.wait()
    trainer = int(Path("stage.pid").read_text())
    until(lambda: not Path(f"/proc/{trainer}").exists())
    assert len(updates()) == 1
    assert not paths.model(RUN).exists()
    subprocess.run(dvc, check=True, capture_output=True)
    assert result() == expected
