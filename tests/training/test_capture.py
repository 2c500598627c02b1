"""Captured updates, with an emulation of CUDA graphs: operations recorded with their tensors, and repeated on them.

As in a graph, what an update computed from a Python number stays as it was when it was recorded, results are written to
the tensors that the recorded update made, and nothing may be read from the device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afm_pipe.distributed.launch import load_launch
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Run
from afm_pipe.params.sizes import SIZES
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.training.capture import WARM_UP, CapturedUpdates
from afm_pipe.training.checkpoints import Snapshot
from afm_pipe.training.engine import Engine
from afm_pipe.training.state import optimizer_tensors
from afm_pipe.training.trainer import Runtime, Task, Trainer
from benchmarks.inputs import CLASS_COUNT, latents_file
from tests.training.running import Halved
from tests.training.test_engine import RUN, SHAPE, update, vector, without_numbers

LR = 2.0**-11  # exact in float32, in which a graph takes it
VIEWS = {"probability": 1.0, "translate": 0.1, "erasings": 2, "area": (0.1, 0.2)}
FLOW = {
    "times": "uniform",
    "label_dropout": 0.1,
    "warmup": 4,
    "sampling": {"solver": "euler", "steps": 1, "guidance_scale": 1.0, "guidance_interval": [0.0, 1.0]},
}
FORMS: dict[str, dict[str, Any]] = {
    "one step": {},
    "any step, EMA with warm-up": {"nfe": "any", "ema": {"decay": 0.99, "warmup": True}},
    "lazy penalties": {"penalty": RUN.penalty.model_dump() | {"every": 2}},
    "guided": {"phase": {"guidance": {"scale": 0.1, "t": [0.0, 0.5]}, "augment": VIEWS}},
    "bf16, checkpointed activations": {"precision": "bf16", "qk_norm": True},
    "flow matching": {"objective": "flow_matching", "flow": FLOW},
    "continuous adversarial flow": {"objective": "continuous_adversarial_flow", "flow": FLOW, "transport": 0.5},
}

# Of 8 updates in each of two phases. Others have updates of two forms: with penalties or without, of D or of G.
REPLAYS = {"lazy penalties": [1, 1, 1, 1], "continuous adversarial flow": [2, 1, 1]}


class Recording(TorchDispatchMode):
    """The operations of a computation, which the first replay does not repeat: recording them has run them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read, which a graph cannot do"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, result in self.operations:
            for held, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(held, Tensor) and not held._is_zerotensor() and not shares_memory(held, new):
                    held.copy_(new)


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of one memory."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class Emulation:
    """The recorder of the emulation."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.forgotten = 0  # of the recordings, which are the first ones

    def warm_up(self, computation: Callable[[], Tensor]) -> Tensor:
        return computation()

    def record(self, computation: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        recording = Recording()
        self.recordings.append(recording)
        with recording:
            result = computation()
        return recording.replay, result

    def forget(self) -> None:
        self.forgotten = len(self.recordings)


Make = Callable[[Run], tuple[Trainer, Trainer, Emulation]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that returns an eager trainer of a run, one that captures, and its recorder."""
    latents = latents_file(tmp_path / "latents.h5", 64, SHAPE)

    def trainer(run: Run) -> Trainer:
        classifier = LatentClassifier(SIZES["s4"], 4, 8, CLASS_COUNT).requires_grad_(False) if run.guided else None
        objective = build_objective(run, run_config(run, SHAPE, CLASS_COUNT), classifier)
        engine = Engine(checkpoint_activations=run.precision == "bf16")
        return Trainer(Task(objective, latents, "test"), Runtime(tmp_path / "work", engine=engine))

    def pair(run: Run) -> tuple[Trainer, Trainer, Emulation]:
        torch.manual_seed(0)  # of the classifier
        eager = trainer(run)
        torch.manual_seed(0)
        captured, emulation = trainer(run), Emulation()
        captured._run = CapturedUpdates(captured.objective, captured.learner, emulation).run
        return eager, captured, emulation

    return pair


def run_of(form: str) -> Run:
    """Return a run of a form with two phases, the first of 8 updates; the transport weight changes with each."""
    phase = {"lr": None, "gradient_clip": 1.0, **FORMS[form].get("phase", {})}
    settings = RUN.model_dump() | {name: value for name, value in FORMS[form].items() if name != "phase"}
    transport = {"start": 0.2, "end": 0.05, "decay_epochs": 2.0}
    phases = [{"until_epoch": 1.0, **phase}, {"until_epoch": 9.0, **phase, "lr": LR / 4}]
    return Run.model_validate(settings | {"lr": LR, "transport": transport, "phases": phases, "selection": None})


@pytest.mark.parametrize("form", FORMS)
def test_replayed_updates_have_the_bits_of_eager_ones(make: Make, form: str) -> None:
    """Across two phases, each with two learning rates, with another batch and transport weight in every update."""
    eager, captured, emulation = make(run_of(form))
    for trainer in (eager, captured):
        trainer.callbacks.append(Halved(trainer))
    for at in range(16):
        terms = [trainer.update(trainer.draw()).clone() for trainer in (eager, captured)]
        assert torch.equal(*terms), f"terms of update {at}"
        assert torch.equal(vector(eager), vector(captured)), f"weights and EMA after update {at}"
    captured.learner.require_finite()
    moments = [optimizer_tensors(trainer.state.optimizers[eager.state.sampled]) for trainer in (eager, captured)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert [each.replays for each in emulation.recordings] == REPLAYS.get(form, [8 - WARM_UP] * 2)


def test_a_non_finite_loss_is_named_by_the_update_in_which_it_was_replayed(make: Make) -> None:
    _, captured, emulation = make(run_of("one step"))
    for _ in range(5):
        update(captured)
    healthy = captured.draw()
    before = [*captured.state.networks["generator"].parameters()][0].clone()
    captured.update(without_numbers(healthy))
    captured.update(healthy)
    assert emulation.recordings[0].replays == 4
    with pytest.raises(NotFiniteError, match="at update 5"):
        captured.learner.require_finite()
    assert torch.equal([*captured.state.networks["generator"].parameters()][0], before)
    captured.learner.abandon()
    captured.update(healthy)
    captured.learner.require_finite()


@pytest.mark.parametrize("at", [0, 2])
def test_graphs_are_captured_anew_after_a_rollback(make: Make, tmp_path: Path, at: int) -> None:
    """It replaces the optimizers' tensors, on which graphs compute; those of before the first update have none."""
    eager, captured, emulation = make(run_of("one step"))
    for _ in range(at):
        update(eager, captured)
    earlier = Snapshot.of(captured.state)
    for _ in range(5):
        update(captured)
    captured.state.load_tensors(earlier.tensors(), tmp_path)
    captured.state.update = earlier.update
    for _ in range(5):
        update(eager, captured)
        assert torch.equal(vector(eager), vector(captured))
    assert emulation.forgotten == 1 < len(emulation.recordings), "dropped graphs share no memory with new ones"
    assert all("found_inf" not in vars(each) or each.found_inf is None for each in captured.state.optimizers.values())


def test_capture_is_refused_where_it_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    latents = latents_file(tmp_path / "latents.h5", 64, SHAPE)
    objective = build_objective(RUN, run_config(RUN, SHAPE, CLASS_COUNT))
    with pytest.raises(UserError, match="capture with the device cpu, expected an NVIDIA GPU"):
        Trainer(Task(objective, latents, "test"), Runtime(tmp_path / "work", engine=Engine(capture=True)))
    for other in ({"shard": True}, {"ema_on_cpu": True}, {"nproc_per_node": 2}):
        with pytest.raises(UserError, match="capture"):
            load_launch(capture=True, **other)
    assert Engine.of(load_launch(capture=True)).capture
