"""What the objectives of runs share: settings of a run, its model, one AdamW per network."""

from typing import Any

import torch
from torch import nn

from afm_pipe.models.model_files import ModelConfig, build_sampler
from afm_pipe.objectives.base import Objective, Sampler
from afm_pipe.objectives.schedules import num_updates
from afm_pipe.params import Run


class RunObjective(Objective):
    """An objective that trains the generator of a run."""

    sampled = "generator"

    def __init__(self, run: Run, config: ModelConfig, classifier: nn.Module | None = None) -> None:
        """Train the model of `config` with the settings of `run`; phases with guidance need the `classifier`."""
        self.run, self.settings, self.config, self.classifier = run, run, config, classifier

    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        run = self.run
        return torch.optim.AdamW(
            network.parameters(), lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay, fused=True
        )

    def num_updates(self, num_images: int) -> int:
        return num_updates(self.run, num_images)

    def sampler(self, network: nn.Module) -> Sampler:
        return build_sampler(network, self.config)

    def describe(self) -> dict[str, Any]:
        return self.config.model_dump()
