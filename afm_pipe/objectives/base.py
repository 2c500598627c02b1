"""The interface between a method and everything that trains, monitors, counts and reports it.

An objective owns its networks, batches, losses, the order of its updates, the names of its figures, and sampling. The
trainer, curves, monitor, counting and report iterate over these names; none of them knows a loss.
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
    """A figure of every update: a column of the curves."""

    name: str
    title: str
    help: str = ""
    log: bool = False
    """Plotted on a logarithmic axis."""
    role: Role | None = None
    """Its meaning to the monitor's rules."""


class RunSettings(Protocol):
    """The settings of a run that the trainer reads."""

    @property
    def seed(self) -> int:
        """The seed of initial weights, order and noise."""

    @property
    def batch_size(self) -> int:
        """Images per update over all processes."""

    @property
    def ema(self) -> Ema:
        """The moving average of the sampled network."""

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """The precision of matrix products within blocks."""


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one update."""

    lr: Mapping[str, float]
    """Learning rates by network."""
    weights: Mapping[str, float]
    """Scheduled loss weights, by the names in `Objective.scheduled`."""
    gradient_clip: float | None = None
    phase: Phase | None = None

    def scaled(self, lr: float = 1.0, weights: Mapping[str, float] | None = None) -> "Hyperparameters":
        """Return these with learning rates times `lr` and some weights replaced."""
        rates = self.lr if lr == 1 else {name: lr * rate for name, rate in self.lr.items()}
        return replace(self, lr=rates, weights={**self.weights, **(weights or {})})


class Learner(Protocol):
    """The networks that an objective updates, and how gradients become steps."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The bare networks by name: their backward passes send nothing."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The objective's own tensors by name."""

    def module(self, name: str) -> nn.Module:
        """Return a network whose backward pass sums its gradients over the processes."""

    def accumulate(self, name: str, last: bool) -> AbstractContextManager[None]:
        """Run a backward pass of `module(name)` within this; only the `last` of a batch sends gradients."""

    def sum(self, figures: Sequence[Tensor]) -> Tensor:
        """Sum figures over the micro-batches of this process and over processes."""

    def step(self, name: str, loss: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        """Step a network's optimizer and clear its gradients; return their norm before clipping.

        Raises NotFiniteError, before the weights change, when the loss of the whole batch is not finite.
        """


class Sampler(Protocol):
    """Draws samples from a network."""

    def sample(self, z: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        """Map noise z (N, C, H, W) and labels (N,) to latents (N, C, H, W)."""


class Batches(Protocol):
    """Draws the micro-batches of updates."""

    def draw(self, update: int, hyperparameters: Hyperparameters) -> Any:
        """Return what this process needs for an update, counted from 0: whatever `Objective.update` takes."""


class Objective(ABC):
    """A training method (see the module); subclasses are registered by name with `objectives.register`."""

    name: ClassVar[str]
    terms: ClassVar[tuple[Term, ...]]
    """The figures that `update` returns, in order."""
    scheduled: ClassVar[tuple[Term, ...]] = ()
    """Loss weights that follow a schedule, logged next to the learning rate."""
    sampled: ClassVar[str]
    """The network whose moving average draws samples."""
    adversary: ClassVar[str | None] = None
    """The network that the monitor and phases may reload from an earlier update."""

    settings: RunSettings
    classifier: nn.Module | None = None
    """The classifier of latents that guides, where there is one."""

    @abstractmethod
    def build_networks(self) -> dict[str, nn.Module]:
        """Build the networks with fresh weights on the current default device, in the order that seeds them."""

    def build_buffers(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors, besides weights, that updates change: part of every checkpoint."""
        return {}

    @abstractmethod
    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        """Return a fresh optimizer of one network."""

    @abstractmethod
    def num_updates(self, num_images: int) -> int:
        """Return the number of updates of a whole run on a data set of `num_images` images."""

    @abstractmethod
    def hyperparameters(self, update: int, num_images: int, clock: float | None = None) -> Hyperparameters:
        """Return the hyperparameters of an update, counted from 0.

        `clock` is the update at which the schedules of loss weights are evaluated; left out: the update itself.
        """

    def decayed(self, update: int, num_images: int, clock: float) -> bool:
        """Return whether the scheduled loss weights are constant after `clock`."""
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
        """Update the networks once from what `Batches.draw` returned; return the batch's figures (len(terms),)."""

    @abstractmethod
    def sampler(self, network: nn.Module) -> Sampler:
        """Return the sampler of the sampled network or of its moving average."""

    @abstractmethod
    def example_batch(self, count: int, penalized: int | None = None) -> Any:
        """Return what `update` takes, a micro-batch of `count` images, on the default device, for counting.

        `penalized` of them are penalized; left out: the run's share.
        """

    @abstractmethod
    def example_forward(self, networks: Mapping[str, nn.Module], count: int) -> Tensor:
        """Run one forward pass of the sampled network on `count` images, the unit of counted work."""

    def describe(self) -> dict[str, Any]:
        """Return the "model" entry of a model's config.json."""
        return {}

    def progress(self, row: Mapping[str, float]) -> str:
        """Return a few figures of a row for the progress line."""
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

    Raises UserError when there are more processes than images in a batch.
    """
    if processes > batch_size:
        raise UserError(
            f"Found {processes} processes for a batch of {batch_size} images, expected no more than that: start fewer "
            "processes, or raise batch_size."
        )
    share = -(-batch_size // processes)  # of the process with the most images
    parts = 1 if micro_batch is None else -(-share // micro_batch)
    return max(min(parts, batch_size // processes), 1)  # no micro-batch is empty
