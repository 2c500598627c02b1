"""The EMA in host memory while the networks are on a device: what is where, when it is updated, and its numbers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from afm_pipe.distributed.process_group import SINGLE_PROCESS
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params.file import load_params
from afm_pipe.training.engine import Engine
from afm_pipe.training.learner import Learner
from afm_pipe.training.state import TrainingState
from benchmarks.inputs import CLASS_COUNT, latents_file
from benchmarks.training import trainer_of
from tests.conftest import ROOT
from tests.training.running import assert_same

SHAPE = (4, 8, 8)
RUN = load_params(ROOT / "params.yaml").runs["s4"].model_copy(update={"batch_size": 8})


def devices(module: torch.nn.Module) -> set[str]:
    return {tensor.device.type for tensor in module.state_dict().values()}


@pytest.mark.parametrize("on_cpu", [False, True])
def test_only_the_ema_is_in_host_memory(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU."""
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda self: self.to_empty(device="cpu"))
    objective = build_objective(RUN, run_config(RUN, SHAPE, CLASS_COUNT), None)
    state = TrainingState.fresh(objective, torch.device("meta"), Engine(ema_on_cpu=on_cpu))
    assert devices(state.ema) == {"cpu" if on_cpu else "meta"}
    assert all(devices(network) == {"meta"} for network in state.networks.values())


def test_the_ema_is_updated_after_one_wait_for_the_copies_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to the host are asynchronous: without the wait, the EMA would read what has not arrived."""
    done: list[str] = []
    lerp = torch._foreach_lerp_
    stream = SimpleNamespace(synchronize=lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: (done.append("update"), lerp(*args)))
    objective = build_objective(RUN, run_config(RUN, SHAPE, CLASS_COUNT), None)
    state = TrainingState.fresh(objective, torch.device("cpu"), Engine(ema_on_cpu=True))
    learner = Learner(state, RUN.ema, SINGLE_PROCESS)
    for device, expected in (("cuda", ["wait", "update"]), ("cpu", ["update"])):
        state.sums = SimpleNamespace(device=torch.device(device))  # type: ignore[assignment]  # where the run computes
        done.clear()
        learner._moved = True
        learner.update_ema()
        learner.update_ema()  # G was not stepped: nothing to copy
        assert done == expected


def test_the_numbers_are_those_of_an_ema_on_the_device(tmp_path: Path) -> None:
    latents = latents_file(tmp_path / "latents.h5", 64, SHAPE)
    trained = [trainer_of(RUN, latents, engine=Engine(ema_on_cpu=on_cpu)) for on_cpu in (False, True)]
    for trainer in trained:
        for _ in range(3):
            trainer.update(trainer.draw())
    assert_same(*(trainer.state for trainer in trained))
