"""The training monitor: applies the rules, logs alarms, and reacts to them according to params (docs/monitor.md).

Decisions depend only on the rows, the probes and the seed, never on the clock, so that a repeated or a resumed run
makes the same decisions.
"""

import math
from functools import cached_property

from torch import nn

from afm_pipe.objectives.base import Hyperparameters
from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Run
from afm_pipe.runtime.errors import NotFiniteError
from afm_pipe.training.callback import Action, Callback, TrainerView
from afm_pipe.training.checkpoints import Snapshot, load_latest, save_checkpoint
from afm_pipe.training.events import Event
from afm_pipe.training.interventions import begins
from afm_pipe.training.monitor_state import MonitorState
from afm_pipe.training.probe import WORST, Probe
from afm_pipe.training.rules import (
    Alarm,
    MonitoredColumns,
    ProbeResult,
    alarms_of_probes,
    alarms_of_rows,
    stopped_improving,
)

PHASES = 3  # of `schedule: auto`
SPARE = 2  # adversaries kept besides the candidates, for a checkpoint that is still being written


class TrainingMonitor(Callback):
    """Monitors a run. All processes hold the same state and make the same decisions; the main process writes files."""

    def __init__(self, trainer: TrainerView, run: Run, identity: str) -> None:
        self.trainer, self.run, self.identity = trainer, run, identity
        self.state, self.store, self.group = trainer.state, trainer.store, trainer.group
        remembered = self.state.extra.get("monitor")
        self.memory = MonitorState() if remembered is None else MonitorState.from_json(remembered)
        self.monitored = MonitoredColumns.of(trainer.objective)
        self.ema_sampler = trainer.objective.sampler(self.state.ema)
        self.act = run.monitor.policy == "act"
        self.auto = run.schedule == "auto"

    def begin(self) -> None:
        """Rewrite the event log, which a kill or a full disk may have left incomplete."""
        self.store.write_events(self.memory.events)
        if self.act and self.memory.good is None:
            self._save_good()

    def end(self) -> None:
        """Write the whole event log."""
        self.store.write_events(self.memory.events)

    @property
    def finished(self) -> bool:
        """Whether an auto schedule is finished."""
        return self.memory.finished

    @cached_property
    def probe(self) -> Probe:
        """The probe that measures the EMA weights."""
        device = next(self.state.ema.parameters()).device
        return Probe(self.trainer.latents, self.run, device, self.trainer.objective.classifier)

    def prepare(self) -> None:
        """Build the probe, which reads latents, so that a failure loses no work. Raises UserError if it fails."""
        if self.run.monitor.policy != "off" or self.auto:
            self.probe  # noqa: B018  # builds it

    def adjust(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """Apply the changes made by actions and by phases of an auto schedule."""
        objective, num_images = self.trainer.objective, self.trainer.latents.num_images
        return self.memory.adjusted(objective, self.run, hyperparameters, self.state.update, num_images)

    def before_update(self) -> None:
        """Replace G by its EMA at the start of a later phase of an auto schedule, and of every epoch in it."""
        memory, num_images = self.memory, self.trainer.latents.num_images
        if memory.phase and begins(self.run, self.state.update, memory.phase_since, num_images):
            self.state.reload_ema()

    def not_finite(self, error: NotFiniteError) -> Action:
        """Log a non-finite loss; roll back to the last good probe if the policy is `act`."""
        if self.run.monitor.policy == "off":
            return Action.CONTINUE
        return self._roll_back(Alarm("divergence", "a non-finite loss", {"update": error.update}))

    def after_row(self) -> Action:
        """Apply the rules after a row of the curves, and react to alarms."""
        if self.run.monitor.policy == "off" and not self.auto:
            return Action.CONTINUE
        alarms, probed = alarms_of_rows(self.run, self.monitored, self.state.rows), False
        checked = {"divergence", "identity"}
        if self._probe_due() or (self.auto and self.state.update == self.trainer.total):
            probed = True
            self._take_probe()
            self._save_adversary()  # before another one is loaded
            alarms += alarms_of_probes(self.run, self.monitored, self.state.rows, self.memory.probes)
            checked |= {"stagnation", "collapse"}
        holding = set(self.memory.holding) - checked | {alarm.kind for alarm in alarms}
        new = [alarm for alarm in alarms if alarm.kind not in self.memory.holding]
        self.memory.holding = sorted(holding)
        if self.run.monitor.policy != "off":
            for alarm in new:
                if self._respond(alarm) is Action.RESTORED:
                    return Action.RESTORED
        if probed:
            if self.auto:
                self._advance_schedule()
            if self.act and "divergence" not in holding:
                self._save_good()
        self._remember()
        return Action.STOP if self.memory.finished else Action.CONTINUE

    def _remember(self) -> None:
        self.state.extra["monitor"] = self.memory.to_json()

    # Probes and the auto schedule.

    def _probe_due(self) -> bool:
        rows, every = self.state.rows, self.run.monitor.probe.every_epochs
        before = rows[-2]["epoch"] if len(rows) > 1 else 0.0
        return rows[-1]["epoch"] // every > before // every

    def _take_probe(self) -> None:
        row, memory = self.state.rows[-1], self.memory
        result = self._measure()
        memory.probes.append({"update": row["update"], "epoch": row["epoch"]} | result)
        if self.auto and result["kid"] <= min(probe["kid"] for probe in memory.probes):
            memory.best = self.state.update
            assert self.state.best is not None, "an auto schedule keeps its best"
            self.state.best.load_state_dict(self.state.ema.state_dict())

    def _measure(self) -> ProbeResult:
        """Return the probe of the EMA weights; all processes get that of the main process, so that they agree."""
        return self.group.broadcast(self.probe(self.ema_sampler))

    def _advance_schedule(self) -> None:
        """Begin the next phase of an auto schedule, or finish the run, when probes stop improving."""
        memory, update, total = self.memory, self.state.update, self.trainer.total
        plateau = stopped_improving(self.run, memory.probes, memory.phase_since)
        best = next(probe for probe in memory.probes if probe["update"] == memory.best)
        evidence = {name: memory.probes[-1][name] for name in ("kid", "kid_error")}
        evidence |= {f"best_{name}": best[name] for name in ("kid", "kid_error", "update")}
        if update < total and not plateau:
            return
        if update == total or memory.phase == PHASES - 1:
            why = "no improvement in the last phase" if plateau else "the upper bound of its epochs is reached"
            memory.finished = True
            assert self.state.best is not None
            self.state.ema.load_state_dict(self.state.best.state_dict())
            self._log("stop", why, evidence, f"the result is the best probe's weights, of update {memory.best:,}")
            return
        memory.phase, memory.phase_since = memory.phase + 1, update
        action = "G replaced by its moving average, now and after every epoch"
        if memory.phase == PHASES - 1:
            action += "; " + self._reload_adversary()
        self._log("phase", f"phase {memory.phase + 1} begins: probes no longer improve", evidence, action)

    def _respond(self, alarm: Alarm) -> Action:
        """React to an alarm according to the policy, and log the alarm and the action."""
        if alarm.kind == "divergence" and self.act:
            return self._roll_back(alarm)
        action = None
        if alarm.kind == "stagnation" and (self.act or self._reloads_on_stall()):
            action = self._recover_from_stall()
        elif alarm.kind == "identity" and self.act:
            action = self._reduce_transport()
        self._log(alarm.kind, alarm.text, alarm.evidence, action)
        return Action.CONTINUE

    # Actions.

    def _roll_back(self, alarm: Alarm) -> Action:
        """Roll back to the last good probe with lower learning rates, if the policy and its limit allow it."""
        state, memory = self.state, self.memory
        limit = self.run.monitor.act.rollbacks
        if not self.act or memory.rollbacks >= limit:
            self._log(alarm.kind, alarm.text, alarm.evidence, f"given up after {limit} rollbacks" if self.act else None)
            return Action.CONTINUE
        at, seconds, extra, factor = state.update, state.seconds, state.extra, self.run.monitor.act.lr
        load_latest(self.store.good, state, self.identity, until=memory.good)
        if state.extra is extra:  # nothing was loaded
            self._log(alarm.kind, alarm.text, alarm.evidence, "no undamaged checkpoint to roll back to")
            return Action.CONTINUE
        state.seconds = seconds
        self.memory = MonitorState.from_json(state.extra["monitor"])
        self.memory.events, self.memory.rollbacks = memory.events, memory.rollbacks + 1
        self.memory.rate = memory.rate * factor
        action = f"rolled back to update {state.update:,}, learning rates times {factor:g}"
        self._log(alarm.kind, alarm.text, alarm.evidence | {"rolled_back_to": state.update}, action, at)
        self._remember()
        self.store.write_rows(state.rows, self.trainer.objective.columns())
        return Action.RESTORED

    def _recover_from_stall(self) -> str:
        """Reload an earlier D, replace G by its EMA and lower the learning rates, as in the paper's phases 2 and 3."""
        factor = self.run.monitor.act.lr
        self.memory.rate *= factor
        self.state.reload_ema()
        return f"G replaced by its moving average, learning rates times {factor:g}; {self._reload_adversary()}"

    def _reload_adversary(self) -> str:
        """Reload the earlier D that leads to the smallest distance after a few updates."""
        earlier = [update for update in self.memory.adversaries if update < self.state.update]
        candidates = earlier[-self.run.monitor.act.candidates :]
        if not candidates:
            return "D unchanged: no earlier one is kept"
        distances = {update: self._try_adversary(update) for update in candidates}
        best = min(distances, key=lambda update: distances[update])
        self._load_adversary(best)
        tried = ", ".join(f"{kid:.4g} with D of update {update:,}" for update, kid in distances.items())
        return f"D reloaded from update {best:,} (distance after a trial: {tried})"

    def _try_adversary(self, update: int) -> float:
        """Return the distance after a few updates with the D of an earlier update; the state is restored afterwards."""
        before = Snapshot.of(self.state)  # in host memory, since a second state may not fit on the device
        at = self.state.update
        updates = max(update_at(self.run, self.run.monitor.act.trial_epochs, self.trainer.latents.num_images), 1)
        self._load_adversary(update)
        try:
            for _ in range(updates):
                self.trainer.try_update()
            return self._measure()["kid"]
        except NotFiniteError:
            return WORST
        finally:
            before.wait()
            self.state.load_tensors(before.tensors(), self.store.folder)
            self.state.update = at

    def _reduce_transport(self) -> str:
        """Speed up the decay of the transport weight, or divide the weight if the decay is over."""
        factor, update, memory = self.run.monitor.act.transport_speed, self.state.update, self.memory
        if self.trainer.objective.decayed(update, self.trainer.latents.num_images, memory.clock(update)):
            memory.weight_scale /= factor
            return f"transport weight divided by {factor:g}"
        memory.speed_up(update, factor)
        return f"transport weight decays {memory.decay_speed:g} times as fast"

    # Files and the event log.

    def _save_good(self) -> None:
        self.memory.good = self.state.update
        self._remember()
        if self.group.is_main_process or self.state.is_sharded:
            # A killed run may resume from before its last rollback, and must then roll back to the same checkpoint.
            remembered = [memory.get("good") for memory in self.store.remembered("monitor", self.store.checkpoints)]
            keep = {good for good in remembered if good is not None}
            save_checkpoint(self.store.good, self.state, self.identity, last=SPARE, keep=keep)
        self.group.barrier()

    def _save_adversary(self) -> None:
        """Save D for a later reload; remove earlier ones to which no checkpoint refers."""
        if self.trainer.objective.adversary is None:
            return
        memory, update = self.memory, self.state.update
        memory.adversaries = [*memory.adversaries, update][-self.run.monitor.act.candidates - SPARE :]
        self.store.save(self.store.adversary(update), self._adversary)
        if self.group.is_main_process:
            wanted = set(memory.adversaries)
            for remembered in self.store.remembered("monitor", self.store.good, self.store.checkpoints):
                wanted |= set(remembered.get("adversaries", ()))
            self.store.prune_adversaries(wanted)
        self.group.barrier()

    @property
    def _adversary(self) -> nn.Module:
        name = self.trainer.objective.adversary
        assert name is not None, "an objective without an adversary saves and reloads none"
        return self.state.networks[name]

    def _load_adversary(self, update: int) -> None:
        self.store.load(self.store.adversary(update), self._adversary)

    def _reloads_on_stall(self) -> bool:
        phase = self.trainer.hyperparameters().phase
        return phase is not None and phase.reload_discriminator == "stall"

    def _log(
        self, kind: str, text: str, evidence: dict[str, float], action: str | None = None, update: int | None = None
    ) -> None:
        at = self.state.update if update is None else update
        # Sorted, as in checkpoints, so that the log of a resumed run is byte-identical.
        known = {name: value if math.isfinite(value) else None for name, value in sorted(evidence.items())}
        event = Event(at, at * self.run.batch_size, kind, text, known, action)
        self.memory.events.append(event)
        self.store.append_event(event)
