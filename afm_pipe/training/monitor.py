"""The watch over a training: it asks the rules, writes down what they find, and acts where params say so.

Every decision is a function of the rows, the probes and the seed, never of the clock: the same run decides the same
again, and a resumed one goes on as if it had never been interrupted. docs/watch.md says what a person should know.
"""

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.flow import Flow
from afm_pipe.models.model_files import load_exactly, load_tensors, save_tensors
from afm_pipe.params import Run
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.runtime.files import atomic_path, read_json
from afm_pipe.training.checkpoints import checkpoints, load_latest, save_checkpoint
from afm_pipe.training.curves import write_curves
from afm_pipe.training.events import FILE, Event, append_event, write_events
from afm_pipe.training.interventions import begins
from afm_pipe.training.monitor_state import MonitorState
from afm_pipe.training.probe import WORST, Probe
from afm_pipe.training.rules import Alarm, alarms_of_probes, alarms_of_rows, stopped_improving
from afm_pipe.training.schedules import Setting, setting_at, update_at
from afm_pipe.training.sharding import placed, whole
from afm_pipe.training.state import TrainingState

PHASES = 3  # of `schedule: auto`
SPARE = 2  # more than what is asked for now, so that a checkpoint that is still being written finds its own


class TrainingMonitor:
    """Watches one training. `try_update` makes one update of it, which counts in the state.

    Several ranks hold the same state and decide the same; the first of them writes the files.
    """

    def __init__(
        self,
        run: Run,
        state: TrainingState,
        flow: Flow,
        latents: Latents,
        work_dir: Path,
        fingerprint: str,
        try_update: Callable[[], None],
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.run, self.state, self.latents, self.work_dir, self.fingerprint = run, state, latents, work_dir, fingerprint
        self.try_update, self.ranks = try_update, ranks
        self.watch = MonitorState.from_json(state.extra["monitor"]) if "monitor" in state.extra else MonitorState()
        self.averaged = Flow(state.ema, flow.form, flow.nfe)
        self.act = run.monitor.policy == "act"
        self.auto = run.schedule == "auto"
        self.write_log()
        if self.act and self.watch.good is None:
            self._save_good()

    def write_log(self) -> None:
        """Write the log of events anew: a kill may have left half a line, a full disk none."""
        if self.ranks.is_main_process:
            write_events(self.work_dir / FILE, self.watch.events)

    @property
    def finished(self) -> bool:
        """Whether an auto schedule has come to its end."""
        return self.watch.finished

    @cached_property
    def probe(self) -> Probe:
        """What measures the moving average."""
        return Probe(self.latents, self.run, next(self.state.ema.parameters()).device)

    def prepare(self) -> None:
        """Read what the probe compares with, before an update whose row may need it, so that a failure costs nothing.

        Raises UserError when latents cannot be read.
        """
        if self.run.monitor.policy != "off" or self.auto:
            self.probe  # noqa: B018  # made by being asked for

    def setting(self) -> Setting:
        """Return what the next update is made with."""
        update, num_images = self.state.update, self.latents.num_images
        return self.watch.adjusted(self.run, setting_at(self.run, update, num_images), update, num_images)

    def before_update(self) -> None:
        """Replace G by its moving average where a phase of an auto schedule, or an epoch in one, begins."""
        watch = self.watch
        if watch.phase and begins(self.run, self.state.update, watch.phase_since, self.latents.num_images):
            self.state.generator.load_state_dict(self.state.ema.state_dict())

    def not_finite(self, error: NotFiniteError) -> None:
        """Write down a loss that is no number; go back to the last good probe, or raise the error again."""
        if self.run.monitor.policy == "off":
            raise error
        if not self._roll_back(Alarm("divergence", "a loss that is not finite", {"update": error.update})):
            raise error

    def after_row(self, total: int) -> bool:
        """Look at the training after a row of its curves, and act; return whether it went back to an earlier update."""
        if self.run.monitor.policy == "off" and not self.auto:
            return False
        alarms, probed = alarms_of_rows(self.run, self.state.rows), False
        asked = {"divergence", "identity"}
        if self._probe_due() or (self.auto and self.state.update == total):
            probed = True
            self._take_probe()
            self._keep_discriminator()  # before any other is put in its place
            alarms += alarms_of_probes(self.run, self.state.rows, self.watch.probes)
            asked |= {"stagnation", "collapse"}
        holding = set(self.watch.holding) - asked | {alarm.kind for alarm in alarms}
        new = [alarm for alarm in alarms if alarm.kind not in self.watch.holding]
        self.watch.holding = sorted(holding)
        if self.run.monitor.policy != "off":
            for alarm in new:
                if self._respond(alarm):
                    return True
        if probed:
            if self.auto:
                self._move_on(total)
            if self.act and "divergence" not in holding:
                self._save_good()
        self._remember()
        return False

    def _remember(self) -> None:
        self.state.extra["monitor"] = self.watch.to_json()

    # What a probe is and what follows from it.

    def _probe_due(self) -> bool:
        rows, every = self.state.rows, self.run.monitor.probe.every_epochs
        before = rows[-2]["epoch"] if len(rows) > 1 else 0.0
        return rows[-1]["epoch"] // every > before // every

    def _take_probe(self) -> None:
        row, watch = self.state.rows[-1], self.watch
        found = self.probe(self.averaged)  # on every rank the same
        watch.probes.append({"update": row["update"], "epoch": row["epoch"]} | found)
        if self.auto and found["kid"] <= min(probe["kid"] for probe in watch.probes):
            watch.best = self.state.update
            assert self.state.best is not None, "an auto schedule keeps its best"
            self.state.best.load_state_dict(self.state.ema.state_dict())

    def _move_on(self, total: int) -> None:
        """Begin the next phase of an auto schedule, or end, when probes have stopped to get better."""
        watch, update = self.watch, self.state.update
        plateau = stopped_improving(self.run, watch.probes, watch.phase_since)
        best = next(probe for probe in watch.probes if probe["update"] == watch.best)
        evidence = {"kid": watch.probes[-1]["kid"], "best_kid": best["kid"], "best_update": best["update"]}
        if update < total and not plateau:
            return
        if update == total or watch.phase == PHASES - 1:
            why = "no better in the last phase" if plateau else "the upper bound of its epochs"
            watch.finished = True
            assert self.state.best is not None
            self.state.ema.load_state_dict(self.state.best.state_dict())
            self._note("stop", why, evidence, f"weights of the best probe, update {watch.best:,}, are the result")
            return
        watch.phase, watch.phase_since = watch.phase + 1, update
        done = "G replaced by its moving average, now and after every epoch"
        if watch.phase == PHASES - 1:
            done += "; " + self._reload_discriminator()
        self._note("phase", f"phase {watch.phase + 1} begins: probes are no better", evidence, done)

    def _respond(self, alarm: Alarm) -> bool:
        """Do what there is to do about an alarm; return whether the training went back to an earlier update."""
        if alarm.kind == "divergence" and self.act:
            return self._roll_back(alarm)
        action = None
        if alarm.kind == "stagnation" and (self.act or self._phase_waits_for_it()):
            action = self._unstick()
        elif alarm.kind == "identity" and self.act:
            action = self._speed_up()
        self._note(alarm.kind, alarm.text, alarm.evidence, action)
        return False

    # Actions. Each returns what it did, in words.

    def _roll_back(self, alarm: Alarm) -> bool:
        state, then = self.state, self.watch
        limit = self.run.monitor.act.rollbacks
        if not self.act or then.rollbacks >= limit:
            tried = f"given up after {limit} rollbacks" if self.act else None
            self._note(alarm.kind, alarm.text, alarm.evidence, tried)
            return False
        at, seconds, extra, factor = state.update, state.seconds, state.extra, self.run.monitor.act.lr
        load_latest(self._good, state, self.fingerprint, until=then.good)
        if state.extra is extra:  # nothing was loaded
            self._note(alarm.kind, alarm.text, alarm.evidence, "found no whole checkpoint to go back to")
            return False
        state.seconds = seconds
        self.watch = MonitorState.from_json(state.extra["monitor"])
        self.watch.events, self.watch.rollbacks, self.watch.rate = then.events, then.rollbacks + 1, then.rate * factor
        action = f"back to update {state.update:,}, learning rates times {factor:g}"
        self._note(alarm.kind, alarm.text, alarm.evidence | {"rolled_back_to": state.update}, action, at)
        self._remember()
        if self.ranks.is_main_process:
            write_curves(self.work_dir / "curves.csv", state.rows)
        return True

    def _unstick(self) -> str:
        """Put D back, replace G by its moving average, lower the rates: the paper's phases 2 and 3."""
        factor = self.run.monitor.act.lr
        self.watch.rate *= factor
        self.state.generator.load_state_dict(self.state.ema.state_dict())
        return f"G replaced by its moving average, learning rates times {factor:g}; {self._reload_discriminator()}"

    def _reload_discriminator(self) -> str:
        """Put D back to the earlier one with which the training gets best in a few updates."""
        earlier = [update for update in self.watch.discriminators if update < self.state.update]
        then = earlier[-self.run.monitor.act.candidates :]
        if not then:
            return "no earlier D is kept, so D stays"
        found = {update: self._try(update) for update in then}
        best = min(found, key=lambda update: found[update])
        self._load_discriminator(best)
        tried = ", ".join(f"{kid:.4g} with that of update {update:,}" for update, kid in found.items())
        return f"D put back to update {best:,} (distance after a trial: {tried})"

    def _try(self, update: int) -> float:
        """Return the distance after some updates with an earlier D; the state is then as before."""
        before = {
            part: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for part, tensors in self.state.tensors().items()
        }
        at = self.state.update
        self._load_discriminator(update)
        try:
            for _ in range(max(update_at(self.run, self.run.monitor.act.trial_epochs, self.latents.num_images), 1)):
                self.try_update()
            return self.probe(self.averaged)["kid"]
        except NotFiniteError:
            return WORST
        finally:
            self.state.load_tensors(before, self.work_dir)
            self.state.update = at

    def _speed_up(self) -> str:
        """Let the transport weight decay faster, or lower it where it does not decay any more."""
        factor, update, watch = self.run.monitor.act.transport_speed, self.state.update, self.watch
        transport = setting_at(self.run, update, self.latents.num_images).phase.transport or self.run.transport
        over = watch.clock(update) >= update_at(self.run, transport.decay_epochs, self.latents.num_images)
        if over or transport.start == transport.end:
            watch.transport_scale /= factor
            return f"transport weight over {factor:g}"
        watch.speed_up(update, factor)
        return f"transport weight decays {watch.decay_speed:g} times as fast"

    # Files and the log.

    @property
    def _good(self) -> Path:
        return self.work_dir / "good"

    def _save_good(self) -> None:
        self.watch.good = self.state.update
        self._remember()
        if self.ranks.is_main_process or self.state.shares.world_size > 1:
            # A training that is killed may begin again before its last rollback, and then goes back as it did before.
            asked = {watch["good"] for watch in self._remembered("checkpoints") if watch.get("good") is not None}
            shares = self.state.shares
            save_checkpoint(self._good, self.state, self.fingerprint, last=SPARE, keep=asked, shares=shares)
        self.ranks.barrier()

    def _keep_discriminator(self) -> None:
        """Keep D for later, where it may be put back; drop those that no state asks for any more."""
        if not (self.act or self.auto or self._ever_waits()):
            return
        watch = self.watch
        watch.discriminators = [*watch.discriminators, self.state.update][-self.run.monitor.act.candidates - SPARE :]
        tensors = whole(self.state.discriminator.state_dict(), self.ranks)
        if self.ranks.is_main_process:
            self._write_discriminator(tensors)
        self.ranks.barrier()

    def _write_discriminator(self, tensors: dict[str, Tensor]) -> None:
        with atomic_path(self._discriminator(self.state.update)) as aside:
            save_tensors(aside, tensors)
        wanted = set(self.watch.discriminators)
        for watch in self._remembered("good", "checkpoints"):
            wanted |= set(watch.get("discriminators", ()))
        keep = {self._discriminator(update) for update in wanted}
        for path in set((self.work_dir / "discriminators").glob("probe-*")) - keep:
            path.unlink()

    def _remembered(self, *folders: str) -> list[dict[str, Any]]:
        """Return what checkpoints remember of the watch."""
        found = []
        for checkpoint in (each for folder in folders for each in checkpoints(self.work_dir / folder)):
            try:
                found.append(read_json(checkpoint / "extra.json").get("monitor", {}))
            except UserError:  # damaged, or just being removed in the background: nothing begins with it
                continue
        return found

    def _load_discriminator(self, update: int) -> None:
        path = self._discriminator(update)
        discriminator = self.state.discriminator
        load_exactly(discriminator, placed(load_tensors(path), discriminator.state_dict()), path)

    def _discriminator(self, update: int) -> Path:
        return self.work_dir / "discriminators" / f"probe-{update:09d}.safetensors"

    def _phase_waits_for_it(self) -> bool:
        return self.setting().phase.reload_discriminator == "stall"

    def _ever_waits(self) -> bool:
        return any(phase.reload_discriminator == "stall" for phase in self.run.phases)

    def _note(
        self, kind: str, text: str, evidence: dict[str, float], action: str | None = None, update: int | None = None
    ) -> None:
        at = self.state.update if update is None else update
        # Sorted, as a checkpoint gives them back: the log of a training that was killed is the same to the byte.
        known = {name: value if math.isfinite(value) else None for name, value in sorted(evidence.items())}
        event = Event(at, at * self.run.batch_size, kind, text, known, action)
        self.watch.events.append(event)
        if self.ranks.is_main_process:
            append_event(self.work_dir / FILE, event)
