"""How long all stages take on this machine, said before the first of them trains anything."""

import multiprocessing
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.params.file import load_params
from afm_pipe.planning import here
from afm_pipe.runtime.errors import UserError
from tests.conftest import SMOKE, write_images
from tests.interrupts import interrupted

LAUNCH = Launch(device="cpu", workers=2)
RUNS = (
    "runs={a: {seed: 0, size: s4, batch_size: 10, phases: [{until_epoch: 30}]}, b: {seed: 1, size: s4, batch_size: 10, "
    "phases: [{until_epoch: 60}]}}"
)
SETTINGS = (RUNS, "guided={}", "tables={}", "data.source=folder", "data.root=images", "data.min_images=1")


def prepared(*settings: str) -> None:
    write_images(Path("images"), per_class=20)  # of three classes
    pipeline.prepare(load_params(SMOKE, [*SETTINGS, "held_out=null", "reference.thumbnails=4", *settings]))


def minutes(*settings: str) -> int:
    params = load_params(SMOKE, [*SETTINGS, "held_out=null", *settings])
    said = pipeline.time_text(params, LAUNCH)
    return int(re.search(r"^About (\d+) minutes for all stages", said)[1])  # type: ignore[index]


def test_the_time_is_that_of_all_trainings_on_all_workers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "seconds_on_all", lambda *_: 10.0)
    prepared()
    updates = 90 * 60 // 10  # epochs of 60 images
    expected = updates * 10 / 60 / 2 / here.TRAINING_OF_POOL / here.POOL_OF_ALL
    assert minutes() == round(expected)
    assert minutes("runs.b.phases=[{until_epoch: 150}]") == round(2 * expected)


def test_an_update_is_measured(project: Path) -> None:
    prepared()
    said = pipeline.time_text(load_params(SMOKE, [*SETTINGS, "held_out=null"]), LAUNCH)
    assert re.search(r"2 runs and trials, 2 at a time, 0\.\d+ s for an update of a\. ", said)


def test_processes_that_measure_have_one_thread_as_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "update_seconds", lambda *_: torch.get_num_threads())
    spawn, before = multiprocessing.get_context("spawn"), torch.get_num_threads()
    answers, answer = spawn.Pipe(duplex=False)
    run: Any = SimpleNamespace(batch_size=1)
    config: Any = None
    torch.set_num_threads(2)
    try:
        here._measure(answer, spawn.Barrier(1), None, run, config, LAUNCH)
    finally:
        torch.set_num_threads(before)
    assert answers.recv() == 1


@pytest.mark.parametrize("which", [0, -1])
def test_a_process_that_is_killed_costs_the_estimate_alone(project: Path, which: int) -> None:
    prepared()

    def kill_one() -> None:
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        time.sleep(0.3)  # they import
        sorted(children, key=lambda child: child.pid or 0)[which].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    said = pipeline.time_text(load_params(SMOKE, [*SETTINGS, "held_out=null"]), LAUNCH)
    killer.join()
    assert said.startswith("No estimate of the time: one of 2 processes was killed, perhaps for lack of memory.")


INTERRUPTED = """
import sys

from afm_pipe.planning import here
from afm_pipe.runtime.commands import user_command
from tests.interrupts import Loading

user_command(here.seconds_on_all)(2, Loading(sys.argv[1]), None, None)
"""


def test_ctrl_c_while_the_processes_start_is_one_line(tmp_path: Path) -> None:
    said = "stopped by SIGINT: to resume, run the same command again.\n"
    assert interrupted(INTERRUPTED, tmp_path, 2) == (said, 130)


def test_images_of_the_workspace_count_in_a_copy_of_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, `prepare` records where it found them, not the root that params name."""
    monkeypatch.setattr(here, "seconds_on_all", lambda *_: 10.0)
    prepared()
    assert pipeline.time_text(load_params(SMOKE, [*SETTINGS, "held_out=null", "data.root=../images"]), LAUNCH)


def test_without_images_or_without_a_pool_nothing_is_invented(project: Path) -> None:
    params = load_params(SMOKE, [*SETTINGS, "held_out=null"])
    with pytest.raises(UserError, match=r"Found no data/manifest\.json, expected the images"):
        pipeline.time_text(params, LAUNCH)
    prepared()
    assert "there is one worker" in pipeline.time_text(params, Launch(device="cpu", workers=1))
    large = load_params(SMOKE, [*SETTINGS, "held_out=null", "runs.b.size=b2"])
    assert "b is not trained by the pool" in pipeline.time_text(large, LAUNCH)
