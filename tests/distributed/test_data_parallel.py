"""One training on 1, 2 and 3 ranks, whole and in parts: the same numbers, one writer, and an end for all."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.sbatch import batch_script
from afm_pipe.distributed.torchrun import run_processes
from tests.conftest import ROOT
from tests.rank_worker import BATCH, UPDATES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """What each rank of each group found: by (group, rank), of groups of 1, 2, 3 and again 1 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, "-m", "tests.rank_worker", str(folder)], check=True, cwd=ROOT, timeout=300)
    files = {(g, r): folder / f"group{g}-rank{r}.json" for g, size in enumerate((1, 2, 3, 1)) for r in range(size)}
    return {key: json.loads(file.read_text()) for key, file in files.items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two curves, relative where figures are above 1."""
    assert [row["update"] for row in one["rows"]] == [row["update"] for row in other["rows"]]
    pairs = [(a[name], b[name]) for a, b in zip(one["rows"], other["rows"], strict=True) for name in a]
    return max(abs(a - b) / max(abs(a), 1) for a, b in pairs)


@pytest.mark.parametrize(
    ("group", "case"), [(0, "parts"), (1, "guided"), (1, "steps"), (1, "parts"), (2, "guided"), (2, "parts")]
)
def test_losses_do_not_depend_on_ranks_nor_parts(
    outcomes: dict[tuple[int, int], dict[str, Any]], group: int, case: str
) -> None:
    alone = outcomes[0, 0]["guided" if case == "parts" else case]
    assert len(alone["rows"]) == UPDATES // 10
    found = outcomes[group, 0][case]
    assert difference(alone, found) < 1e-8
    assert alone["mean_square"] == pytest.approx(found["mean_square"], rel=1e-8)


def test_losses_in_float32_are_near(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    assert difference(outcomes[0, 0]["float32"], outcomes[1, 0]["float32"]) < 1e-3


def test_all_ranks_end_with_the_same_bits(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    for (group, _), found in outcomes.items():
        assert {**found, "read": 0} == {**outcomes[group, 0], "read": 0}
        assert len(found["passed on"]["watch"]["probes"]) == group + 1


def test_a_rank_reads_its_own_latents_alone(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    for group, size in ((0, 1), (1, 2), (2, 3)):
        assert [outcomes[group, rank]["read"] for rank in range(size)] == [2 * UPDATES * BATCH // size] * size


def test_a_training_goes_on_with_other_ranks_and_back(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    never, passed_on = outcomes[0, 0]["never passed on"], outcomes[2, 0]["passed on"]
    assert difference(never, passed_on) < 1e-8
    assert outcomes[3, 0]["passed on"]["rows"][:3] == passed_on["rows"]  # what the last rank, alone again, took up


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
    cost = json.loads((project / "costs/t4.json").read_text())
    assert (cost["ranks"], cost["threads"], cost["updates"]) == (2, 1, 15)
    rows = (project / "curves/t4.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["update", "10", "15"]


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
            assert trainer.returncode == 1 and said.count("error:") == 1 and "rank 1 ended by SIGKILL" in said
        else:
            assert trainer.returncode == 75 and saved and said.count("exit code 75") == 1
    finally:
        for process in [trainer, *ranks]:
            if process.poll() is None if process is trainer else process.is_running():
                process.kill()


@pytest.mark.parametrize(
    ("exits", "code", "said"),
    [
        ((1, -signal.SIGKILL), 1, "rank 1 ended by SIGKILL"),  # the other heard of it, and ended, first
        ((-signal.SIGTERM, 1), 1, ""),  # torchrun ended the other
        ((-signal.SIGTERM, -signal.SIGSEGV), 1, "rank 1 ended by SIGSEGV"),
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
    assert "-eq 75 ]; then scontrol requeue" in script
