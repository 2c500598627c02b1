"""The interface between a training method and the code that trains, monitors, profiles and reports it.

An objective defines its networks, batches, losses, order of updates, logged terms, and sampling. Trainer, curves,
monitor, FLOP counting and report iterate over the names it declares; none of them knows a particular loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.params import Ema, Phase
from afm_pipe.runtime.errors import UserError

Role = Literal["adversarial_loss", "d_accuracy", "output_scale", "transport_distance"]


class Term(NamedTuple):
    """A quantity that every update returns: a column of the curves."""

    name: str
    title: str
    help: str = ""
    log: bool = False
    """Plot on a logarithmic axis."""
    role: Role | None = None
    """What the rules of the monitor use it for."""


class RunSettings(Protocol):
    """Settings of a run that the trainer reads."""

    @property
    def seed(self) -> int:
        """Seed of initial weights, order of images, and noise."""

    @property
    def batch_size(self) -> int:
        """Images per update, over all processes."""

    @property
    def ema(self) -> Ema:
        """Settings of the EMA of the sampled network."""

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """Precision of matrix products in blocks."""


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one update."""

    lr: Mapping[str, float]
    """Learning rates by network."""
    weights: Mapping[str, float]
    """Scheduled loss weights, by names in `Objective.scheduled`."""
    gradient_clip: float | None = None
    phase: Phase | None = None

    def scaled(self, lr: float = 1.0, weights: Mapping[str, float] | None = None) -> "Hyperparameters":
        """Return a copy with learning rates multiplied by `lr` and some loss weights replaced."""
        rates = self.lr if lr == 1 else {name: lr * rate for name, rate in self.lr.items()}
        return replace(self, lr=rates, weights={**self.weights, **(weights or {})})


class Learner(Protocol):
    """What an objective updates its networks through: gradient accumulation, reduction and optimizer steps."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The bare networks by name, whose backward passes do not communicate."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The buffers of the objective by name."""

    def module(self, name: str) -> nn.Module:
        """Return a network whose backward pass sums its gradients over the processes."""

    def accumulate(self, name: str, last: bool) -> AbstractContextManager[None]:
        """Context of a backward pass of `module(name)`; only the `last` one of a batch reduces gradients."""

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        """Sum tensors over the micro-batches of this process, and over processes."""

    def step(self, name: str, loss: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        """Step the optimizer of a network and clear its gradients; return the gradient norm before clipping.

        Raises NotFiniteError, before the weights change, if the loss of the whole batch is not finite.
        """


class Sampler(Protocol):
    """Draws samples from a network."""

    def sample(self, z: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        """Map noise z (N, C, H, W) and labels (N,) to latents (N, C, H, W)."""


class Batches(Protocol):
    """Draws the micro-batches of updates."""

    def draw(self, update: int, hyperparameters: Hyperparameters) -> Any:
        """Return this process's input to `Objective.update`, for an update counted from 0.

        It depends on the update and on `hyperparameters.phase` only: a thread may draw it ahead.
        """


class Objective(ABC):
    """A training method. Register subclasses with `objectives.register`."""

    name: ClassVar[str]
    terms: ClassVar[tuple[Term, ...]]
    """The quantities that `update` returns, in order."""
    scheduled: ClassVar[tuple[Term, ...]] = ()
    """Loss weights that follow a schedule, logged next to the learning rate."""
    sampled: ClassVar[str]
    """The network whose EMA generates samples."""
    adversary: ClassVar[str | None] = None
    """The network whose weights the monitor and phases may reload from an earlier update."""

    settings: RunSettings
    classifier: nn.Module | None = None
    """The guidance classifier, if any."""

    @abstractmethod
    def build_networks(self) -> dict[str, nn.Module]:
        """Build the networks with initial weights on the default device, in a fixed order (the seed is shared)."""

    def build_buffers(self, device: torch.device) -> dict[str, Tensor]:
        """Return tensors besides weights that updates modify; checkpoints contain them."""
        return {}

    def continued(self, weights: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return weights by network to begin with, given those of the base run, perhaps of another objective."""
        return weights

    @abstractmethod
    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        """Return a new optimizer of a network."""

    @abstractmethod
    def num_updates(self, num_images: int) -> int:
        """Return the number of updates of a run on a data set of `num_images` images."""

    @abstractmethod
    def hyperparameters(self, update: int, num_images: int, clock: float | None = None) -> Hyperparameters:
        """Return the hyperparameters of an update, counted from 0.

        `clock` is the update at which schedules of loss weights are evaluated; default: `update`.
        """

    def decayed(self, update: int, num_images: int, clock: float) -> bool:
        """Return whether the scheduled loss weights no longer change after `clock`."""
        return True

    @abstractmethod
    def batches(
        self,
        latents: Latents,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        micro_batch: int | None = None,
    ) -> Batches:
        """Return the batches of this process."""

    @abstractmethod
    def update(self, learner: Learner, batch: Any, hyperparameters: Hyperparameters) -> Tensor:
        """Update the networks once on the result of `Batches.draw`; return the terms of the batch, (len(terms),).

        What differs between updates must come from the batch or `hyperparameters`, whose numbers may be tensors: a
        captured update repeats everything else (see `training/capture.py`).
        """

    @abstractmethod
    def sampler(self, network: nn.Module) -> Sampler:
        """Return the sampler of the sampled network or of its EMA."""

    @abstractmethod
    def example_batch(self, count: int, penalized: int | None = None) -> Any:
        """Return an input of `update` with one micro-batch of `count` images, on the default device, for FLOP counting.

        `penalized`: number of penalized images; default: the run's fraction.
        """

    def example_updates(self, count: int, penalized: int | None = None) -> list[tuple[Any, float]]:
        """Return inputs of `update` as `example_batch` does, one of each kind, with their shares of the updates."""
        return [(self.example_batch(count, penalized), 1.0)]

    @abstractmethod
    def example_forward(self, networks: Mapping[str, nn.Module], count: int) -> Tensor:
        """Run one forward pass of the sampled network on `count` images: the unit of compute."""

    def describe(self) -> dict[str, Any]:
        """Return the "model" entry of a model's config.json."""
        return {}

    def progress(self, row: Mapping[str, float]) -> str:
        """Return the part of the progress line that shows values of a row."""
        return ""

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the names of the columns of the curves, in order."""
        return (*CLOCK, *(term.name for term in cls.scheduled), *(term.name for term in cls.terms))

    @classmethod
    def with_role(cls, role: Role) -> list[str]:
        """Return the names of the terms with a role."""
        return [term.name for term in cls.terms if term.role == role]


CLOCK = ("update", "images", "epoch", "lr")


def num_micro_batches(batch_size: int, processes: int, micro_batch: int | None) -> int:
    """Return the number of micro-batches of each process.

    Raises UserError if there are more processes than images in a batch.
    """
    if processes > batch_size:
        raise UserError(
            f"Found {processes} processes for a batch of {batch_size} images, expected at most one per image: start "
            "fewer processes, or raise batch_size."
        )
    share = -(-batch_size // processes)  # largest shard
    parts = 1 if micro_batch is None else -(-share // micro_batch)
    return max(min(parts, batch_size // processes), 1)  # no micro-batch is empty
