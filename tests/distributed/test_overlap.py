"""Gradients leave while the backward pass runs: at b2's real shapes, by hooks, under gloo."""

import functools
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.adversarial_flow.batches import Draw
from afm_pipe.params import Run
from afm_pipe.training import learner as learning
from afm_pipe.training.learner import Learner
from afm_pipe.training.state import TrainingState
from tests.forked import in_ranks


@pytest.mark.slow
def test_first_gradient_leaves_in_the_first_quarter_of_the_backward_pass(smoke_run: Run, tmp_path: Path) -> None:
    run = smoke_run.model_copy(update={"size": "b2", "batch_size": 2})

    def work(group: ProcessGroup) -> None:
        config: ModelConfig = run_config(run, (4, 8, 8), 10)
        objective = build_objective(run, config)
        state = TrainingState.fresh(objective, torch.device("cpu"))
        events: list[tuple[str, float]] = []
        original = learning._sum_gradients

        @functools.wraps(original)
        def noted(state: object, bucket: object) -> object:
            events.append(("send", time.perf_counter()))
            return original(state, bucket)  # type: ignore[arg-type]

        learning._sum_gradients = noted  # type: ignore[assignment]
        learner = Learner(state, run.ema, group)
        arrivals = {"discriminator": 0, "generator": 0}
        for name, network in state.networks.items():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    arrivals[name] += 1
                    parameter.register_post_accumulate_grad_hook(
                        lambda _, name=name: events.append((name, time.perf_counter()))
                    )
        draw = filled(objective.example_batch(1))
        found = []
        for update in range(3):
            events.clear()
            objective.update(learner, draw, objective.hyperparameters(update, 1000))
            found.append([kind for kind, _ in events])
        if group.is_main_process:
            (tmp_path / "events.json").write_text(json.dumps({"events": found, "arrivals": arrivals}))

    assert in_ranks(2, tmp_path, work) == [0, 0]
    stored = json.loads((tmp_path / "events.json").read_text())
    for kinds in stored["events"][1:]:  # from the second update on: buckets follow the order of arrival
        first = kinds.index("send")
        assert first <= stored["arrivals"]["discriminator"] / 4
        of_g = kinds[kinds.index("generator") :]
        assert of_g.index("send") <= stored["arrivals"]["generator"] / 4


def filled(draw: Draw) -> Draw:
    """Return an example draw with numbers in it."""
    torch.manual_seed(0)
    part = draw.generator[0]
    for tensor in (part.batch.real, part.batch.source, *(draw.discriminator[0][0].noise or ())):
        tensor.normal_()
    return draw


def test_wrapped_networks_are_the_states_own(smoke_run: Run, tmp_path: Path) -> None:
    config = run_config(smoke_run, (4, 8, 8), 10)

    def work(group: ProcessGroup) -> None:
        state = TrainingState.fresh(build_objective(smoke_run, config), torch.device("cpu"))
        learner = Learner(state, smoke_run.ema, group)
        for name, network in state.networks.items():
            wrapped = learner.module(name)
            assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
            assert wrapped.module is network

    assert in_ranks(2, tmp_path, work) == [0, 0]
