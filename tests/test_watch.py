"""Trainings that are watched: provoked failures, what is done about them, and that a resume goes on with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from afm_pipe.training.loop import kept, train
from safetensors.torch import load_file

from afm_pipe.data.latents import Latents
from afm_pipe.data.order import stream_generator
from afm_pipe.models.flow import Flow
from afm_pipe.models.model_files import run_config
from afm_pipe.params import Params, Run, deep_merge
from afm_pipe.params.file import load_params
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.training.events import FILE, Event, read_events
from afm_pipe.training.probe import Probe
from afm_pipe.training.state import TrainingState

CPU = torch.device("cpu")
LAST = 38  # update: five epochs of 60 images; rows at 10, 20, 30 and 38, a probe at each
Watched = Callable[..., TrainingState]


@pytest.fixture
def watched(discs: Path, discs_params: Params, tmp_path: Path) -> Watched:
    """Return a function that trains the discs with overrides, as far as to a row if asked."""
    latents = Latents.open(discs / "data" / "latents.h5")
    base = {
        "size": "s4",
        "phases": [{"until_epoch": 5}],
        "monitor": {"settle_epochs": 1.0, "probe": {"every_epochs": 1.25}},
    }

    def trained(folder: str, own: dict[str, Any], stop_at: int | None = None, seconds: float = 0.0) -> TrainingState:
        run = Run.model_validate(deep_merge(deep_merge(discs_params.runs["t4"].model_dump(mode="json"), base), own))
        config = run_config(run, latents.latent_shape, latents.num_classes)
        # A checkpoint at every row, so that whatever stops it stops it right after one; or after so many seconds.
        training = train(run, config, latents, tmp_path / folder, "watched", CPU, seconds, keep_at=(LAST,))
        while True:
            try:
                tick = next(training)
            except StopIteration as end:
                return end.value.state
            if stop_at is not None and tick.done >= stop_at:
                training.close()
                raise InterruptedError

    return trained


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    parts = {part: getattr(state, part).state_dict() for part in ("generator", "discriminator", "ema")}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def same_weights(one: TrainingState, other: TrainingState) -> bool:
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def assert_same(one: TrainingState, other: TrainingState) -> None:
    assert same_weights(one, other)
    assert one.rows == other.rows
    assert one.extra == other.extra


def happened(tmp_path: Path, folder: str) -> list[Event]:
    return read_events(tmp_path / folder / FILE)


def of_kind(tmp_path: Path, folder: str, kind: str) -> Event:
    return next(event for event in happened(tmp_path, folder) if event.kind == kind)


def test_watching_changes_no_weight(watched: Watched, tmp_path: Path) -> None:
    short = {"phases": [{"until_epoch": 2.6}]}
    warned = watched("warn", short | {"monitor": {"policy": "warn"}})
    assert [probe["update"] for probe in warned.extra["monitor"]["probes"]] == [10, 20]
    off = watched("off", short | {"monitor": {"policy": "off"}})
    assert same_weights(warned, off)
    assert "monitor" not in off.extra


def test_identity_is_noticed_and_lets_the_transport_weight_go(watched: Watched, tmp_path: Path) -> None:
    short = {"form": "residual", "phases": [{"until_epoch": 4}], "monitor": {"policy": "act", "rows": 1}}
    constant = watched("constant", short | {"transport": {"start": 50.0, "end": 50.0}})
    event = of_kind(tmp_path, "constant", "identity")
    assert event.evidence["move"] is not None
    assert event.evidence["move"] < 0.2
    assert event.action == "transport weight over 2"
    assert [row["transport"] for row in constant.rows] == [50.0, 25.0, 25.0]
    decaying = watched("decay", short | {"transport": {"start": 50.0, "end": 10.0, "decay_epochs": 8}})
    event = of_kind(tmp_path, "decay", "identity")
    assert event.action == "transport weight decays 2 times as fast"
    clock = event.update + 2 * (29 - event.update)  # of the last update, counted from 0
    expected = 10 + 40 * (1 + torch.cos(torch.tensor(torch.pi * clock / 59))) / 2
    assert decaying.rows[-1]["transport"] == pytest.approx(float(expected), rel=1e-5)


# A rate at which losses are not finite within a few updates.
NAN = {
    "phases": [{"until_epoch": 5, "lr": 1.0e6}],
    "monitor": {"policy": "act", "act": {"rollbacks": 2, "lr": 1.0e-9}, "divergence": {"spread": 0.0}},
}


def test_nan_goes_back_to_the_last_good_probe_at_lower_rates(watched: Watched, tmp_path: Path) -> None:
    whole = watched("whole", NAN)
    event = happened(tmp_path, "whole")[0]
    assert (event.kind, event.evidence["rolled_back_to"]) == ("divergence", 0)
    assert event.action == "back to update 0, learning rates times 1e-09"
    assert whole.update == LAST
    assert all(torch.isfinite(tensor).all() for tensor in weights(whole).values())
    assert [row["update"] for row in whole.rows] == [10, 20, 30, LAST], "each row once"
    assert whole.rows[0]["lr"] == pytest.approx(1.0e-3)

    with pytest.raises(InterruptedError):
        watched("cut", NAN, stop_at=20)
    assert happened(tmp_path, "cut")[0].kind == "divergence"
    with (tmp_path / "cut" / FILE).open("a") as file:
        file.write('{"update": 2')  # what a kill in the middle of a write leaves
    assert_same(watched("cut", NAN), whole)
    assert happened(tmp_path, "cut") == happened(tmp_path, "whole")


def test_a_kill_before_the_first_checkpoint_after_a_rollback_changes_nothing(watched: Watched, tmp_path: Path) -> None:
    whole = watched("whole", NAN)
    with pytest.raises(InterruptedError):
        watched("cut", NAN, stop_at=30, seconds=1000.0)
    assert not list((tmp_path / "cut" / "checkpoints").glob("update-*"))
    assert [path.name for path in sorted((tmp_path / "cut" / "good").iterdir())][-1] > "update-000000000"
    assert_same(watched("cut", NAN), whole)
    assert happened(tmp_path, "cut") == happened(tmp_path, "whole")


def test_good_checkpoints_that_are_damaged_are_not_gone_back_to(watched: Watched, tmp_path: Path) -> None:
    calm = deep_merge(NAN, {"phases": [{"until_epoch": 5, "lr": 1.0e-3}]})
    with pytest.raises(InterruptedError):
        watched("bad", calm, stop_at=20)
    for path in (tmp_path / "bad" / "good").glob("*/generator.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(NotFiniteError):
        watched("bad", NAN)
    assert happened(tmp_path, "bad")[-1].action == "found no whole checkpoint to go back to"


@pytest.mark.parametrize(
    ("policy", "actions"),
    [("act", ["back to update 0, learning rates times 0.9"] * 2 + ["given up after 2 rollbacks"]), ("warn", [None])],
)
def test_a_training_that_diverges_again_and_again_fails_as_it_would_have(
    watched: Watched, tmp_path: Path, policy: str, actions: list[str | None]
) -> None:
    with pytest.raises(NotFiniteError):
        watched("stubborn", deep_merge(NAN, {"monitor": {"policy": policy, "act": {"lr": 0.9}}}))
    assert [event.action for event in happened(tmp_path, "stubborn")] == actions


# No probe is better than one before by its whole distance, so it always stands still; and D always wins.
STUCK = {
    "monitor": {
        "policy": "act",
        "stagnation": {"probes": 1, "improvement": 1.0, "d_accuracy": 0.0},
        "divergence": {"spread": 0.0},
        "act": {"trial_epochs": 0.6, "candidates": 2},
    }
}


def test_a_stall_puts_back_the_earlier_discriminator_that_does_best(watched: Watched, tmp_path: Path) -> None:
    whole = watched("whole", STUCK)
    (event,) = (event for event in happened(tmp_path, "whole") if event.kind == "stagnation")
    assert event.action is not None
    trials = event.action.split("trial: ")[1].rstrip(")").split(", ")
    tried = {int(trial.split()[-1]): float(trial.split()[0]) for trial in trials}
    assert max(tried) < event.update, "that of now is none of the earlier ones"
    assert f"D put back to update {min(tried, key=tried.__getitem__)} " in event.action
    assert whole.rows[-1]["lr"] == whole.rows[0]["lr"] / 2
    assert len(list((tmp_path / "whole" / "discriminators").glob("probe-*"))) <= 6, "bounded"

    with pytest.raises(InterruptedError):
        watched("cut", STUCK, stop_at=30)
    assert_same(watched("cut", STUCK), whole)
    for line in (tmp_path / "cut" / FILE).read_text().splitlines():
        assert set(json.loads(line)) == {"update", "images", "kind", "text", "evidence", "action"}


def test_the_discriminator_of_a_probe_is_kept_before_another_is_put_in_its_place(
    watched: Watched, tmp_path: Path
) -> None:
    whole = watched("whole", STUCK)
    at = of_kind(tmp_path, "whole", "stagnation").update
    assert at in whole.extra["monitor"]["discriminators"]
    until = {"monitor": {"policy": "warn"}, "phases": [{"until_epoch": at * 8 / 60}]}  # which is when the stall is seen
    trained = watched("warned", deep_merge(STUCK, until))
    assert trained.update == at
    kept_then = load_file(tmp_path / "whole" / "discriminators" / f"probe-{at:09d}.safetensors")
    assert all(torch.equal(tensor, kept_then[name]) for name, tensor in trained.discriminator.state_dict().items())


def test_a_trial_leaves_no_trace_but_its_choice(watched: Watched, tmp_path: Path) -> None:
    one = deep_merge(STUCK, {"monitor": {"act": {"candidates": 1}}})  # so that the choice is known before
    short = watched("short", deep_merge(one, {"monitor": {"act": {"trial_epochs": 0.2}}}))
    long = watched("long", deep_merge(one, {"monitor": {"act": {"trial_epochs": 0.8}}}))
    assert same_weights(short, long)
    assert short.rows == long.rows
    assert of_kind(tmp_path, "short", "stagnation").action != of_kind(tmp_path, "long", "stagnation").action


def test_a_phase_that_waits_for_a_stall_reloads_whatever_the_policy(watched: Watched, tmp_path: Path) -> None:
    phases = [{"until_epoch": 3}, {"until_epoch": 5, "reload_discriminator": "stall"}]
    watched("early", deep_merge(STUCK, {"monitor": {"policy": "warn"}}))
    assert of_kind(tmp_path, "early", "stagnation").action is None
    watched("waits", deep_merge(STUCK, {"monitor": {"policy": "warn", "settle_epochs": 2.0}, "phases": phases}))
    assert "D put back" in (of_kind(tmp_path, "waits", "stagnation").action or "")


AUTO = {"schedule": "auto", "monitor": {"stagnation": {"probes": 1, "improvement": 1.0}}}


def test_an_auto_schedule_goes_through_three_phases_and_delivers_its_best_probe(
    watched: Watched, tmp_path: Path
) -> None:
    bound = {"phases": [{"until_epoch": 20}]}
    whole = watched("whole", AUTO | bound)
    events = [event for event in happened(tmp_path, "whole") if event.kind in ("phase", "stop")]
    assert [event.kind for event in events] == ["phase", "phase", "stop"]
    assert "D put back to update" in (events[1].action or "")
    assert whole.update < 150, "stopped before its upper bound"
    first = whole.rows[0]["lr"]
    assert sorted({round(row["lr"] / first, 6) for row in whole.rows}) == [0.3, 0.8, 1.0]
    probes = whole.extra["monitor"]["probes"]
    assert whole.extra["monitor"]["best"] == min(probes, key=lambda probe: probe["kid"])["update"]
    assert whole.best is not None
    assert all(torch.equal(tensor, whole.best.state_dict()[name]) for name, tensor in whole.ema.state_dict().items())

    with pytest.raises(InterruptedError):
        watched("cut", AUTO | bound, stop_at=30)
    assert_same(watched("cut", AUTO | bound), whole)
    assert_same(watched("cut", AUTO | bound), whole)  # and once more, of a finished one


def test_an_auto_schedule_ends_at_its_upper_bound_with_its_best(watched: Watched, tmp_path: Path) -> None:
    state = watched("bound", deep_merge(AUTO, {"monitor": {"stagnation": {"probes": 9}}}))
    assert state.update == LAST
    assert "upper bound" in of_kind(tmp_path, "bound", "stop").text
    delivered = load_file(kept(tmp_path / "bound", LAST))
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
def test_what_needs_a_watch_is_checked(change: Callable[..., Params], overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        change(*overrides)


def test_every_profile_watches() -> None:
    for profile in ("params.yaml", "profiles/study.yaml", "profiles/imagenet256.yaml", "profiles/smoke.yaml"):
        params = load_params(Path(__file__).parents[1] / profile)
        assert params.train.monitor.policy == "warn"


def test_figures_of_a_probe_are_over_those_of_the_data(discs: Path, discs_params: Params) -> None:
    latents, raw = Latents.open(discs / "data" / "latents.h5"), discs_params.runs["t4"].model_dump(mode="json")
    run = Run.model_validate(deep_merge(raw, {"monitor": {"probe": {"updates": 150}}}))
    generator = stream_generator(run.seed, "probe")
    chosen = torch.randperm(latents.num_images, generator=generator)[: run.monitor.probe.samples]
    data = latents.draw(chosen, generator)

    class Copies:
        """A generator of the very latents that the probe compares with, or of others in their place."""

        def __init__(self, samples: torch.Tensor) -> None:
            self.samples = list(samples.split(run.batch_size))

        def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.samples.pop(0)

    probe = Probe(latents, run, CPU)
    same = probe(cast(Flow, Copies(data)))
    assert [same[name] for name in ("class_accuracy", "variance", "spread")] == pytest.approx([1, 1, 1])
    other = probe(cast(Flow, Copies(data.roll(1, 0))))
    assert other["class_accuracy"] < 1 and other["spread"] == pytest.approx(1)
    one = probe(cast(Flow, Copies(data[:1].expand_as(data))))
    assert one["variance"] < 1e-6 and one["spread"] < 1e-6
