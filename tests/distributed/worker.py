"""Several ranks that train, each a real process: what tests/test_ranks.py starts and looks at the outcome of.

    python -m tests.rank_worker FOLDER

One after the other 1, 2 and 3 ranks train the cases; in between they pass one training on to each other.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from afm_pipe.training.loop import Trained, train
from torch import Tensor

from afm_pipe.distributed.process_group import ProcessGroup, init_distributed
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import run_config
from afm_pipe.params import Guidance, Phase, Run
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES
from afm_pipe.params.training import Augmentation
from tests.conftest import SMOKE

BATCH, UPDATES, IMAGES = 12, 20, 60
CPU = torch.device("cpu")
AUGMENT = Augmentation(probability=0.5, translate=0.3, erasings=1, area=(0.1, 0.5))
GUIDED = {"guidance": Guidance(scale=1.0, t=(0.0, 0.5)), "augment": AUGMENT}
MULTISTEP = {"guidance": Guidance(scale=1.0, at=(0.0,)), "gradient_clip": 0.5, "reload_ema": "epoch"}


class RandomLatents:
    """As many latents as the tests need, of three classes."""

    num_images, num_mirrors, num_classes, latent_shape, classes = IMAGES, 1, 3, (4, 4, 4), ("a", "b", "c")
    labels = np.arange(IMAGES) % 3

    def __init__(self) -> None:
        self.x = torch.randn(IMAGES, *self.latent_shape, generator=torch.Generator().manual_seed(1))
        self.read = 0  # how many of them were

    def draw(self, indices: Tensor, generator: torch.Generator, own: slice = slice(None)) -> Tensor:
        self.read += len(indices[own])
        return self.x[indices[own]] + 0.1 * torch.randn(len(indices), *self.latent_shape, generator=generator)[own]


# What each case changes of the smoke profile's run, and of its one phase.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "guided": ({}, GUIDED),
    "steps": ({"nfe": 2, "form": "residual", "reuse_forward": True, "repeats": 2, "normalised": False}, MULTISTEP),
}


def run_of(case: str, until: int = UPDATES) -> Run:
    run = load_params(SMOKE).runs["t4"]
    changes, of_phase = CASES[case]
    changes = dict(changes)
    normalised = changes.pop("normalised", True)
    changes["gradient_normalization"] = run.gradient_normalization.model_copy(update={"enabled": normalised})
    if case != "plain":  # the watch's probe reads latents, too, on every rank the same
        changes["monitor"] = run.monitor.model_copy(update={"policy": "off"})
    phase = Phase(until_epoch=until * BATCH / IMAGES, **of_phase)
    # A quarter of twelve is three penalised images: shares of ranks and parts differ, and some have none.
    return run.model_copy(update={"size": "s4", "batch_size": BATCH, "lr": 1e-3, "phases": (phase,), **changes})


def train_case(
    case: str,
    folder: Path,
    ranks: ProcessGroup,
    dtype: torch.dtype = torch.float64,
    micro_batch: int | None = None,
    until: int = UPDATES,
) -> tuple[Trained, RandomLatents]:
    torch.set_default_dtype(dtype)
    try:
        run, latents = run_of(case, until), RandomLatents()
        config = run_config(run, latents.latent_shape, latents.num_classes)
        torch.manual_seed(0)
        guide = LatentClassifier(SIZES["s4"], 4, 4, 3).requires_grad_(False)
        torch.nn.init.normal_(list(guide.parameters())[-2], std=0.3)
        training = train(run, config, latents, folder, case, CPU, 0.0, None, guide, (), ranks, micro_batch)
        while True:
            try:
                next(training)
            except StopIteration as end:
                return end.value, latents
    finally:
        torch.set_default_dtype(torch.float32)


def outcome(trained: Trained) -> dict[str, Any]:
    """Return what two trainings are compared by: all figures of the curves, and the weights as one sum each."""
    state = trained.state
    weights = {
        part: torch.cat([p.flatten() for p in getattr(state, part).parameters()]).tolist()[::997]
        for part in ("generator", "discriminator", "ema")
    }
    found = {"rows": state.rows, "weights": weights, "mean_square": state.normalizer.mean_square.item()}
    return found | {"watch": state.extra.get("monitor")}


def work(folder: Path, size: int, stage: int) -> None:
    """Train as one of `size` ranks; `stage` counts the groups of ranks from 0."""
    with init_distributed(CPU) as ranks:
        found: dict[str, Any] = {}
        # One training that all groups go on with, each from the checkpoint of the one before.
        passed_on, _ = train_case("plain", folder / "passed on", ranks, until=10 * (stage + 1))
        found["passed on"] = outcome(passed_on)
        if stage == 0:
            found["never passed on"] = outcome(train_case("plain", folder / "whole", ranks, until=30)[0])
        if stage < 3:
            here = folder / f"{size} ranks"
            found["guided"] = outcome(train_case("guided", here / "guided", ranks)[0])
            if stage < 2:  # three ranks on two cores are slow
                found["steps"] = outcome(train_case("steps", here / "steps", ranks)[0])
                found["float32"] = outcome(train_case("plain", here / "float32", ranks, torch.float32)[0])
            trained, latents = train_case("guided", here / "parts", ranks, micro_batch=2)
            found["parts"], found["read"] = outcome(trained), latents.read
        (folder / f"group{stage}-rank{ranks.rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for stage, size in enumerate((1, 2, 3, 1)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(size):
            child = os.fork()  # torch is imported once; nothing is computed before
            if child == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                work(folder, size, stage)
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0, f"a rank of {size} failed"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
