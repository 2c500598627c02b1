"""The monitor's memory of a run: part of every checkpoint, as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from afm_pipe.objectives.base import Hyperparameters, Objective
from afm_pipe.params import Run
from afm_pipe.training.events import Event
from afm_pipe.training.rules import Probed


@dataclass
class MonitorState:
    """Events and probes so far, and the changes that actions made."""

    events: list[Event] = field(default_factory=list)
    probes: list[Probed] = field(default_factory=list)
    holding: list[str] = field(default_factory=list)  # alarms that were raised and still hold
    rate: float = 1.0  # factor of the learning rates
    rollbacks: int = 0
    good: int | None = None  # update of the checkpoint for a rollback
    weight_scale: float = 1.0  # factor of the scheduled loss weights
    decay_speed: float = 1.0  # of the scheduled loss weights, since the update `decay_since`
    decay_clock: float = 0.0  # of their schedules at that update
    decay_since: int = 0
    adversaries: list[int] = field(default_factory=list)  # updates after which the adversary was kept
    phase: int = 0  # of `schedule: auto`, counted from 0
    phase_since: int = 0  # its first update
    best: int | None = None  # update of the best probe
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "MonitorState":
        """Return the state from its JSON."""
        return cls(**value | {"events": [Event(**event) for event in value["events"]]})

    def clock(self, update: int) -> float:
        """Return the update at which the schedules of loss weights are evaluated."""
        return self.decay_clock + self.decay_speed * (update - self.decay_since)

    def speed_up(self, update: int, factor: float) -> None:
        """Make scheduled loss weights decay faster from now on."""
        self.decay_clock, self.decay_since = self.clock(update), update
        self.decay_speed *= factor

    def adjusted(
        self, objective: Objective, run: Run, found: Hyperparameters, update: int, num_images: int
    ) -> Hyperparameters:
        """Return hyperparameters as actions and the phases of an auto schedule have changed them."""
        weights = {}
        if self.decay_speed != 1 or self.weight_scale != 1 or self.phase:
            scheduled = objective.hyperparameters(update, num_images, self.clock(update)).weights
            if self.phase and "transport" in scheduled:
                scheduled = {**scheduled, "transport": run.monitor.auto.transport}
            weights = {name: self.weight_scale * weight for name, weight in scheduled.items()}
        rate = self.rate * (run.monitor.auto.lr[self.phase - 1] if self.phase else 1.0)
        return found.scaled(rate, weights)
