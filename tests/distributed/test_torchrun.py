"""Several processes from the command line: they start, fail and end together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.sbatch import array_script, batch_script
from afm_pipe.distributed.torchrun import run_processes
from tests.conftest import ROOT

RUN = [sys.executable, "-m", "afm_pipe", "train", "t4", "--nproc-per-node", "2"]


@pytest.fixture
def project(discs: Path, tmp_path: Path) -> Path:
    shutil.copytree(discs, tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.slow  # two processes import torch twice
def test_the_command_line_starts_ranks_and_goes_on_alone(project: Path) -> None:
    short = ["--set", "runs.t4.phases=[{until_epoch: 2}]"]
    done = subprocess.run([*RUN, *short], cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "15/15 updates" in done.stderr
    cost = json.loads((project / "results/costs/t4.json").read_text())
    assert (cost["ranks"], cost["threads"], cost["updates"]) == (2, 1, 15)
    rows = (project / "results/curves/t4.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["update", "10", "15"]


@pytest.mark.slow
def test_the_ranks_of_a_stage_run_the_code_beside_it(project: Path) -> None:
    for folder in ("stages", "afm_pipe"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (project / "afm_pipe" / "data" / "order.py").open("a") as file:
        file.write("import os\nprint('order of', __file__, os.environ.get('RANK'), flush=True)\n")
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["runs"]["t4"] = {"phases": [{"until_epoch": 2}]}
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    env = os.environ | {"PYTHONPATH": str(ROOT), "AFM_NPROC_PER_NODE": "2"}  # stands for the editable install
    done = subprocess.run(
        [sys.executable, "stages/train.py", "t4"],
        cwd=project, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert f"order of {project / 'afm_pipe' / 'data' / 'order.py'} {rank}\n" in done.stdout


@pytest.mark.slow
def test_a_mistake_on_all_ranks_is_said_once(project: Path) -> None:
    done = subprocess.run(
        [*RUN, "--set", "runs.t4.lr=1.0e+20"], cwd=project, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert "expected a finite one" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False], ids=["a rank is killed", "the scheduler asks"])
def test_one_end_is_the_end_of_all(project: Path, killed: bool) -> None:
    long = ["--set", "runs.t4.phases=[{until_epoch: 800}]"]
    trainer = subprocess.Popen([*RUN, *long], cwd=project, stderr=subprocess.PIPE, text=True)
    ranks: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 200
        while not any(file.read_text().count("\n") > 1 for file in project.glob("work/t4/*/curves.csv")):
            assert trainer.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        ranks = psutil.Process(trainer.pid).children()
        assert len(ranks) == 2
        if killed:
            ranks[1].kill()
        else:
            trainer.send_signal(signal.SIGUSR1)
        said = trainer.communicate(timeout=100)[1]
        assert not any(rank.is_running() for rank in ranks)
        saved = list(project.glob("work/t4/*/checkpoints/update-*/manifest.json"))
        assert "Traceback" not in said
        if killed:
            assert trainer.returncode == 1 and said.count("error:") == 1 and "rank 1 killed by SIGKILL" in said
        else:
            assert trainer.returncode == 75 and saved and said.count("exit code 75") == 1
    finally:
        for process in [trainer, *ranks]:
            if process.poll() is None if process is trainer else process.is_running():
                process.kill()


@pytest.mark.parametrize(
    ("exits", "code", "said"),
    [
        ((1, -signal.SIGKILL), 1, "rank 1 killed by SIGKILL"),  # the other heard of it, and ended, first
        ((-signal.SIGTERM, 1), 1, ""),  # torchrun ended the other
        ((-signal.SIGTERM, -signal.SIGSEGV), 1, "rank 1 killed by SIGSEGV"),
        ((2, 3), 2, ""),
    ],
)
def test_the_rank_is_named_that_the_others_ended_because_of(
    exits: tuple[int, int], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing import errors

    failures = {rank: errors.ProcessFailure(rank, 100 + rank, exits[rank], "") for rank in (0, 1)}
    for rank, failure in failures.items():
        failure.timestamp = rank

    def fail(_: object) -> None:
        raise errors.ChildFailedError("afm-pipe", failures)

    monkeypatch.setattr("torch.distributed.run.run", fail)
    for name in ("signal.signal", "logging.disable"):
        monkeypatch.setattr(name, lambda *_: None)
    assert run_processes(Launch(nproc_per_node=2), ["-m", "afm_pipe"]) == code
    written = capsys.readouterr().err
    assert said in written and bool(written) == bool(said)


def test_the_batch_script_is_one_that_bash_reads() -> None:
    script = batch_script(["train", "xl2", "--set", "runs.xl2.seed=1"], nodes=2, gpus=8, time="12:00:00")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "srun afm-pipe train xl2 --set runs.xl2.seed=1 &" in script
    assert 'scontrol requeue "$job"' in script


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(0, 0, 0), (75, 9, 1), (137, 4, 1), (137, 5, 0), (1, 0, 0)])
def test_a_task_of_an_array_runs_its_trial_and_is_requeued_when_killed(
    tmp_path: Path, code: int, restarts: int, requeued: int
) -> None:
    script = array_script(["tables", "a b"], ["first", "second"], gpus=0, time="1:00", at_once=8)
    assert "#SBATCH --array=0-1%8\n" in script and "gpus" not in script
    for name, words in {"srun": f'echo "$@"; exit {code}', "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{words}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": str(restarts)}
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash"], input=script, env=path | variables, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == "afm-pipe tables a b --trial second\n" + "requeue 7_1\n" * requeued
