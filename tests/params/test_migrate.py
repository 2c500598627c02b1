"""Params files of version 0.1: refused with the new names, and rewritten by `afm-pipe migrate`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.params.file import load_params
from afm_pipe.params.migrate import migrate
from afm_pipe.runtime.errors import UserError
from tests.conftest import SMOKE

OLD = sorted((Path(__file__).parent / "v0_1").glob("*.yaml"))
MIGRATED = Path(__file__).parent / "v0_1" / "migrated"  # the same four files, rewritten by hand as the package grew
PROSE = ("title", "question", "claim")
SINCE = (
    *("monitor", "gradient_clip", "keep_discriminators", "selection", "reload_discriminator", "strong_discriminator"),
    "class_shares",
)
"""What the files rewritten by hand set otherwise."""


@pytest.fixture(params=OLD, ids=lambda path: path.stem)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copy(request.param, tmp_path))


def settings(value: Any) -> Any:
    """Drop the sentences that only the report shows, and what has been set otherwise since."""
    if isinstance(value, dict):
        return {key: settings(inner) for key, inner in value.items() if key not in PROSE + SINCE}
    return [settings(inner) for inner in value] if isinstance(value, list | tuple) else value


def comments(text: str) -> list[str]:
    return [line.partition("#")[2] for line in text.splitlines() if "#" in line]


def test_a_committed_file_of_0_1_migrated_has_the_same_settings(old: Path) -> None:
    before, today = old.read_text(), MIGRATED / old.name
    done = CliRunner().invoke(app, ["migrate", str(old)])
    assert done.exit_code == 0, done.output
    found, now = (settings(load_params(path).model_dump()) for path in (old, today))
    new = {"objectives", "sampling_steps"}
    assert found["tables"].keys() == now["tables"].keys() - new  # their labels are the report's words
    now["runs"].pop("t4-best", None)  # a new run
    found.pop("held_out"), now.pop("held_out")  # null: 0.1 held nothing out
    assert {**found, "tables": None} == {**now, "tables": None}
    assert load_params(old).train.monitor.auto.transport == 0.001
    assert comments(old.read_text()) == comments(before)
    kept = old.with_name(f"{old.stem}.before-migrate.yaml")
    assert kept.read_text() == before and str(kept) in done.output.replace("\n", "")
    assert migrate(old) == ([], None)


def test_a_file_of_0_1_is_refused_with_the_new_names(old: Path) -> None:
    with pytest.raises(UserError) as error:
        load_params(old)
    said = str(error.value)
    assert f"run `afm-pipe migrate {old}`" in said
    assert "train.watch: now called monitor" in said
    assert "train.watch.collapse.right_class: now called class_accuracy" in said
    assert "toy.penalty.share: now called batch_fraction" in said
    assert "train.objective: found nothing, expected adversarial_flow" in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.centring=0.1", "train.centring: now called logit_centering"),
        ("runs.t4.penalty={share: 0.5}", "runs.t4.penalty.share: now called batch_fraction"),
        ("train.monitor.identity.move=0.1", "train.monitor.identity.move: now called transport_rms"),
    ],
)
def test_an_old_name_in_an_override_is_refused_with_the_new_one(override: str, words: str) -> None:
    with pytest.raises(UserError, match="use the new name") as error:
        load_params(SMOKE, [override])
    assert words in str(error.value)


def test_names_that_a_user_chose_are_no_old_keys() -> None:
    assert "watch" in load_params(SMOKE, ["runs.watch={}"]).runs


def test_a_file_in_flow_style_with_quoted_keys_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = yaml.safe_dump(yaml.safe_load(OLD[0].read_text()), default_flow_style=True, width=10**9)
    path.write_text(text.replace("centring:", "'centring':"))
    migrate(path)
    assert "objective: adversarial_flow, " in path.read_text()
    assert load_params(path).train.logit_centering == 0.01


def test_keys_are_added_to_an_empty_section(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("train: {}\n")
    with pytest.raises(UserError, match="train.size: found nothing") as error:
        migrate(path)
    assert "train.objective" not in str(error.value)


def test_a_file_that_stays_wrong_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = OLD[0].read_text().replace("qk_norm:", "qk_nrom:", 1)
    path.write_text(text)
    with pytest.raises(UserError, match="did you mean qk_norm"):
        migrate(path)
    assert path.read_text() == text and [*tmp_path.iterdir()] == [path]
