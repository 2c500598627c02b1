"""Sharded trainings, each rank a real process: the same numbers as whole ones, and checkpoints that reshard.

As a program this is what the tests start and look at the outcome of: python -m tests.test_sharding FOLDER
"""

import importlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from afm_pipe.training.loop import Trained, train
from afm_pipe.training.update import Updates
from pydantic import ValidationError
from safetensors.torch import load_file

from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.process_group import ProcessGroup, init_distributed, report_lost_rank
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import ModelConfig, run_config, save_model
from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.budget import budget
from afm_pipe.runtime.errors import UserError
from afm_pipe.training import loop
from afm_pipe.training.checkpoints import checkpoints, load_latest, save_checkpoint
from afm_pipe.training.engine import Engine
from afm_pipe.training.sharding import local
from afm_pipe.training.state import TrainingState
from tests.conftest import ROOT
from tests.rank_worker import CPU, RandomLatents, run_of

UPDATES = 10  # a row of the curves
SHARDED, SPARING = Engine(shard=True), Engine(shard=True, checkpoint_activations=True)
GROUPS = (1, 2, 1, 2)  # ranks; of two, each keeps a share
CASES = {  # run, type, how the ranks compute, images at a time
    "steps": ("steps", torch.float64, SPARING, None),  # repeats, clipping, G put back to its average
    "parts": ("guided", torch.float64, SHARDED, 2),
    "float32": ("plain", torch.float32, SHARDED, None),
}


class Blind(Updates):
    """Looks at no number before the optimizers step, as on a GPU."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._looks_at_once = False


def config_of(case: str) -> ModelConfig:
    return run_config(run_of(case), RandomLatents.latent_shape, RandomLatents.num_classes)


def train_case(
    case: str,
    folder: Path,
    ranks: ProcessGroup,
    dtype: torch.dtype,
    engine: Engine,
    micro_batch: int | None,
    until: int,
) -> Trained:
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        guide = LatentClassifier(SIZES["s4"], 4, 4, 3).requires_grad_(False)
        torch.nn.init.normal_(list(guide.parameters())[-2], std=0.3)
        run, rest = run_of(case, until), (None, guide, (), ranks, micro_batch)
        training = train(run, config_of(case), RandomLatents(), folder, case, CPU, 1e9, *rest, engine=engine)  # type: ignore[arg-type]
        while True:
            try:
                next(training)
            except StopIteration as end:
                return end.value
    finally:
        torch.set_default_dtype(torch.float32)


def outcome(trained: Trained, ranks: ProcessGroup, folder: Path) -> dict[str, Any]:
    """Return what trainings are compared by, on the first rank; write the model as the stage does."""
    moments = [local(value) for value in trained.state.tensors()["optimizer_generator"].values()]
    found = {"rows": trained.state.rows, "moments": sum(value.numel() for value in moments)}
    if ranks.is_main_process:
        save_model(folder / "model", trained.state.ema, trained.state.discriminator, {})
    return found


def error_of(act: Callable[[], Any]) -> str:
    try:
        with report_lost_rank():
            act()
    except UserError as error:
        return type(error).__name__
    return "none"


def fail(folder: Path, ranks: ProcessGroup) -> dict[str, str]:
    """Return what is raised where a rank cannot write, and where one is gone."""
    state = TrainingState.fresh(config_of("plain"), run_of("plain"), CPU, SHARDED, ranks)
    no_folder = folder / "a file"
    if ranks.is_main_process:
        no_folder.touch()
    found = {"first": error_of(lambda: save_checkpoint(no_folder, state, "", shares=ranks))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    found["second"] = error_of(lambda: save_checkpoint(folder / "full", state, "", shares=ranks))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if ranks.is_main_process:
        found["left"] = str([path.name for path in (folder / "full").iterdir()])
    ranks.barrier()
    if ranks.is_main_process:  # the other is going
        x, labels = torch.zeros(1, 4, 4, 4), torch.zeros(1, dtype=torch.int64)
        found["gone"] = error_of(lambda: [state.generator(x, labels) for _ in range(1000)])
    return found


def work(folder: Path, group: int) -> None:
    """Train as one rank of a group; one training all groups go on with, each from the checkpoint of the one before."""
    with init_distributed(CPU) as ranks:
        found: dict[str, Any] = {}
        if group < 2:
            for name, (case, dtype, engine, micro_batch) in CASES.items():
                here, how = folder / f"{group} {name}", (engine, micro_batch) if group else (Engine(), None)
                loop.Updates = Blind if group and name == "float32" else Updates  # type: ignore[assignment,misc]
                found[name] = outcome(train_case(case, here, ranks, dtype, *how, UPDATES), ranks, here)
        passed = folder / ("passed on" if group else "never passed on")
        until, engine = UPDATES * (group or len(GROUPS) - 1), SHARDED if ranks.world_size > 1 else Engine()
        trained = train_case("plain", passed, ranks, torch.float64, engine, None, until)
        found["passed on"] = outcome(trained, ranks, passed / str(group))
        found["sharded"] = (checkpoints(passed / "checkpoints")[-1] / "shards").is_dir()
        if group == 1:
            found["errors"] = fail(folder, ranks)
        (folder / f"group{group}-rank{ranks.rank}.json").write_text(json.dumps(found))
        if group == 1:
            os._exit(0)  # with a peer gone there is nothing to take leave of


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.fsdp")  # seconds, else of each rank
    importlib.import_module("torch.distributed.checkpoint")
    for group, size in enumerate(GROUPS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(size):
            child = os.fork()  # torch is imported once; nothing is computed before
            if child == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                work(folder, group)
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0, f"a rank of {size} failed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    subprocess.run([sys.executable, "-m", "tests.test_sharding", str(folder)], check=True, cwd=ROOT, timeout=300)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What each rank of each group found, by group and rank."""
    files = {(g, r): folder / f"group{g}-rank{r}.json" for g, size in enumerate(GROUPS) for r in range(size)}
    return {key: json.loads(file.read_text()) for key, file in files.items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two curves, relative where figures are above 1."""
    assert [row["update"] for row in one["rows"]] == [row["update"] for row in other["rows"]]
    pairs = [(a[name], b[name]) for a, b in zip(one["rows"], other["rows"], strict=True) for name in a]
    return max(abs(a - b) / max(abs(a), 1) for a, b in pairs)


@pytest.mark.parametrize(("case", "bound"), [("steps", 1e-8), ("parts", 1e-8), ("float32", 1e-3)])
def test_sharded_trainings_have_the_numbers_and_the_model_of_whole_ones(
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


def test_each_rank_keeps_its_share(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    whole = outcomes[0, 0]["parts"]["moments"]
    for rank in range(2):
        assert 0.49 < outcomes[1, rank]["parts"]["moments"] / whole < 0.51


def test_a_sharded_training_goes_on_whole_and_back(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
    assert difference(outcomes[0, 0]["passed on"], outcomes[3, 0]["passed on"]) < 1e-8
    assert [outcomes[group, 0]["sharded"] for group in range(len(GROUPS))] == [False, True, False, True]


def test_what_fails_on_one_rank_ends_all(outcomes: dict[tuple[int, int], dict[str, Any]]) -> None:
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
    state = TrainingState.fresh(config_of("plain"), run_of("plain"), CPU)
    (line,) = load_latest(tmp_path / "checkpoints", state, "plain")
    assert "damaged" in line and "shards" in line
    assert state.update == 0


def test_sharding_is_a_launch_setting_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Engine.of(Launch(shard=True)) == SHARDED
    for other in ("compile", "ema_on_cpu"):
        with pytest.raises(ValidationError, match=f"expected shard or {other}, not both"):
            Launch.model_validate({"shard": True, other: True})


def test_memory_that_is_asked_for_shrinks_with_shards() -> None:
    run, config = run_of("plain"), config_of("plain").model_copy(update={"size": "b2"})
    whole, sharded = (budget(run, config, 4, shard=shard).state_bytes for shard in (False, True))
    assert whole / 4 < sharded < whole / 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
