"""What phases do to the networks: EMA reload and D reload."""

import shutil
from pathlib import Path
from typing import cast

import pytest
import torch

from afm_pipe.data.latents import Latents
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.adversarial_flow.objective import AdversarialFlow
from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Phase, Run, deep_merge
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.store import RunStore
from afm_pipe.training.trainer import Runtime, Task, Trainer
from tests.objectives.pinned import MemoryLatents
from tests.training.running import train


def trainer_of(run: Run, num_images: int, folder: Path, *phases: Phase) -> Trainer:
    run = run.model_copy(update={"size": "s4", "phases": phases, "batch_size": 10})
    latents = MemoryLatents()
    latents.num_images = num_images  # type: ignore[misc]
    objective = build_objective(run, run_config(run, latents.latent_shape, latents.num_classes))
    return Trainer(Task(objective, cast(Latents, latents), "phases"), Runtime(folder))


def test_reloads_happen_at_the_start_of_a_phase_and_of_each_epoch(smoke_run: Run, tmp_path: Path) -> None:
    phases = (
        Phase(until_epoch=2.0),
        Phase(until_epoch=4.0, reload_ema="epoch"),
        Phase(until_epoch=5.0, reload_discriminator=1.0),
    )
    trainer = trainer_of(smoke_run, 45, tmp_path, *phases)
    state, (interventions, _) = trainer.state, trainer.callbacks
    bias = state.networks["generator"].final_layer.linear.bias
    for state.update in range(trainer.total):
        with torch.no_grad():
            bias.fill_(state.update + 1)
        interventions.before_update()
        assert bool(bias[0] == state.update + 1) == (state.update not in (9, 14))
        assert bool(bias[0] == 0) == (state.update in (9, 14)), "the moving average's"
    assert trainer.notes == [
        "update 9: G replaced by its moving average",
        "update 14: G replaced by its moving average",
        "update 18: D reloaded from epoch 1",
    ]


def test_discriminator_goes_back_to_what_it_was(smoke_run: Run, tmp_path: Path) -> None:
    trainer = trainer_of(
        smoke_run, 40, tmp_path, Phase(until_epoch=2.0), Phase(until_epoch=3.0, reload_discriminator=1.0)
    )
    state, (interventions, _) = trainer.state, trainer.callbacks
    embedding = state.networks["discriminator"].dis_embed
    assert update_at(trainer.objective.settings, 1.0, 40) == 4
    for state.update in range(9):
        with torch.no_grad():
            embedding.fill_(state.update)
        interventions.before_update()
    assert embedding[0].item() == 4
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="which the run needs to reload"):
        interventions.before_update()


class WithoutAdversary(AdversarialFlow):
    """An objective whose discriminator is not to be reloaded."""

    name, adversary = "without_adversary", None


def test_a_reload_is_refused_where_there_is_no_adversary(smoke_run: Run, tmp_path: Path) -> None:
    phases = (Phase(until_epoch=1.0), Phase(until_epoch=2.0, reload_discriminator=1.0))
    run = smoke_run.model_copy(update={"size": "s4", "phases": phases})
    latents = MemoryLatents()
    objective = WithoutAdversary(run, run_config(run, latents.latent_shape, latents.num_classes))
    with pytest.raises(UserError, match="objective without_adversary, expected none"):
        Trainer(Task(objective, cast(Latents, latents), "phases"), Runtime(tmp_path))


def test_the_monitor_acts_without_an_adversary(smoke_run: Run, tmp_path: Path) -> None:
    raw = smoke_run.model_dump(mode="json")
    stuck = {"probes": 3, "improvement": 1.0, "d_accuracy": 0.0}
    calm = {"policy": "act", "settle_epochs": 0.5, "significance": 0.001}
    monitor = calm | {"probe": {"every_epochs": 1.0}, "stagnation": stuck}
    changes = {"size": "s4", "batch_size": 8, "phases": [{"until_epoch": 4.0}], "monitor": monitor}
    run = Run.model_validate(deep_merge(deep_merge(raw, changes), {"monitor": {"divergence": {"spread": 0.0}}}))
    latents = MemoryLatents()
    objective = WithoutAdversary(run, run_config(run, latents.latent_shape, latents.num_classes))
    state = train(Trainer(Task(objective, cast(Latents, latents), "phases"), Runtime(tmp_path)))
    actions = [event.action for event in RunStore(tmp_path).read_events() if event.kind == "stagnation"]
    assert state.update == objective.num_updates(latents.num_images)
    assert actions and all("D unchanged" in str(action) for action in actions)
