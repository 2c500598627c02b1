"""The host never waits for the device during an update: emulated on the meta device, from which nothing can be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.dit import time_rates
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Run
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES
from afm_pipe.training.engine import Engine
from afm_pipe.training.learner import Learner
from afm_pipe.training.state import TrainingState
from benchmarks.inputs import CLASS_COUNT, latents_file
from tests.conftest import ROOT

SHAPE, META = (4, 8, 8), torch.device("meta")
RUN = load_params(ROOT / "params.yaml").runs["s4"].model_copy(update={"batch_size": 8})
VIEWS = {"probability": 1.0, "translate": 0.1, "erasings": 2, "area": (0.1, 0.2)}
FORMS: dict[str, dict[str, Any]] = {
    "one step": {},
    "several steps": {"nfe": 2},
    "any step": {"nfe": "any"},
    "bf16": {"precision": "bf16", "qk_norm": True},
    "lazy penalties, clipped": {"penalty": RUN.penalty.model_dump() | {"every": 2}, "gradient_clip": 1.0},
    "guided": {"guidance": {"scale": 0.1, "t": [0.0, 0.5]}, "augment": VIEWS},
    "guided, several steps": {"nfe": 2, "guidance": {"scale": 0.1, "at": [0.0]}, "augment": VIEWS},
}
OF_PHASE = ("guidance", "augment", "gradient_clip")


class Waits(TorchDispatchMode):
    """Raises where a copy between host and device makes the host wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {each.device.type for each in tree_flatten((args, result))[0] if isinstance(each, Tensor)}
            if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
                raise AssertionError(f"a blocking copy of {tuple(result.shape)} between {devices}")
        return result


class Bf16(TorchFunctionMode):
    """Autocast, which torch does not offer on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.scaled_dot_product_attention):
            args = [each.bfloat16() if isinstance(each, Tensor) else each for each in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_group(size: int) -> Iterator[ProcessGroup]:
    """Yield a group whose collectives do nothing."""
    if size == 1:
        yield SINGLE_PROCESS
        return
    dist.init_process_group("fake", rank=1, world_size=size, store=FakeStore())
    try:
        yield ProcessGroup(1, size, META)
    finally:
        dist.destroy_process_group()


@contextmanager
def optimizers_on_meta() -> Iterator[None]:
    """Let fused AdamW and the norm over all gradients run on the meta device, which torch does not offer by itself."""
    fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    foreach = "torch.nn.utils.clip_grad._device_has_foreach_support"
    with mock.patch(fused, return_value=["meta"]), mock.patch(foreach, return_value=True):
        yield


def update_without_waiting(folder: Path, form: str, size: int, updates: int) -> None:
    """Run updates as one of `size` processes; raise where the host would wait."""
    settings = RUN.model_dump() | {name: value for name, value in FORMS[form].items() if name not in OF_PHASE}
    phase = {name: value for name, value in FORMS[form].items() if name in OF_PHASE}
    run = Run.model_validate(settings | {"phases": [settings["phases"][-1] | phase]})
    with META:
        classifier = LatentClassifier(SIZES["t4"], 4, 8, CLASS_COUNT).requires_grad_(False)
    latents = latents_file(folder / "latents.h5", 64, SHAPE)
    objective = build_objective(run, run_config(run, SHAPE, CLASS_COUNT), classifier if run.guided else None)
    with fake_group(size) as group, optimizers_on_meta(), mock.patch("torch.autocast", return_value=Bf16()):
        batches = objective.batches(latents, META, group)
        state = TrainingState.fresh(objective, META, Engine())
        learner = Learner(state, run.ema, SINGLE_PROCESS)  # DistributedDataParallel needs tensors with numbers
        learner.group = group
        time_rates(META)  # copied once, and kept
        for update in range(updates):
            hyperparameters = objective.hyperparameters(update, 64)
            draw = batches.draw(update, hyperparameters)
            with Waits():
                state.sums += objective.update(learner, draw, hyperparameters)
                learner.update_ema()
                state.update += 1
        with pytest.raises(RuntimeError, match="meta tensors"):
            learner.require_finite()  # the emulation notices what waits


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("form", ["several steps", "guided"])
def test_an_update_never_waits_for_the_device(tmp_path: Path, form: str, size: int) -> None:
    update_without_waiting(tmp_path, form, size, updates=2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_updates_of_every_form_never_wait(tmp_path: Path, form: str, size: int) -> None:
    update_without_waiting(tmp_path, form, size, updates=100)
