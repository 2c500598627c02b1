"""Several processes that train together: what tests/distributed/test_data_parallel.py starts.

    python -m tests.distributed.worker FOLDER

One after the other 1, 2 and 3 processes train the cases; in between they hand one run on to each other.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import ProcessGroup, init_distributed
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import Objective
from afm_pipe.objectives.latent_classifier import ClassifierTraining
from afm_pipe.params import Guidance, Phase, Run
from afm_pipe.params.file import load_params
from afm_pipe.params.flow import FlowSettings, OdeSampling
from afm_pipe.params.sizes import SIZES
from afm_pipe.params.training import Augmentation
from afm_pipe.training.engine import Engine
from afm_pipe.training.trainer import Runtime, Task, Trained, Trainer
from tests.conftest import SMOKE
from tests.objectives.pinned import MemoryLatents

BATCH, UPDATES, IMAGES = 12, 10, 60  # a row of the curves, two epochs
CPU = torch.device("cpu")
AUGMENT = Augmentation(probability=0.5, translate=0.3, erasings=1, area=(0.1, 0.5))
GUIDED = {"guidance": Guidance(scale=1.0, t=(0.0, 0.5)), "augment": AUGMENT}
MULTISTEP = {"guidance": Guidance(scale=1.0, at=(0.0,)), "gradient_clip": 0.5, "reload_ema": "epoch"}


class RandomLatents(MemoryLatents):
    """Latents of three classes, which count how many of them were read."""

    num_images, num_classes, latent_shape, classes = IMAGES, 3, (4, 4, 4), ("a", "b", "c")
    labels = np.arange(IMAGES) % 3

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def draw(self, indices: Tensor, generator: torch.Generator, own: slice = slice(None)) -> Tensor:
        self.read += len(indices[own])
        return super().draw(indices, generator, own)


SAMPLING = OdeSampling(solver="heun", steps=2, guidance_scale=1.0, guidance_interval=(0.0, 1.0))
FLOW = FlowSettings(times="uniform", label_dropout=0.2, warmup=1, sampling=SAMPLING)
ADVERSARY = {"objective": "continuous_adversarial_flow", "discriminator_updates": 2, "flow": FLOW}

# What each case changes of the smoke profile's run, and of its one phase.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "guided": ({}, GUIDED),
    "flow": ({"objective": "flow_matching", "flow": FLOW}, {}),
    "adversary": (ADVERSARY, {"gradient_clip": 50.0}),
    "steps": ({"nfe": 2, "form": "residual", "reuse_forward": True, "repeats": 2, "normalized": False}, MULTISTEP),
}


def run_of(case: str, until: int = UPDATES) -> Run:
    """Return the run of a case that ends after `until` updates."""
    run = load_params(SMOKE).runs["t4"]
    changes, of_phase = CASES[case]
    changes = dict(changes)
    normalized = changes.pop("normalized", True)
    changes["gradient_normalization"] = run.gradient_normalization.model_copy(update={"enabled": normalized})
    if case != "plain":  # the monitor's probe reads latents, too, the same on every process
        changes["monitor"] = run.monitor.model_copy(update={"policy": "off"})
    phase = Phase(until_epoch=until * BATCH / IMAGES, **of_phase)
    # A quarter of twelve is three penalized images: shares of processes and micro-batches differ, and some have none.
    return run.model_copy(update={"size": "s4", "batch_size": BATCH, "lr": 1e-3, "phases": (phase,), **changes})


def objective_of(case: str, until: int = UPDATES) -> Objective:
    """Return the objective of a case."""
    shape, classes = RandomLatents.latent_shape, RandomLatents.num_classes
    if case == "classifier":
        settings = load_params(SMOKE).classifier
        assert settings is not None
        changes = {"size": "s4", "batch_size": BATCH, "epochs": until * BATCH / IMAGES}
        return ClassifierTraining(settings.model_copy(update=changes), 0, shape, classes)
    run = run_of(case, until)
    torch.manual_seed(0)
    guide = LatentClassifier(SIZES["s4"], 4, 4, 3).requires_grad_(False)
    torch.nn.init.normal_(list(guide.parameters())[-2], std=0.3)
    return build_objective(run, run_config(run, shape, classes), guide)


def train_case(
    case: str,
    folder: Path,
    group: ProcessGroup,
    dtype: torch.dtype = torch.float64,
    micro_batch: int | None = None,
    until: int = UPDATES,
    engine: Engine = Engine(),  # noqa: B008  # an immutable value
    reads_at_once: bool = True,
    checkpoint_seconds: float = 1e9,
) -> tuple[Trained, RandomLatents]:
    """Train a case as one process of a group; without `reads_at_once` no loss is read before a step, as on a GPU."""
    torch.set_default_dtype(dtype)
    try:
        latents = RandomLatents()
        runtime = Runtime(folder, CPU, checkpoint_seconds, group, micro_batch, engine=engine)
        trainer = Trainer(Task(objective_of(case, until), cast(Latents, latents), case), runtime)
        trainer.learner._reads_at_once = reads_at_once
        training = trainer.train()
        while True:
            try:
                next(training)
            except StopIteration as end:
                return end.value, latents
    finally:
        torch.set_default_dtype(torch.float32)


def outcome(trained: Trained) -> dict[str, Any]:
    """Return what two runs are compared by: all figures of the curves, and a sample of the weights."""
    state = trained.state
    weights = {
        part: torch.cat([p.flatten() for p in module.parameters()]).tolist()[::997]
        for part, module in state.modules.items()
    }
    buffers = {name: buffer.tolist() for name, buffer in state.buffers.items()}
    return {"rows": state.rows, "weights": weights, "buffers": buffers, "monitor": state.extra.get("monitor")}


def work(folder: Path, size: int, stage: int) -> None:
    """Train as one of `size` processes; `stage` counts the groups from 0."""
    with init_distributed(CPU) as group:
        found: dict[str, Any] = {}
        # One run that every group resumes, each from the checkpoint of the group before.
        handed_on, _ = train_case(
            "plain", folder / "handed on", group, until=UPDATES * (stage + 1), checkpoint_seconds=0.0
        )
        found["handed on"] = outcome(handed_on)
        if stage == 0:
            found["never handed on"] = outcome(train_case("plain", folder / "whole", group, until=3 * UPDATES)[0])
        if stage < 3:
            here = folder / f"{size} processes"
            found["guided"] = outcome(train_case("guided", here / "guided", group)[0])
            found["adversary"] = outcome(train_case("adversary", here / "adversary", group, micro_batch=2)[0])
            found["flow"] = outcome(train_case("flow", here / "flow", group)[0])
            if stage < 2:  # three processes on two cores are slow
                for case in ("steps", "classifier"):
                    found[case] = outcome(train_case(case, here / case, group)[0])
                found["float32"] = outcome(train_case("plain", here / "float32", group, torch.float32)[0])
            trained, latents = train_case("guided", here / "parts", group, micro_batch=2)
            found["parts"], found["read"] = outcome(trained), latents.read
        (folder / f"group{stage}-rank{group.rank}.json").write_text(json.dumps(found))


def run_groups(sizes: Sequence[int], work: Callable[[int, int], None]) -> None:
    """Run `work(size, stage)` in groups of forked processes, one group after the other, as torchrun starts them."""
    torch.set_num_threads(1)
    for stage, size in enumerate(sizes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(size):
            child = os.fork()  # torch is imported once; nothing is computed before
            if child == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                work(size, stage)
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0, f"a process of {size} failed"


GROUPS = (1, 2, 3, 1)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_groups(GROUPS, lambda size, stage: work(folder, size, stage))
