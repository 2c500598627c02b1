"""Profiles: that the paper's says what the paper says, and what activating one leaves as it was."""

import json
import re
from pathlib import Path

import pytest
import yaml

from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.params.profiles import activate, list_profiles
from afm_pipe.runtime.errors import UserError
from tests.conftest import ROOT, SMOKE

PUBLISHED = yaml.safe_load((ROOT / "afm_pipe" / "reporting" / "published.yaml").read_text())


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "profiles" / "imagenet256.yaml")


def test_the_profile_is_the_papers_schedule(params: Params) -> None:
    names = {"b2": "B/2", "m2": "M/2", "l2": "L/2", "xl2": "XL/2"}
    rows = PUBLISHED["schedule"]
    assert len(params.runs) == len(params.guided) == len(rows) == 8
    for (name, run), row in zip(params.runs.items(), rows, strict=True):
        assert (names[run.size], run.nfe) == (row["model"], row["nfe"])
        assert {"xl2-56l": 56, "xl2-112l": 112}.get(name, row["depth"]) == row["depth"]
        ends = [phase.until_epoch for phase in params.models[f"{name}-guided"].phases]
        assert ends == [until for until, _ in row["phases"]], name


# Of phases 1 to 4: G's and D's learning rate (paper Table 11).
RATES = {
    "b2": ((1e-4, 8e-5, 3e-5, 5e-5), (1e-4, 8e-5, 3e-5, 5e-5)),
    "m2": ((1e-4, 8e-5, 3e-5, 5e-5), (1e-4, 8e-5, 3e-5, 5e-5)),
    "l2": ((1e-4, 8e-5, 3e-5, 5e-5), (1e-4, 8e-5, 3e-5, 5e-5)),
    "xl2": ((1e-4, 8e-5, 3e-5, 5e-5), (1e-4, 8e-5, 3e-5, 5e-5)),
    "xl2-2nfe": ((1e-4, 8e-5, 3e-5, 3e-5), (1e-4, 8e-5, 3e-5, 3e-5)),
    "xl2-4nfe": ((1e-4, 8e-5, 3e-5, 3e-5), (1e-4, 8e-5, 3e-5, 3e-5)),
    "xl2-56l": ((5e-5, 4e-5, 1.5e-5, 1e-5), (1e-4, 8e-5, 3e-5, 2e-5)),
    "xl2-112l": ((2.5e-5, 2e-5, 2.5e-6, 5e-6), (1e-4, 8e-5, 1e-5, 2e-5)),
}


@pytest.mark.parametrize("name", RATES)
def test_the_profile_has_the_papers_rates_weights_and_reloads(params: Params, name: str) -> None:
    run = params.models[f"{name}-guided"]
    rates = [phase.lr or run.lr for phase in run.phases]
    assert tuple(rates) == RATES[name][0]
    d_rates = [phase.lr_discriminator or rate for phase, rate in zip(run.phases, rates, strict=True)]
    assert tuple(d_rates) == RATES[name][1]
    start = 0.25 if "nfe" in name else 0.2
    assert (run.transport.start, run.transport.end) == (start, 0.01 if name == "b2" else 0.005)
    assert [phase.transport and phase.transport.end for phase in run.phases] == [None, 0.001, 0.001, 0.001]
    assert [phase.reload_ema for phase in run.phases] == ["never", "epoch", "epoch", "epoch"]
    assert [phase.reload_discriminator is not None for phase in run.phases] == [False, False, True, False]
    several = "nfe" in name or run.repeats > 1
    assert {phase.gradient_clip for phase in run.phases} == {5.0 if several else 50.0}
    guidance = run.phases[-1].guidance
    assert guidance is not None
    assert guidance.scale == (0.02 if "nfe" in name else 0.003)
    assert guidance.at == {"xl2-2nfe": (0.0,), "xl2-4nfe": (0.0, 0.25)}.get(name)
    assert run.form == ("residual" if "nfe" in name else "direct")


def test_the_manuals_run_from_sits_weights_is_the_second_papers() -> None:
    (block,) = re.findall(r"```yaml\n(imported:\n.*?)```", (ROOT / "docs" / "method.md").read_text(), re.DOTALL)
    added = [f"{section}={json.dumps(value)}" for section, value in yaml.safe_load(block).items()]
    run = load_params(ROOT / "profiles" / "imagenet256.yaml", added).model("sit-xl2-continuous")
    assert (run.size, run.batch_size, run.lr, run.betas, run.ema.decay) == ("xl2", 256, 1e-5, (0.0, 0.95), 0.99)
    assert (run.discriminator_updates, run.logit_centering, run.transport.start) == (16, 0.001, 0.0)
    assert run.flow is not None and (run.flow.warmup, run.flow.label_dropout) == (10_000, 0.1)
    assert [phase.until_epoch for phase in run.phases] == [10]


# Making a profile active


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "profiles"
    folder.mkdir()
    for name in ("smoke", "imagenet256"):
        (folder / f"{name}.yaml").write_text((ROOT / "profiles" / f"{name}.yaml").read_text())
    return folder, tmp_path / "params.yaml"


def test_a_profile_becomes_params_and_the_old_ones_are_all_kept(project: tuple[Path, Path]) -> None:
    folder, active = project
    active.write_text("first")
    assert activate("smoke", folder, active).backup == active.with_name("params.before-smoke.yaml")
    assert active.read_text().splitlines()[0] == "# yaml-language-server: $schema=params.schema.json"
    assert load_params(active) == load_params(SMOKE)
    active.write_text("second")
    assert activate("smoke", folder, active).backup == active.with_name("params.before-smoke.2.yaml")
    kept = {path.name: path.read_text() for path in active.parent.glob("params.before-*")}
    assert kept == {"params.before-smoke.yaml": "first", "params.before-smoke.2.yaml": "second"}
    assert activate("smoke", folder, active) == (False, None)
    assert len(list(active.parent.glob("params.before-*"))) == 2


@pytest.mark.parametrize("name", ["imagenet", "../params", "smoke.yaml", ""])
def test_an_unknown_profile_is_refused_with_those_there(project: tuple[Path, Path], name: str) -> None:
    folder, active = project
    active.write_text("mine")
    with pytest.raises(UserError, match="expected one of imagenet256, smoke"):
        activate(name, folder, active)
    assert active.read_text() == "mine"


def test_a_profile_with_a_mistake_is_refused(project: tuple[Path, Path]) -> None:
    folder, active = project
    (folder / "broken.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="broken.yaml"):
        activate("broken", folder, active)
    assert not active.exists()


def test_profiles_are_listed_with_their_first_words() -> None:
    words = {profile.name: profile.description for profile in list_profiles(ROOT / "profiles")}
    assert words["imagenet256"].startswith("The paper's whole study on ImageNet 256x256")
    assert words["smoke"].startswith("The whole pipeline in about three minutes")
