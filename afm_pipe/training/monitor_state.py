"""What the watch remembers of a training: a part of every checkpoint, as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from afm_pipe.params import Run
from afm_pipe.training.events import Event
from afm_pipe.training.rules import Probed
from afm_pipe.training.schedules import Setting, cosine


@dataclass
class MonitorState:
    """Events and probes so far, and what actions have changed."""

    events: list[Event] = field(default_factory=list)
    probes: list[Probed] = field(default_factory=list)
    holding: list[str] = field(default_factory=list)  # alarms that were fired and still hold
    rate: float = 1.0  # learning rates are multiplied by it
    rollbacks: int = 0
    good: int | None = None  # update of the checkpoint that a rollback goes back to
    transport_scale: float = 1.0
    decay_speed: float = 1.0  # of the transport weight, since the update `decay_since`, when its clock stood at:
    decay_since: int = 0
    decay_clock: float = 0.0
    discriminators: list[int] = field(default_factory=list)  # updates after which D was kept
    phase: int = 0  # of `schedule: auto`, counted from 0, and the update it began with
    phase_since: int = 0
    best: int | None = None  # update of the best probe
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "MonitorState":
        """Return the state that `to_json` gave."""
        return cls(**value | {"events": [Event(**event) for event in value["events"]]})

    def clock(self, update: int) -> float:
        """Return how many updates of its decay the transport weight has gone through."""
        return self.decay_clock + self.decay_speed * (update - self.decay_since)

    def speed_up(self, update: int, factor: float) -> None:
        """Let the transport weight decay faster from now on."""
        self.decay_clock, self.decay_since = self.clock(update), update
        self.decay_speed *= factor

    def adjusted(self, run: Run, setting: Setting, update: int, num_images: int) -> Setting:
        """Return a setting with what actions, and the phases of an auto schedule, have changed."""
        if self.decay_speed != 1 or self.transport_scale != 1 or self.phase:
            transport = setting.phase.transport or run.transport
            updates = round(transport.decay_epochs * num_images / run.batch_size)
            weight = (
                transport.end if self.phase else cosine(transport.start, transport.end, self.clock(update), updates)
            )
            setting = setting._replace(transport=self.transport_scale * weight)
        rate = self.rate * (run.monitor.auto.lr[self.phase - 1] if self.phase else 1.0)
        if rate != 1:
            setting = setting._replace(lr=rate * setting.lr, lr_discriminator=rate * setting.lr_discriminator)
        return setting
