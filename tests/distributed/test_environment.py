"""Variables that launchers leave in the environment: obeyed, ignored or refused, and never a silent hang."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.process_group import init_distributed
from afm_pipe.distributed.torchrun import launch_processes
from afm_pipe.runtime.environment import VARIABLES, env_rank, env_world_size, local_world_size, under_launcher
from afm_pipe.runtime.errors import UserError
from tests.conftest import ROOT

WAITING = """
import sys, torch
from afm_pipe.distributed import process_group
from afm_pipe.runtime.commands import user_command
process_group.SAY_SECONDS, process_group.JOIN_SECONDS = 0.3, float(sys.argv[1])
def main():
    with process_group.init_distributed(torch.device("cpu")):
        print("joined")
user_command(main)()
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")


def set_all(monkeypatch: pytest.MonkeyPatch, values: str) -> None:
    for word in values.split():
        monkeypatch.setenv(*word.split("=", 1))


@pytest.mark.parametrize(
    "values", ["RANK=0 WORLD_SIZE=1", "WORLD_SIZE=1", "RANK=0 WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=1"]
)
def test_a_group_of_one_is_ignored_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], values: str
) -> None:
    set_all(monkeypatch, values)
    assert not under_launcher()
    assert f"Ignored {values} in the environment" in capsys.readouterr().err
    started = []
    monkeypatch.setattr("afm_pipe.distributed.torchrun.run_processes", lambda *args: started.append(args) or 0)
    with pytest.raises(SystemExit):
        launch_processes(Launch(nproc_per_node=2))
    assert started, "--nproc-per-node counts"


@pytest.mark.parametrize(
    "values",
    [
        "WORLD_SIZE=2",
        "RANK=1",
        "RANK=0 WORLD_SIZE=2",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a",
        "RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1",
        "RANK=x WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=x",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR= MASTER_PORT=1",
        "RANK=-1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1",
    ],
)
def test_an_incomplete_or_inconsistent_group_is_refused(monkeypatch: pytest.MonkeyPatch, values: str) -> None:
    set_all(monkeypatch, values)
    with pytest.raises(UserError, match="in the environment, (without|which do not fit).*expected RANK, WORLD_SIZE"):
        launch_processes(Launch())
    with pytest.raises(UserError, match="in the environment"), init_distributed(torch.device("cpu")):
        pass
    assert (env_rank(), env_world_size()) == (0, 1), "other commands run as one process"


@pytest.mark.parametrize("values", ["LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE=x LOCAL_RANK=7", "LOCAL_WORLD_SIZE=64"])
def test_variables_of_a_machine_without_a_group_change_nothing(monkeypatch: pytest.MonkeyPatch, values: str) -> None:
    set_all(monkeypatch, values)
    assert local_world_size() == 1
    assert not under_launcher()
    set_all(monkeypatch, "RANK=0 WORLD_SIZE=64 MASTER_ADDR=a MASTER_PORT=1")
    assert local_world_size() == (64 if values.endswith("64") else 1)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        set_all(monkeypatch, f"RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
        message = f"Found 127.0.0.1:{port} in use by another program"
        with pytest.raises(UserError, match=message), init_distributed(torch.device("cpu")):
            pass


def test_a_complete_group_is_obeyed_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_all(monkeypatch, "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500")
    assert under_launcher()
    assert (env_rank(), env_world_size()) == (0, 2)
    assert "Obeyed RANK=0 WORLD_SIZE=2" in capsys.readouterr().err


def waiting(seconds: float) -> "subprocess.Popen[str]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WAITING, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | place, stderr=subprocess.PIPE, text=True)


def test_a_process_that_waits_says_for_whom_and_a_signal_ends_it_at_once() -> None:
    with waiting(600) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        said = next(line for line in lines if "waits for 1 other processes at 127.0.0.1:" in line)
        assert said.endswith("of at most 600 s\n")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        assert time.monotonic() - began < 20
        assert "stopped by SIGTERM" in process.stderr.read()


def test_a_process_whose_group_does_not_come_ends_with_a_message() -> None:
    with waiting(1) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == 1
        assert "error: Found no 1 other processes at 127.0.0.1:" in said
        assert "Traceback" not in said
