"""The state of the monitor: part of every checkpoint, as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from afm_pipe.objectives.base import Hyperparameters, Objective
from afm_pipe.params import Run
from afm_pipe.training.events import Event
from afm_pipe.training.rules import ProbeResult


@dataclass
class MonitorState:
    """Events and probes so far, and the effects of actions."""

    events: list[Event] = field(default_factory=list)
    probes: list[ProbeResult] = field(default_factory=list)
    holding: list[str] = field(default_factory=list)  # alarms that were raised and still apply
    rate: float = 1.0  # factor of the learning rates
    rollbacks: int = 0
    good: int | None = None  # update of the checkpoint to roll back to
    weight_scale: float = 1.0  # factor of the scheduled loss weights
    decay_speed: float = 1.0  # speed of the schedules of loss weights since the update `decay_since`
    decay_clock: float = 0.0  # position in these schedules at that update
    decay_since: int = 0
    adversaries: list[int] = field(default_factory=list)  # updates after which the adversary was saved
    phase: int = 0  # of `schedule: auto`, counted from 0
    phase_since: int = 0  # first update of the phase
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
        """Speed up the schedules of loss weights from `update` on."""
        self.decay_clock, self.decay_since = self.clock(update), update
        self.decay_speed *= factor

    def adjusted(
        self, objective: Objective, run: Run, hyperparameters: Hyperparameters, update: int, num_images: int
    ) -> Hyperparameters:
        """Return the hyperparameters with the changes made by actions and by phases of an auto schedule."""
        weights = {}
        if self.decay_speed != 1 or self.weight_scale != 1 or self.phase:
            scheduled = objective.hyperparameters(update, num_images, self.clock(update)).weights
            if self.phase and "transport" in scheduled:
                scheduled = {**scheduled, "transport": run.monitor.auto.transport}
            weights = {name: self.weight_scale * weight for name, weight in scheduled.items()}
        rate = self.rate * (run.monitor.auto.lr[self.phase - 1] if self.phase else 1.0)
        return hyperparameters.scaled(rate, weights)
