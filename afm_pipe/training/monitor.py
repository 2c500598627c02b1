"""The monitor of a run: it applies the rules, logs what they find, and acts where params say so.

Every decision is a function of the rows, the probes and the seed, never of the clock: the same run decides the same
again, and a resumed one decides as if it had never been interrupted. docs/monitor.md says what a person should know.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from afm_pipe.objectives.base import Hyperparameters
from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Run
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.runtime.files import read_json
from afm_pipe.training.callback import Action, Callback, Training
from afm_pipe.training.checkpoints import checkpoints, load_latest, save_checkpoint
from afm_pipe.training.events import Event
from afm_pipe.training.interventions import begins
from afm_pipe.training.monitor_state import MonitorState
from afm_pipe.training.probe import WORST, Probe
from afm_pipe.training.rules import Alarm, Watched, alarms_of_probes, alarms_of_rows, stopped_improving

PHASES = 3  # of `schedule: auto`
SPARE = 2  # adversaries more than the candidates, so that a checkpoint that is still being written finds its own


class TrainingMonitor(Callback):
    """Monitors one run. Several processes hold the same state and decide the same; the main one writes the files."""

    def __init__(self, training: Training, run: Run, identity: str) -> None:
        self.training, self.run, self.identity = training, run, identity
        self.state, self.store, self.group = training.state, training.store, training.group
        remembered = self.state.extra.get("monitor")
        self.memory = MonitorState() if remembered is None else MonitorState.from_json(remembered)
        self.watched = Watched.of(training.objective)
        self.averaged = training.objective.sampler(self.state.ema)
        self.act = run.monitor.policy == "act"
        self.auto = run.schedule == "auto"

    def begin(self) -> None:
        """Write the log of events anew: a kill may have left half a line, a full disk none."""
        self.store.write_events(self.memory.events)
        if self.act and self.memory.good is None:
            self._save_good()

    def end(self) -> None:
        """Write the whole log of events."""
        self.store.write_events(self.memory.events)

    @property
    def finished(self) -> bool:
        """Whether an auto schedule has come to its end."""
        return self.memory.finished

    @cached_property
    def probe(self) -> Probe:
        """What measures the moving average."""
        return Probe(self.training.latents, self.run, next(self.state.ema.parameters()).device)

    def prepare(self) -> None:
        """Read what the probe compares with, before an update whose row may need it, so that a failure costs nothing.

        Raises UserError when latents cannot be read.
        """
        if self.run.monitor.policy != "off" or self.auto:
            self.probe  # noqa: B018  # built on first use

    def adjust(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """Return what the next update uses, with what actions, and the phases of an auto schedule, have changed."""
        objective, num_images = self.training.objective, self.training.latents.num_images
        return self.memory.adjusted(objective, self.run, hyperparameters, self.state.update, num_images)

    def before_update(self) -> None:
        """Replace G by its moving average where a phase of an auto schedule, or an epoch in one, begins."""
        memory, num_images = self.memory, self.training.latents.num_images
        if memory.phase and begins(self.run, self.state.update, memory.phase_since, num_images):
            self.state.sampled_from_ema()

    def not_finite(self, error: NotFiniteError) -> Action:
        """Log a non-finite loss; go back to the last good probe where the policy says so."""
        if self.run.monitor.policy == "off":
            return Action.CONTINUE
        return self._roll_back(Alarm("divergence", "a non-finite loss", {"update": error.update}))

    def after_row(self) -> Action:
        """Apply the rules after a row of the curves, and act."""
        if self.run.monitor.policy == "off" and not self.auto:
            return Action.CONTINUE
        alarms, probed = alarms_of_rows(self.run, self.watched, self.state.rows), False
        checked = {"divergence", "identity"}
        if self._probe_due() or (self.auto and self.state.update == self.training.total):
            probed = True
            self._take_probe()
            self._keep_adversary()  # before another is put in its place
            alarms += alarms_of_probes(self.run, self.watched, self.state.rows, self.memory.probes)
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

    # A probe, and what follows from it.

    def _probe_due(self) -> bool:
        rows, every = self.state.rows, self.run.monitor.probe.every_epochs
        before = rows[-2]["epoch"] if len(rows) > 1 else 0.0
        return rows[-1]["epoch"] // every > before // every

    def _take_probe(self) -> None:
        row, memory = self.state.rows[-1], self.memory
        found = self.probe(self.averaged)  # the same on every process
        memory.probes.append({"update": row["update"], "epoch": row["epoch"]} | found)
        if self.auto and found["kid"] <= min(probe["kid"] for probe in memory.probes):
            memory.best = self.state.update
            assert self.state.best is not None, "an auto schedule keeps its best"
            self.state.best.load_state_dict(self.state.ema.state_dict())

    def _advance_schedule(self) -> None:
        """Begin the next phase of an auto schedule, or end, when probes have stopped improving."""
        memory, update, total = self.memory, self.state.update, self.training.total
        plateau = stopped_improving(self.run, memory.probes, memory.phase_since)
        best = next(probe for probe in memory.probes if probe["update"] == memory.best)
        evidence = {"kid": memory.probes[-1]["kid"], "best_kid": best["kid"], "best_update": best["update"]}
        if update < total and not plateau:
            return
        if update == total or memory.phase == PHASES - 1:
            why = "no better in the last phase" if plateau else "the upper bound of its epochs"
            memory.finished = True
            assert self.state.best is not None
            self.state.ema.load_state_dict(self.state.best.state_dict())
            self._log("stop", why, evidence, f"weights of the best probe, update {memory.best:,}, are the result")
            return
        memory.phase, memory.phase_since = memory.phase + 1, update
        done = "G replaced by its moving average, now and after every epoch"
        if memory.phase == PHASES - 1:
            done += "; " + self._reload_adversary()
        self._log("phase", f"phase {memory.phase + 1} begins: probes are no better", evidence, done)

    def _respond(self, alarm: Alarm) -> Action:
        """Act on an alarm as the policy says, and log both."""
        if alarm.kind == "divergence" and self.act:
            return self._roll_back(alarm)
        action = None
        if alarm.kind == "stagnation" and (self.act or self._reloads_now()):
            action = self._unstick()
        elif alarm.kind == "identity" and self.act:
            action = self._speed_up()
        self._log(alarm.kind, alarm.text, alarm.evidence, action)
        return Action.CONTINUE

    # Actions.

    def _roll_back(self, alarm: Alarm) -> Action:
        """Go back to the last good probe with lower learning rates, where the policy and its limit allow it."""
        state, then = self.state, self.memory
        limit = self.run.monitor.act.rollbacks
        if not self.act or then.rollbacks >= limit:
            self._log(alarm.kind, alarm.text, alarm.evidence, f"given up after {limit} rollbacks" if self.act else None)
            return Action.CONTINUE
        at, seconds, extra, factor = state.update, state.seconds, state.extra, self.run.monitor.act.lr
        load_latest(self.store.good, state, self.identity, until=then.good)
        if state.extra is extra:  # nothing was loaded
            self._log(alarm.kind, alarm.text, alarm.evidence, "found no whole checkpoint to go back to")
            return Action.CONTINUE
        state.seconds = seconds
        self.memory = MonitorState.from_json(state.extra["monitor"])
        self.memory.events, self.memory.rollbacks = then.events, then.rollbacks + 1
        self.memory.rate = then.rate * factor
        action = f"back to update {state.update:,}, learning rates times {factor:g}"
        self._log(alarm.kind, alarm.text, alarm.evidence | {"rolled_back_to": state.update}, action, at)
        self._remember()
        self.store.write_rows(state.rows, self.training.objective.columns())
        return Action.RESTORED

    def _unstick(self) -> str:
        """Put D back, replace G by its moving average, lower the rates: the paper's phases 2 and 3."""
        factor = self.run.monitor.act.lr
        self.memory.rate *= factor
        self.state.sampled_from_ema()
        return f"G replaced by its moving average, learning rates times {factor:g}; {self._reload_adversary()}"

    def _reload_adversary(self) -> str:
        """Put D back to the earlier one with which a few updates lead to the smallest distance."""
        earlier = [update for update in self.memory.adversaries if update < self.state.update]
        candidates = earlier[-self.run.monitor.act.candidates :]
        if not candidates:
            return "no earlier D is kept, so D stays"
        found = {update: self._try(update) for update in candidates}
        best = min(found, key=lambda update: found[update])
        self._load_adversary(best)
        tried = ", ".join(f"{kid:.4g} with that of update {update:,}" for update, kid in found.items())
        return f"D put back to update {best:,} (distance after a trial: {tried})"

    def _try(self, update: int) -> float:
        """Return the distance after some updates with an earlier D; the state is then as before."""
        before = {
            part: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for part, tensors in self.state.tensors().items()
        }
        at = self.state.update
        updates = max(update_at(self.run, self.run.monitor.act.trial_epochs, self.training.latents.num_images), 1)
        self._load_adversary(update)
        try:
            for _ in range(updates):
                self.training.try_update()
            return self.probe(self.averaged)["kid"]
        except NotFiniteError:
            return WORST
        finally:
            self.state.load_tensors(before, self.store.folder)
            self.state.update = at

    def _speed_up(self) -> str:
        """Make the transport weight decay faster, or lower it where it does not decay any more."""
        factor, update, memory = self.run.monitor.act.transport_speed, self.state.update, self.memory
        if self.training.objective.decayed(update, self.training.latents.num_images, memory.clock(update)):
            memory.weight_scale /= factor
            return f"transport weight over {factor:g}"
        memory.speed_up(update, factor)
        return f"transport weight decays {memory.decay_speed:g} times as fast"

    # Files and the log.

    def _save_good(self) -> None:
        self.memory.good = self.state.update
        self._remember()
        shares = self.state.shares
        if self.group.is_main_process or shares.world_size > 1:
            # A killed run may resume before its last rollback, and then goes back as it did before.
            remembered = [memory.get("good") for memory in self._remembered(self.store.checkpoints)]
            keep = {good for good in remembered if good is not None}
            save_checkpoint(self.store.good, self.state, self.identity, last=SPARE, keep=keep, shares=shares)
        self.group.barrier()

    def _keep_adversary(self) -> None:
        """Keep D where it may be put back later; drop those that no state refers to any more."""
        reloads = any(phase.reload_discriminator == "stall" for phase in self.run.phases)
        if not (self.act or self.auto or reloads):
            return
        memory, update = self.memory, self.state.update
        memory.adversaries = [*memory.adversaries, update][-self.run.monitor.act.candidates - SPARE :]
        self.store.save(self.store.adversary(update), self._adversary)
        if self.group.is_main_process:
            wanted = set(memory.adversaries)
            for remembered in self._remembered(self.store.good, self.store.checkpoints):
                wanted |= set(remembered.get("adversaries", ()))
            self.store.keep_adversaries(wanted)
        self.group.barrier()

    def _remembered(self, *folders: Path) -> list[dict[str, Any]]:
        """Return what the monitor remembers in the checkpoints of some folders."""
        found = []
        for checkpoint in (each for folder in folders for each in checkpoints(folder)):
            try:
                found.append(read_json(checkpoint / "extra.json").get("monitor", {}))
            except UserError:  # damaged, or just being removed in the background: nothing resumes from it
                continue
        return found

    @property
    def _adversary(self) -> nn.Module:
        name = self.training.objective.adversary
        assert name is not None, "params refuse reloads of D without one"
        return self.state.networks[name]

    def _load_adversary(self, update: int) -> None:
        self.store.load(self.store.adversary(update), self._adversary)

    def _reloads_now(self) -> bool:
        phase = self.training.hyperparameters().phase
        return phase is not None and phase.reload_discriminator == "stall"

    def _log(
        self, kind: str, text: str, evidence: dict[str, float], action: str | None = None, update: int | None = None
    ) -> None:
        at = self.state.update if update is None else update
        # Sorted, as a checkpoint gives them back: the log of a killed run is the same to the byte.
        known = {name: value if math.isfinite(value) else None for name, value in sorted(evidence.items())}
        event = Event(at, at * self.run.batch_size, kind, text, known, action)
        self.memory.events.append(event)
        self.store.append_event(event)
