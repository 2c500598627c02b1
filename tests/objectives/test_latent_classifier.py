"""The classifier that guides: it learns, resumes and reads its own folder."""

from pathlib import Path
from typing import cast

import pytest
import torch

from afm_pipe.data.latents import Latents
from afm_pipe.models.classifier import load_latent_classifier
from afm_pipe.objectives.latent_classifier import ClassifierTraining, accuracy_by_level
from afm_pipe.params import Classifier, Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.training.trainer import Runtime, Task, Trainer
from tests.objectives.pinned import MemoryLatents
from tests.training.running import assert_same, train

CPU = torch.device("cpu")


class Blobs(MemoryLatents):
    """Latents whose classes differ in the mean of their channels."""

    num_classes, classes = 4, ("a", "b", "c", "d")
    labels = MemoryLatents.labels % 4

    def __init__(self) -> None:
        super().__init__()
        self.x = 0.5 * self.x + torch.eye(4)[torch.as_tensor(self.labels), :, None, None]


@pytest.fixture
def settings(smoke_params: Params) -> Classifier:
    assert smoke_params.classifier is not None
    return smoke_params.classifier.model_copy(update={"size": "s4", "batch_size": 16})


def trainer_of(settings: Classifier, folder: Path) -> Trainer:
    latents = cast(Latents, Blobs())
    objective = ClassifierTraining(settings, 0, latents.latent_shape, latents.num_classes)
    return Trainer(Task(objective, latents, "classifier"), Runtime(folder, checkpoint_seconds=0.0))


def test_classifier_learns_and_knows_more_with_less_noise(settings: Classifier, tmp_path: Path) -> None:
    state = train(trainer_of(settings.model_copy(update={"epochs": 30.0}), tmp_path))
    losses = [row["cross_entropy"] for row in state.rows]
    assert losses[-1] < 0.5 * losses[0]
    accuracy = accuracy_by_level(state.ema, cast(Latents, Blobs()), 0, CPU)
    assert accuracy["accuracy_t0"] > 0.95
    assert accuracy["accuracy_t0"] >= accuracy["accuracy_t0.25"] >= accuracy["accuracy_t0.5"] > 1 / 4


def test_a_classifier_killed_and_resumed_ends_with_the_same_weights(settings: Classifier, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"epochs": 8.0})
    whole = train(trainer_of(settings, tmp_path / "whole"))
    with pytest.raises(InterruptedError):
        train(trainer_of(settings, tmp_path / "cut"), stop_at=20)
    resumed = trainer_of(settings, tmp_path / "cut")
    assert 0 < resumed.state.update < whole.update == 32
    assert_same(train(resumed), whole)


def test_a_folder_without_a_classifier_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"classifier": null}')
    with pytest.raises(UserError, match="dvc repro classifier"):
        load_latent_classifier(tmp_path, CPU, [])
