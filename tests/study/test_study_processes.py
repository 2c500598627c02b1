"""Trials of tables on several processes: the same results, nothing lost when one is killed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from tests.study.measured_trials import ONE, TABLE, measurements, trainings, trials


@pytest.mark.slow  # two workers import torch
def test_results_do_not_depend_on_the_number_of_workers(project: Path) -> None:
    pipeline.tables(load_params(), [], ONE)
    alone = {row: trial["probes"] for row, trial in trials("transport").items()}
    shutil.rmtree(paths.TRIALS)
    pipeline.tables(load_params(), [], Launch(device="cpu", workers=2))
    assert {row: trial["probes"] for row, trial in trials("transport").items()} == alone


def long_study(project: Path) -> subprocess.Popen[bytes]:
    """Start two workers on two endless trials."""
    code = """
from afm_pipe import pipeline
from afm_pipe.runtime.commands import user_command
from afm_pipe.distributed.launch import Launch
from afm_pipe.params.file import load_params
if __name__ == "__main__":
    user_command(pipeline.tables)(load_params(), [], Launch(device="cpu", workers=2, checkpoint_seconds=1000))
"""
    (project / "study.py").write_text(code)
    return subprocess.Popen([sys.executable, str(project / "study.py")], stderr=subprocess.DEVNULL)


def workers_of(parent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(parent.pid).children()
    workers = [child for child in children if "resource_tracker" not in str(child.cmdline())]
    assert len(workers) == 2
    return workers


LONG = TABLE.replace("base: {}", "base: {phases: [{until_epoch: 100000}]}")


def test_workers_end_with_their_parent(declare: Callable[..., Params], project: Path) -> None:
    declare(long=LONG)
    parent = long_study(project)
    try:
        wait_until(lambda: len(list(paths.TRIALS.glob("*/curves.csv"))) == 2)
        workers = workers_of(parent)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(worker.is_running() for worker in workers))


SLURM = {
    "srun": 'exec "$@"',
    "scontrol": 'touch "requeue-${2#*_}"',
    "sbatch": """
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
export SLURM_ARRAY_JOB_ID=1
task() {
  export SLURM_ARRAY_TASK_ID=$2 SLURM_RESTART_COUNT=0
  while true; do
    rm -f "requeue-$2"; bash "$1"; [ -e "requeue-$2" ] || return
    echo "$2" >> requeued; SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
  done
}
for i in $(seq 0 $n); do task "$1" $i & done
wait""",
    "afm-pipe": f'exec {sys.executable} -m afm_pipe "$@"',
}


@pytest.mark.slow  # some processes import torch
@pytest.mark.parametrize("way", ["workers", "sbatch"])
def test_a_study_of_several_processes_trains_every_trial_once(
    declare: Callable[..., Params], project: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    params = declare(transport=TABLE.replace("base: {}", "base: {phases: [{until_epoch: 40}]}"))
    for name, script in SLURM.items():
        (project / "bin" / name).parent.mkdir(exist_ok=True)
        (project / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (project / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{project / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("AFM_WORKERS", "1")
    monkeypatch.setenv("AFM_CHECKPOINT_SECONDS", "0.5")
    assert subprocess.check_output(["afm-pipe", "tables", "--dry-run"], text=True).count("not begun") == 2
    if way == "sbatch":
        script = subprocess.check_output(["afm-pipe", "sbatch", "tables", "transport", "--gpus", "0"])
        Path("study.sbatch").write_bytes(script)
        commands = [["sbatch", "study.sbatch"]]
    else:
        commands = [["afm-pipe", "tables", "--worker"]] * 3
    started = [subprocess.Popen(command) for command in commands]
    try:
        wait_until(lambda: len(list(paths.TRIALS.glob("*/curves.csv"))) == 2)
        trainer = next(paths.TRIALS.glob("*/lease-*"))
        os.kill(json.loads(trainer.read_text())["pid"], 9)
        codes = sorted(each.wait(500) for each in started)
    finally:
        for each in started:
            each.kill()
    assert codes == ([0] if way == "sbatch" else [-9, 0, 0])
    assert not paths.table("transport").exists()
    assert way == "workers" or Path("requeued").read_text().split()
    shared, before = trainings(), measurements()
    assert len(shared) == len(before) == 2
    pipeline.tables(params, [], ONE)  # collects
    assert (trainings(), measurements()) == (shared, before)
    together = {row: trial["probes"] for row, trial in trials("transport").items()}
    shutil.rmtree(paths.TRIALS)
    pipeline.tables(params, [], ONE)
    assert {row: trial["probes"] for row, trial in trials("transport").items()} == together


@pytest.mark.slow  # six processes import torch
def test_a_terminated_study_checkpoints_every_trial_and_resumes(declare: Callable[..., Params], project: Path) -> None:
    declare(long=LONG.replace("100000", "1000"))  # a row every ten updates
    reached = [0, 0]
    for _ in range(2):
        parent = long_study(project)
        try:
            # The head, and a row more than the checkpoint's.
            wait_until(lambda then=reached: all(rows > 1 + at // 10 for rows, at in zip(lines(), then, strict=True)))
            workers = workers_of(parent)
            parent.terminate()
            assert parent.wait(120) == 75
        finally:
            parent.kill()
        assert not any(worker.is_running() for worker in workers)
        found = [max(paths.TRIALS.glob(f"{trial}/checkpoints/update-*"), default=None) for trial in names()]
        assert all(path is not None and (path / "manifest.json").is_file() for path in found)
        before, reached = reached, [int(path.name.removeprefix("update-")) for path in found if path is not None]
        assert all(now > then for now, then in zip(reached, before, strict=True))


def names() -> list[str]:
    return sorted(path.parent.name for path in paths.TRIALS.glob("*/curves.csv"))


def lines() -> list[int]:
    """Return the number of lines in the curves of both trials."""
    counts = [len((paths.TRIALS / name / "curves.csv").read_text().splitlines()) for name in names()]
    return counts if len(counts) == 2 else [0, 0]


def wait_until(true: Callable[[], bool], seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.1)
