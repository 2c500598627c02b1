"""Measure the rate of a run's updates on this machine: a few real updates on random latents, which learn nothing."""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from afm_pipe.distributed.process_group import SINGLE_PROCESS
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run
from afm_pipe.planning.counting import measure
from afm_pipe.training.capture import WARM_UP, updates_on
from afm_pipe.training.engine import Engine
from afm_pipe.training.learner import Learner
from afm_pipe.training.state import TrainingState

UPDATES, WARMUP = 5, WARM_UP + 1  # the last one captures


def measured_flops(
    params: Params, name: str, num_classes: int, images: int, device: torch.device, engine: Engine
) -> float:
    """Return the FLOP/s that a run's unguided updates of `images` images reach on a device."""
    run = params.run_before(name) or params.model(name)
    config = run_config(run, params.latent_shape, num_classes)
    return measure(run, config, images).flops / update_seconds(run, config, images, device, engine)


def update_seconds(
    run: Run, config: ModelConfig, images: int, device: torch.device, engine: Engine, updates: int = UPDATES
) -> float:
    """Return the seconds that an unguided update of `images` images takes on a device, the median of `updates`."""
    objective = build_objective(run, config)
    state = TrainingState.fresh(objective, device, engine)
    learner = Learner(state, run.ema, SINGLE_PROCESS)
    update = updates_on(device, engine, objective, learner)
    with torch.device(device):
        batch = objective.example_batch(images)
    _fill(batch)
    hyperparameters = objective.hyperparameters(0, max(config.num_classes, run.batch_size))
    seconds = []
    for _ in range(WARMUP + updates):
        started = time.perf_counter()
        update(batch, hyperparameters)
        learner.require_finite()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return median(seconds[-updates:])


def _fill(value: Any) -> None:
    """Fill the floating-point tensors of a nested batch with noise."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            value.uniform_(0.1, 0.9) if value.ndim == 1 else value.normal_()
    elif isinstance(value, tuple | list):
        for each in value:
            _fill(each)
