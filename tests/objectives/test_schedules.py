"""Schedules against the released one, and phases against the paper's meaning of them."""

import pytest

from afm_pipe.data.order import Order, stream_generator
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import Objective
from afm_pipe.objectives.schedules import cosine, ema_decay_at, num_updates
from afm_pipe.params import Ema, Phase, Run, Transport
from tests.models.test_models import golden


def objective_of(run: Run, *phases: Phase, **changes: object) -> Objective:
    changed = run.model_copy(update={"phases": phases, **changes})
    return build_objective(changed, run_config(changed, (4, 8, 8), 3))


def test_cosine_equals_the_released_schedule() -> None:
    vectors = golden("cosine_schedule")
    for step, value in zip(vectors["step"].tolist(), vectors["value"].tolist(), strict=True):
        assert cosine(0.2, 0.005, step, 1000) == pytest.approx(value, rel=1e-12)


def test_phases_take_over_at_their_epoch_and_inherit_what_they_leave_out(smoke_run: Run) -> None:
    constant = Transport(start=0.001, end=0.001, decay_epochs=1.0)
    phases = (Phase(until_epoch=2.0), Phase(until_epoch=3.0, lr=8e-5, transport=constant))
    objective = objective_of(smoke_run, *phases, batch_size=10, lr=1e-4)
    assert objective.num_updates(100) == 30
    before, after = objective.hyperparameters(19, 100), objective.hyperparameters(20, 100)
    assert (before.phase, before.lr) == (phases[0], {"generator": 1e-4, "discriminator": 1e-4})
    assert (after.phase, after.lr) == (phases[1], {"generator": 8e-5, "discriminator": 8e-5})
    assert after.weights == {"transport": 0.001}


def test_a_phase_may_give_the_discriminator_its_own_rate(smoke_run: Run) -> None:
    phase = Phase(until_epoch=1.0, lr=5e-5, lr_discriminator=1e-4, gradient_clip=5.0)
    found = objective_of(smoke_run, phase).hyperparameters(0, 100)
    assert (found.lr, found.gradient_clip) == ({"generator": 5e-5, "discriminator": 1e-4}, 5.0)


def test_transport_weight_decays_over_its_epochs_and_follows_the_clock(smoke_run: Run) -> None:
    decay = Transport(start=0.2, end=0.005, decay_epochs=2.0)
    objective = objective_of(smoke_run, Phase(until_epoch=4.0), batch_size=10, transport=decay)
    weights = [objective.hyperparameters(update, 100).weights["transport"] for update in (0, 10, 19, 39)]
    assert weights == pytest.approx([0.2, cosine(0.2, 0.005, 10, 20), 0.005, 0.005])
    assert objective.hyperparameters(0, 100, clock=10).weights["transport"] == weights[1]
    assert [objective.decayed(0, 100, clock) for clock in (19, 20)] == [False, True]


def test_updates_cover_a_last_part_of_a_batch(smoke_run: Run) -> None:
    run = smoke_run.model_copy(update={"phases": (Phase(until_epoch=1.0),), "batch_size": 30})
    assert num_updates(run, 100) == 4


def test_ema_warms_up_to_its_decay() -> None:
    warm = Ema(decay=0.99, warmup=True)
    assert ema_decay_at(warm, 0) == pytest.approx(0.1)
    assert ema_decay_at(warm, 10**6) == 0.99
    assert ema_decay_at(Ema(decay=0.99, warmup=False), 0) == 0.99


def test_every_epoch_sees_each_image_once_in_its_own_order() -> None:
    order = Order(7, seed=3, stream="generator")
    first, second = order.indices(0, 7).tolist(), order.indices(7, 7).tolist()
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_order_does_not_depend_on_how_it_is_read() -> None:
    whole = Order(7, seed=3, stream="generator").indices(0, 50).tolist()
    order = Order(7, seed=3, stream="generator")
    assert order.indices(33, 5).tolist() == whole[33:38]
    assert [order.indices(i, 1).item() for i in range(50)] == whole


def test_streams_and_seeds_differ() -> None:
    drawn = {
        tuple(Order(50, seed, stream).indices(0, 50).tolist()) for seed in (0, 1) for stream in ("generator", "other")
    }
    assert len(drawn) == 4
    assert stream_generator(0, "a", 1).initial_seed() != stream_generator(0, "a", 11).initial_seed()
