"""One run, one owner: on one machine, and on two that share a file system whose flock stays on each."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from afm_pipe.runtime import lease
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.lease import HeldError, LeaseLostError, hold_lease, holder_of

INTERVAL, STALE = 0.1, 1.5
# A process on a machine of its own: it has another identity, and its flock is not seen elsewhere.
ELSEWHERE = f"""
import os, socket, sys, time
from pathlib import Path
from afm_pipe.runtime import lease
from afm_pipe.runtime.errors import UserError
lease.INTERVAL, lease.STALE = {INTERVAL}, {STALE}
lease._machine = socket.gethostname = lambda: sys.argv[1]
lease.fcntl.flock = lambda *_: None
try:
    with lease.hold_lease(Path("run")) as held:
        print("held", flush=True)
        sys.stdin.readline()
        held.check()
        Path("run/written").write_text(sys.argv[1])
        print("written", flush=True)
except UserError as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
"""


class Machine:
    """A process that asks for the folder `run` on a machine of its own."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-c", ELSEWHERE, name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def go_on(self) -> str:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.says()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Machine]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lease, "INTERVAL", INTERVAL)
    monkeypatch.setattr(lease, "STALE", STALE)
    machines: list[Machine] = []

    def start(name: str) -> Machine:
        machines.append(Machine(name))
        return machines[-1]

    yield start
    for each in machines:
        each.process.kill()
        each.process.communicate()


def test_two_machines_do_not_hold_one_folder(machine: Callable[[str], Machine]) -> None:
    first = machine("node-a")
    assert first.says() == "held"
    refused = machine("node-b").says()
    assert f"Found run held by process {first.process.pid} on node-a since 20" in refused
    assert first.go_on() == "written"
    assert machine("node-b").says() == "held"  # it was let go: no wait


def test_the_lease_of_a_machine_that_died_is_taken_over_when_it_is_stale(machine: Callable[[str], Machine]) -> None:
    first = machine("node-a")
    assert first.says() == "held"
    first.process.kill()
    first.process.wait()
    died = time.monotonic()
    second = machine("node-b")
    assert second.says() == "held"
    assert time.monotonic() - died > STALE - 2 * INTERVAL
    assert second.go_on() == "written"


def test_a_holder_that_was_suspended_finds_out_and_writes_nothing(machine: Callable[[str], Machine]) -> None:
    first = machine("node-a")
    assert first.says() == "held"
    first.process.send_signal(signal.SIGSTOP)
    second = machine("node-b")
    assert second.says() == "held"
    first.process.send_signal(signal.SIGCONT)
    said = first.go_on()
    assert said.startswith("LeaseLostError: Found run taken over by process")
    assert "on node-b since" in said
    assert not Path("run/written").exists()
    assert second.go_on() == "written"  # the first one let nothing go that is not its own


def test_of_many_that_wait_for_a_stale_lease_one_gets_it(machine: Callable[[str], Machine]) -> None:
    Path("run").mkdir()
    stale = Path("run/lease-000007")
    stale.write_text(json.dumps({"machine": "node-z", "host": "node-z", "pid": 1, "since": "long ago", "token": "z"}))
    os.utime(stale, (1, 1))
    said = [each.says() for each in [machine(f"node-{i}") for i in range(5)]]
    assert sorted(line == "held" for line in said) == [False] * 4 + [True]
    assert [path.name for path in Path("run").glob("lease-*")] == ["lease-000008"]


def test_a_clock_that_jumps_takes_nothing_from_a_holder_that_is_alive(machine: Callable[[str], Machine]) -> None:
    first = machine("node-a")
    assert first.says() == "held"
    (path,) = Path("run").glob("lease-*")
    jumping, ended = lease._file_system_time, threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_file_system_time", lambda folder: jumping(folder) + 3600)
        patch.setattr(lease, "_machine", lambda: "node-b")
        patch.setattr(lease.fcntl, "flock", lambda *_: None)
        with pytest.raises(UserError, match="held by process .* on node-a"), hold_lease(Path("run")):
            ended.set()
    assert not ended.is_set()
    assert path.exists()


def test_a_process_that_was_slow_to_take_over_finds_the_new_holder(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, create, others = Path("run/lease-000007"), lease._create, []
    stale.parent.mkdir()
    stale.write_text(json.dumps({"machine": "node-z"}))
    os.utime(stale, (1, 1))

    def slow(path: Path, token: str) -> bool:
        if not others:  # meanwhile node-b, which finds no lease, begins a new count
            stale.unlink()
            others.append(machine("node-b"))
            assert others[0].says() == "held"
        return create(path, token)

    monkeypatch.setattr(lease, "_create", slow)
    monkeypatch.setattr(lease.fcntl, "flock", lambda *_: None)
    with pytest.raises(HeldError, match="on node-b"), hold_lease(Path("run")):
        pass
    assert others[0].go_on() == "written"


def test_a_flock_that_the_file_server_keeps_for_a_dead_machine_is_no_holder(machine: Callable[[str], Machine]) -> None:
    Path("run").mkdir()
    stale = Path("run/lease-000002")
    stale.write_text(json.dumps({"machine": "node-z"}))
    os.utime(stale, (1, 1))
    with Path("run/lock").open("a") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        with hold_lease(Path("run")) as held:
            held.check()
        with pytest.raises(HeldError, match="another process"), hold_lease(Path("run")):
            pass  # without a lease of another machine, the flock decides


def test_on_one_machine_the_kernel_lets_go_at_once(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE", 60)
    code = "import time; from pathlib import Path; from afm_pipe.runtime.lease import hold_lease\n"
    code += "with hold_lease(Path('run')): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"held by process {holder.pid} on"), hold_lease(Path("run")):
            pass
    finally:
        holder.kill()
        holder.communicate()
    began = time.monotonic()
    with hold_lease(Path("run")) as held:
        assert time.monotonic() - began < 30
        held.check()
        held.path.write_text("{}")
        with pytest.raises(LeaseLostError):
            held.check()


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_who_holds_a_folder_is_known_whatever_the_clock_of_this_machine_says(
    project: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    here = time.time
    held = Path("run/lease-000001")
    held.parent.mkdir()
    held.write_text(json.dumps({"pid": 1, "host": "node-b"}))
    monkeypatch.setattr(lease, "_differences", {})
    monkeypatch.setattr(lease.time, "time", lambda: here() + ahead)
    assert holder_of(Path("run")) == "process 1 on node-b"
    os.utime(held, (here() - 60, here() - 60))
    assert holder_of(Path("run")) is None
    assert [path.name for path in Path("run").iterdir()] == [held.name]
