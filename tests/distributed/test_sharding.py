"""Sharded runs on real processes: the same numbers as whole ones, and checkpoints that reshard.

As a program this is what the tests start: python -m tests.distributed.test_sharding FOLDER
"""

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.process_group import ProcessGroup, init_distributed, report_lost_rank
from afm_pipe.models.model_files import run_config, save_model
from afm_pipe.planning.budget import budget
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.checkpoints import checkpoints, load_latest, save_checkpoint
from afm_pipe.training.engine import Engine
from afm_pipe.training.sharding import local_shard
from afm_pipe.training.state import TrainingState
from afm_pipe.training.trainer import Trained
from tests.conftest import ROOT
from tests.distributed.test_data_parallel import difference
from tests.distributed.worker import CPU, UPDATES, RandomLatents, objective_of, run_groups, run_of, train_case

SHARDED, SPARING = Engine(shard=True), Engine(shard=True, checkpoint_activations=True)
GROUPS = (1, 2, 1, 2)  # processes; of two, each keeps a shard
CASES = {  # run, type, how the processes compute, micro-batch
    "steps": ("steps", torch.float64, SPARING, None),  # repeats, clipping, G replaced by its moving average
    "parts": ("guided", torch.float64, SHARDED, 2),
    "adversary": ("adversary", torch.float64, SPARING, 3),
    "float32": ("plain", torch.float32, SHARDED, None),
}


def outcome(trained: Trained, group: ProcessGroup, folder: Path) -> dict[str, Any]:
    """Return what runs are compared by; on the main process write the model as the stage does."""
    moments = [local_shard(value) for value in trained.state.tensors()["optimizer_generator"].values()]
    found = {"rows": trained.state.rows, "moments": sum(value.numel() for value in moments)}
    if group.is_main_process:
        save_model(folder / "model", trained.state.networks | {"generator": trained.state.ema}, {})
    return found


def error_of(act: Callable[[], Any]) -> str:
    try:
        with report_lost_rank():
            act()
    except UserError as error:
        return type(error).__name__
    return "none"


def fail(folder: Path, group: ProcessGroup) -> dict[str, str]:
    """Return what is raised where a process cannot write, and where one is gone."""
    state = TrainingState.fresh(objective_of("plain"), CPU, SHARDED, group)
    no_folder = folder / "a file"
    if group.is_main_process:
        no_folder.touch()
    found = {"first": error_of(lambda: save_checkpoint(no_folder, state, ""))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    found["second"] = error_of(lambda: save_checkpoint(folder / "full", state, ""))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if group.is_main_process:
        found["left"] = str([path.name for path in (folder / "full").iterdir()])
    group.barrier()
    if group.is_main_process:  # the other one ends
        x, labels = torch.zeros(1, 4, 4, 4), torch.zeros(1, dtype=torch.int64)
        found["gone"] = error_of(lambda: [state.networks["generator"](x, labels) for _ in range(1000)])
    return found


def work(folder: Path, stage: int) -> None:
    """Train as one process of a group; one run is resumed by every group from the checkpoint of the one before."""
    with init_distributed(CPU) as group:
        found: dict[str, Any] = {}
        if stage < 2:
            for name, (case, dtype, engine, micro_batch) in CASES.items():
                here, sharded = folder / f"{stage} {name}", stage == 1
                how, size = (engine, micro_batch) if sharded else (Engine(), None)
                reads = not (sharded and name == "float32")  # as on a GPU, in one case
                trained, _ = train_case(case, here, group, dtype, size, UPDATES, how, reads)
                found[name] = outcome(trained, group, here)
        run = folder / ("handed on" if stage else "never handed on")
        until, engine = UPDATES * (stage or len(GROUPS) - 1), SHARDED if group.world_size > 1 else Engine()
        trained, _ = train_case("plain", run, group, until=until, engine=engine)
        found["handed on"] = outcome(trained, group, run / str(stage))
        found["sharded"] = (checkpoints(run / "checkpoints")[-1] / "shards").is_dir()
        if stage == 1:
            found["errors"] = fail(folder, group)
        (folder / f"group{stage}-rank{group.rank}.json").write_text(json.dumps(found))
        if stage == 1:
            os._exit(0)  # a process is gone, so that the group cannot be left in order


def main(folder: Path) -> None:
    importlib.import_module("torch.distributed.fsdp")  # seconds, else of each process
    importlib.import_module("torch.distributed.checkpoint")
    run_groups(GROUPS, lambda size, stage: work(folder, stage))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.test_sharding", str(folder)], check=True, cwd=ROOT, timeout=900
    )
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What each process of each group found, by (group, rank)."""
    files = {(g, r): folder / f"group{g}-rank{r}.json" for g, size in enumerate(GROUPS) for r in range(size)}
    return {key: json.loads(file.read_text()) for key, file in files.items()}


@pytest.mark.parametrize(("case", "bound"), [("steps", 1e-8), ("parts", 1e-8), ("float32", 1e-3)])
def test_sharded_runs_have_the_numbers_and_the_model_of_whole_ones(
    folder: Path, outcomes: dict[tuple[int, int], dict[str, Any]], case: str, bound: float
) -> None:
    assert len(outcomes[0, 0][case]["rows"]) == 1
    assert difference(outcomes[0, 0][case], outcomes[1, 0][case]) < bound
    assert outcomes[1, 0][case]["rows"] == outcomes[1, 1][case]["rows"]
    for file in ("generator.safetensors", "discriminator.safetensors"):
        whole, sharded = (load_file(folder / f"{group} {case}" / "model" / file) for group in (0, 1))
        assert whole.keys() == sharded.keys()
        apart = torch.cat([(whole[name] - sharded[name]).abs().flatten() for name in whole])
        # In float32 AdamW's first steps are the signs of gradients, of which some are noise.
        assert float(apart.max() if bound == 1e-8 else apart.mean()) < bound / 10


def test_each_process_keeps_its_shard(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    whole = outcomes[0, 0]["parts"]["moments"]
    for rank in range(2):
        assert 0.49 < outcomes[1, rank]["parts"]["moments"] / whole < 0.51


def test_a_sharded_run_resumes_whole_and_sharded_again(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    assert difference(outcomes[0, 0]["handed on"], outcomes[3, 0]["handed on"]) < 1e-8
    assert [outcomes[group, 0]["sharded"] for group in range(len(GROUPS))] == [False, True, False, True]


def test_a_failure_on_one_process_ends_all(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    both = {"first": "UnwritableError", "second": "UnwritableError"}
    assert outcomes[1, 1]["errors"] == both
    assert outcomes[1, 0]["errors"] == both | {"left": "[]", "gone": "RankLostError"}


@pytest.mark.parametrize("damage", ["cut", "lost", "unlisted"])
def test_a_checkpoint_with_a_damaged_shard_is_passed_over(
    folder: Path, outcomes: dict[tuple[int, int], dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    shutil.copytree(folder / "1 float32" / "checkpoints", tmp_path / "checkpoints")
    (checkpoint,) = checkpoints(tmp_path / "checkpoints")
    shard = max((checkpoint / "shards").iterdir())
    if damage == "cut":
        os.truncate(shard, 1000)
    elif damage == "lost":
        shard.unlink()
    else:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"] = {name: file for name, file in manifest["files"].items() if "shards" not in name}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    state = TrainingState.fresh(objective_of("plain"), CPU)
    (line,) = load_latest(tmp_path / "checkpoints", state, "plain")
    assert "damaged" in line and "shards" in line
    assert state.update == 0


def test_sharding_is_a_launch_setting_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Engine.of(Launch(shard=True)) == SHARDED
    for other in ("compile", "ema_on_cpu"):
        with pytest.raises(ValidationError, match=f"expected either shard or {other}, found both"):
            Launch.model_validate({"shard": True, other: True})


def test_counted_memory_shrinks_with_shards() -> None:
    run = run_of("plain")
    config = run_config(run, RandomLatents.latent_shape, RandomLatents.num_classes).model_copy(update={"size": "b2"})
    whole, sharded = (budget(run, config, 4, shard=shard).state_bytes for shard in (False, True))
    assert whole / 4 < sharded < whole / 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
