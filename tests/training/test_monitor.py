"""Runs that are monitored: provoked failures, the monitor's actions, and that a resumed run decides the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import stream_generator
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run, deep_merge
from afm_pipe.params.file import load_params
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.training.events import FILE, Event
from afm_pipe.training.probe import Probe, choose_in_equal_shares
from afm_pipe.training.state import TrainingState
from afm_pipe.training.store import RunStore
from afm_pipe.training.trainer import Runtime, Task, Trainer
from tests.conftest import ROOT
from tests.training.running import assert_same, same_weights, train, updates_of, weights

LAST = 38  # update: five epochs of 60 images; rows at 10, 20, 30 and 38, a probe at each


class Runs:
    """Runs on the discs by name, in one folder."""

    def __init__(self, folder: Path, latents: Latents, run: Run) -> None:
        self.folder, self.latents, self.run = folder, latents, run

    def train(self, name: str, own: dict[str, Any], stop_at: int | None = None, seconds: float = 1e9) -> TrainingState:
        """Train or resume a run with overrides, up to the row at `stop_at` if it is given."""
        run = Run.model_validate(deep_merge(self.run.model_dump(mode="json"), own))
        objective = build_objective(run, run_config(run, self.latents.latent_shape, self.latents.num_classes))
        task = Task(objective, self.latents, "monitored", keep_at=(LAST,))
        return train(Trainer(task, Runtime(self.folder / name, checkpoint_seconds=seconds)), stop_at)

    def store(self, name: str) -> RunStore:
        return RunStore(self.folder / name)

    def events(self, name: str, kind: str | None = None) -> list[Event]:
        """Return the events of a run, or those of a kind."""
        return [event for event in self.store(name).read_events() if kind in (None, event.kind)]


@pytest.fixture(scope="module")
def latents(discs: Path) -> Latents:
    return Latents.open(discs / "data" / "latents.h5")


@pytest.fixture(scope="module")
def runs(latents: Latents, discs_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = {
        "size": "s4",
        "phases": [{"until_epoch": 5}],
        "monitor": {"settle_epochs": 1.0, "probe": {"every_epochs": 1.25}},
    }
    run = Run.model_validate(deep_merge(discs_params.runs["t4"].model_dump(mode="json"), base))
    return Runs(tmp_path_factory.mktemp("monitored"), latents, run)


def test_monitoring_changes_no_weight(runs: Runs) -> None:
    short = {"phases": [{"until_epoch": 2.6}]}
    warned = runs.train("warn", short | {"monitor": {"policy": "warn"}})
    assert [probe["update"] for probe in warned.extra["monitor"]["probes"]] == [10, 20]
    off = runs.train("off", short | {"monitor": {"policy": "off"}})
    assert same_weights(warned, off)
    assert "monitor" not in off.extra


def test_identity_is_noticed_and_lowers_the_transport_weight(runs: Runs) -> None:
    short = {"form": "residual", "phases": [{"until_epoch": 4}], "monitor": {"policy": "act", "rows": 1}}
    constant = runs.train("constant", short | {"transport": {"start": 50.0, "end": 50.0}})
    event = runs.events("constant", "identity")[0]
    assert event.evidence["transport_rms"] is not None
    assert event.evidence["transport_rms"] < 0.2
    assert event.action == "transport weight divided by 2"
    assert [row["transport"] for row in constant.rows] == [50.0, 25.0, 25.0]
    decaying = runs.train("decay", short | {"transport": {"start": 50.0, "end": 10.0, "decay_epochs": 8}})
    event = runs.events("decay", "identity")[0]
    assert event.action == "transport weight decays 2 times as fast"
    clock = event.update + 2 * (29 - event.update)  # of the last update, counted from 0
    expected = 10 + 40 * (1 + torch.cos(torch.tensor(torch.pi * clock / 59))) / 2
    assert decaying.rows[-1]["transport"] == pytest.approx(float(expected), rel=1e-5)


# A rate at which losses are not finite within a few updates.
NAN = {
    "phases": [{"until_epoch": 5, "lr": 1.0e6}],
    "monitor": {"policy": "act", "act": {"rollbacks": 2, "lr": 1.0e-9}, "divergence": {"spread": 0.0}},
}


@pytest.fixture(scope="module")
def rolled_back(runs: Runs) -> TrainingState:
    return runs.train("rolled back", NAN)


def test_nan_rolls_back_to_the_last_good_probe_at_lower_rates(runs: Runs, rolled_back: TrainingState) -> None:
    event = runs.events("rolled back")[0]
    assert (event.kind, event.evidence["rolled_back_to"]) == ("divergence", 0)
    assert event.action == "rolled back to update 0, learning rates times 1e-09"
    assert rolled_back.update == LAST
    assert all(torch.isfinite(tensor).all() for tensor in weights(rolled_back).values())
    assert [row["update"] for row in rolled_back.rows] == [10, 20, 30, LAST], "each row once"
    assert rolled_back.rows[0]["lr"] == pytest.approx(1.0e-3)


def test_a_kill_after_a_rollback_changes_nothing(runs: Runs, rolled_back: TrainingState) -> None:
    with pytest.raises(InterruptedError):
        runs.train("cut", NAN, stop_at=20, seconds=0.0)
    assert runs.events("cut")[0].kind == "divergence"
    with (runs.folder / "cut" / FILE).open("a") as file:
        file.write('{"update": 2')  # what a kill in the middle of a write leaves
    assert_same(runs.train("cut", NAN), rolled_back)
    assert runs.events("cut") == runs.events("rolled back")


def test_a_kill_before_the_first_checkpoint_after_a_rollback_changes_nothing(
    runs: Runs, rolled_back: TrainingState
) -> None:
    with pytest.raises(InterruptedError):
        runs.train("cut early", NAN, stop_at=30)
    store = runs.store("cut early")
    assert not updates_of(store.checkpoints)
    assert updates_of(store.good)[-1] > 0
    assert_same(runs.train("cut early", NAN), rolled_back)
    assert runs.events("cut early") == runs.events("rolled back")


def test_damaged_good_checkpoints_are_not_used(runs: Runs) -> None:
    calm = deep_merge(NAN, {"phases": [{"until_epoch": 5, "lr": 1.0e-3}]})
    with pytest.raises(InterruptedError):
        runs.train("bad", calm, stop_at=20, seconds=0.0)
    for path in runs.store("bad").good.glob("*/generator.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(NotFiniteError):
        runs.train("bad", NAN)
    assert runs.events("bad")[-1].action == "no undamaged checkpoint to roll back to"


@pytest.mark.parametrize(
    ("policy", "actions"),
    [
        ("act", ["rolled back to update 0, learning rates times 0.9"] * 2 + ["given up after 2 rollbacks"]),
        ("warn", [None]),
    ],
)
def test_a_run_that_keeps_diverging_fails(runs: Runs, policy: str, actions: list[str | None]) -> None:
    with pytest.raises(NotFiniteError):
        runs.train(policy, deep_merge(NAN, {"monitor": {"policy": policy, "act": {"lr": 0.9}}}))
    ended = [event for event in runs.events(policy) if "finite" in event.text]
    assert [event.action for event in ended] == actions, [event.text for event in runs.events(policy)]


# No probe is better than one before by its whole distance, so it always stands still; and D always wins.
STUCK = {
    "monitor": {
        "policy": "act",
        "stagnation": {"probes": 3, "improvement": 1.0, "d_accuracy": 0.0},
        "divergence": {"spread": 0.0},
        "act": {"trial_epochs": 0.6, "candidates": 2},
    }
}


@pytest.fixture(scope="module")
def stuck(runs: Runs) -> TrainingState:
    return runs.train("stuck", STUCK)


def test_a_stall_reloads_the_earlier_discriminator_that_does_best(runs: Runs, stuck: TrainingState) -> None:
    (event,) = runs.events("stuck", "stagnation")
    assert event.action is not None
    trials = event.action.split("trial: ")[1].rstrip(")").split(", ")
    tried = {int(trial.split()[-1]): float(trial.split()[0]) for trial in trials}
    assert max(tried) < event.update, "the current D is not among the earlier ones"
    assert f"D reloaded from update {min(tried, key=tried.__getitem__)} " in event.action
    assert stuck.rows[-1]["lr"] == stuck.rows[0]["lr"] / 2
    assert len(list((runs.folder / "stuck" / "adversaries").glob("probe-*"))) <= 6, "bounded"


def test_a_kill_after_a_stall_changes_nothing(runs: Runs, stuck: TrainingState) -> None:
    with pytest.raises(InterruptedError):
        runs.train("cut after a stall", STUCK, stop_at=30, seconds=0.0)
    assert_same(runs.train("cut after a stall", STUCK), stuck)
    for line in (runs.folder / "cut after a stall" / FILE).read_text().splitlines():
        assert set(json.loads(line)) == {"update", "images", "kind", "text", "evidence", "action"}


def test_the_discriminator_of_a_probe_is_kept_before_another_is_loaded(runs: Runs, stuck: TrainingState) -> None:
    at = runs.events("stuck", "stagnation")[0].update
    assert at in stuck.extra["monitor"]["adversaries"]
    until = {"monitor": {"policy": "warn"}, "phases": [{"until_epoch": at * 8 / 60}]}  # when the stall is noticed
    trained = runs.train("until the stall", deep_merge(STUCK, until))
    assert trained.update == at
    kept = load_file(runs.store("stuck").adversary(at))
    current = trained.networks["discriminator"].state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in current.items())


def test_a_trial_leaves_no_trace_but_its_choice(runs: Runs) -> None:
    one = deep_merge(STUCK, {"monitor": {"act": {"candidates": 1}}})  # so that the choice is known before
    short = runs.train("short", deep_merge(one, {"monitor": {"act": {"trial_epochs": 0.2}}}))
    long = runs.train("long", deep_merge(one, {"monitor": {"act": {"trial_epochs": 0.8}}}))
    assert same_weights(short, long)
    assert short.rows == long.rows
    assert runs.events("short", "stagnation")[0].action != runs.events("long", "stagnation")[0].action


def test_a_phase_that_waits_for_a_stall_reloads_whatever_the_policy(runs: Runs) -> None:
    phases = [{"until_epoch": 3}, {"until_epoch": 5, "reload_discriminator": "stall"}]
    runs.train("early", deep_merge(STUCK, {"monitor": {"policy": "warn"}}))
    assert runs.events("early", "stagnation")[0].action is None
    runs.train("waits", deep_merge(STUCK, {"monitor": {"policy": "warn", "settle_epochs": 2.0}, "phases": phases}))
    assert "D reloaded" in (runs.events("waits", "stagnation")[0].action or "")


AUTO = {"schedule": "auto", "monitor": {"stagnation": {"probes": 3, "improvement": 1.0}}}


def test_an_auto_schedule_has_three_phases_and_returns_its_best_probe(runs: Runs) -> None:
    bound = {"phases": [{"until_epoch": 20}]}
    whole = runs.train("auto", AUTO | bound)
    events = [event for event in runs.events("auto") if event.kind in ("phase", "stop")]
    assert [event.kind for event in events] == ["phase", "phase", "stop"]
    assert "D reloaded from update" in (events[1].action or "")
    assert whole.update < 150, "stopped before its upper bound"
    first = whole.rows[0]["lr"]
    assert sorted({round(row["lr"] / first, 6) for row in whole.rows}) == [0.3, 0.8, 1.0]
    probes = whole.extra["monitor"]["probes"]
    assert whole.extra["monitor"]["best"] == min(probes, key=lambda probe: probe["kid"])["update"]
    assert whole.best is not None
    assert all(torch.equal(tensor, whole.best.state_dict()[name]) for name, tensor in whole.ema.state_dict().items())

    with pytest.raises(InterruptedError):
        runs.train("auto, cut", AUTO | bound, stop_at=30, seconds=0.0)
    assert_same(runs.train("auto, cut", AUTO | bound), whole)
    assert_same(runs.train("auto, cut", AUTO | bound), whole)  # and once more, of a finished one


def test_an_auto_schedule_ends_at_its_upper_bound_with_its_best(runs: Runs) -> None:
    state = runs.train("bound", deep_merge(AUTO, {"monitor": {"stagnation": {"probes": 9}}}))
    assert state.update == LAST
    assert "upper bound" in runs.events("bound", "stop")[0].text
    delivered = load_file(runs.store("bound").kept(LAST))
    assert all(torch.equal(tensor, delivered[name]) for name, tensor in state.ema.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("runs.t4.schedule=auto", "runs.t4.phases=[{until_epoch: 2}, {until_epoch: 4}]"), "one phase for schedule"),
        (
            ("runs.t4.monitor.policy=off", "runs.t4.phases=[{until_epoch: 8, reload_discriminator: stall}]"),
            "warn or act",
        ),
    ],
)
def test_what_needs_a_monitor_is_checked(
    change: Callable[..., Params], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        change(*overrides)


def test_every_profile_is_monitored() -> None:
    for profile in ("params.yaml", "profiles/study.yaml", "profiles/imagenet256.yaml", "profiles/smoke.yaml"):
        params = load_params(ROOT / profile)
        assert params.train.monitor.policy == "warn"


def test_figures_of_a_probe_are_relative_to_the_data(latents: Latents, discs_params: Params) -> None:
    raw = discs_params.runs["t4"].model_dump(mode="json")
    run = Run.model_validate(deep_merge(raw, {"monitor": {"probe": {"updates": 150}}}))
    generator = stream_generator(run.seed, "probe")
    chosen = choose_in_equal_shares(torch.as_tensor(latents.labels), run.monitor.probe.samples, generator)
    data = latents.draw(chosen, generator)

    class Copies:
        """A sampler that returns given latents."""

        def __init__(self, samples: torch.Tensor) -> None:
            self.samples = list(samples.split(run.batch_size))

        def sample(self, z: torch.Tensor, labels: torch.Tensor, steps: int | None = None) -> torch.Tensor:
            return self.samples.pop(0)

    probe = Probe(latents, run, torch.device("cpu"))
    same = probe(Copies(data))
    assert [same[name] for name in ("class_accuracy", "variance", "spread")] == pytest.approx([1, 1, 1])
    assert all(0 < same[f"{name}_error"] < 1 for name in ("class_accuracy", "variance", "spread"))
    other = probe(Copies(data.roll(1, 0)))
    assert other["class_accuracy"] < 1 and other["spread"] == pytest.approx(1)
    one = probe(Copies(data[:1].expand_as(data)))
    assert one["variance"] < 1e-6 and one["spread"] < 1e-6
