"""params.yaml is read as DVC reads it, and what DVC writes into it is what the run gets."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import parse_yaml

from afm_pipe.params.file import load_params
from afm_pipe.params.yaml import YAMLError, dump_yaml, load_yaml
from afm_pipe.runtime.errors import UserError
from tests.conftest import SMOKE

LISTED = (
    "2e-05 1e3 1E3 1e+5 .5 5. 1_000 1_000.5 017 0o17 0b11 0x1F 08 yes no on off Y n true TRUE False null ~ Null 1:30 "
    "190:20:30 1:30.5 .inf -.INF 2001-01-01 2001-01-01T00:00:00 +1 -0 +.5e3 1e5_0 0o8 - 1-2 '1e3' \"yes\" [0,0.9] {a,b}"
)


@pytest.mark.parametrize("text", LISTED.split())
def test_every_scalar_is_read_as_dvc_reads_it(text: str) -> None:
    document = f"a: {text}\n"
    try:
        expected = parse_yaml(document, "x.yaml")
    except Exception:
        with pytest.raises(YAMLError):
            load_yaml(document)
        return
    assert repr(load_yaml(document)) == repr(expected)


@pytest.mark.parametrize(
    "value", ["1e-3", "yes", "1:30", "null", "", "a: b", "0o17", "2001-01-01", 2e-05, 1e16, None, True]
)
def test_what_is_written_is_read_as_the_same_value(value: Any) -> None:
    text = dump_yaml({"a": value, "b": [value]})
    assert load_yaml(text) == parse_yaml(text, "x.yaml") == {"a": value, "b": [value]}


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("+runs.t4.lr=0.00002", "lr", 2e-05),
        ("+runs.t4.lr=1e-3", "lr", 0.001),
        ("+runs.t4.weight_decay=.5", "weight_decay", 0.5),
        ("+runs.t4.batch_size=1_000", "batch_size", 1000),
        ("+runs.t4.betas=[0,0.9]", "betas", (0, 0.9)),
        ("+runs.t4.qk_norm=true", "qk_norm", True),
        ("+runs.t4.selection=null", "selection", None),
        ("+runs.t4.monitor.policy=off", "monitor.policy", "off"),
        ("+runs.t4.penalty.epsilon=2e-05", "penalty.epsilon", 2e-05),
    ],
)
def test_a_value_that_dvc_writes_is_the_value_of_the_run(override: str, field: str, value: Any, tmp_path: Path) -> None:
    path = Path(shutil.copy(SMOKE, tmp_path / "params.yaml"))
    apply_overrides(path, [override])  # as `dvc exp run -S` does, which rewrites every number of the file
    params = load_params(path)
    run: Any = params.runs["t4"]
    for name in field.split("."):
        run = getattr(run, name)
    assert run == value and type(run) is type(value)
    assert params.train == load_params(SMOKE).train


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.samples=1e4", "evaluate.samples: found 10000.0, expected a valid integer; write 10000"),
        ("seed=0o17", "1 mistake in params.yaml:\n  seed: found '0o17', expected a valid integer"),
        ("+runs.t4.qk_norm=yes", "runs.t4.qk_norm: found 'yes', expected true or false"),
        ("+runs.t4.lr=1e-400", "runs.t4.lr: found 0.0, expected greater than 0"),
        ("data.root=1e5", "data.root: found 100000.0, expected text; write it in quotes"),
    ],
)
def test_a_value_that_dvc_writes_and_that_does_not_fit_is_refused_with_what_to_write(
    override: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(SMOKE, "params.yaml"))
    apply_overrides(path, [override])
    with pytest.raises(UserError) as error:
        load_params(path)
    assert words in str(error.value)


@pytest.mark.parametrize("file", ["~/x.pth", "$HOME/x.pth", "${HOME}/x.pth"])
def test_a_file_that_dvc_cannot_find_is_refused_with_the_reason(file: str) -> None:
    with pytest.raises(UserError, match=r"imported\.x\.file: found .* expected a path that DVC finds, .* write '/"):
        load_params(SMOKE, [f"imported.x={{file: {file!r}}}"])


@pytest.mark.parametrize("section", ["runs", "guided", "imported", "tables"])
@pytest.mark.parametrize("name", ["t4.v2", "t4[0]", "1nfe", "T4", "007", "a b", "-a"])
def test_a_name_that_dvc_cannot_address_is_refused_with_the_reason(section: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    raw = load_yaml(SMOKE.read_text())
    raw[section] = {**raw[section], name: {}}
    path.write_text(dump_yaml(raw))
    with pytest.raises(UserError) as error:
        load_params(path)
    assert f"{section}.{name}: found the name {name!r}, expected text that should match" in str(error.value)
    assert "a name that DVC can address" in str(error.value)


@pytest.mark.parametrize("key", ["7", "1e3", "null", "2001-01-01", "0.5"])
def test_a_name_that_yaml_reads_as_no_text_says_to_quote_it(key: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(SMOKE.read_text().replace('"0.2": {}', f"{key}: {{}}").replace("  t4-no-transport:", f"  {key}:"))
    with pytest.raises(UserError) as error:
        load_params(path)
    assert str(error.value).count("write it in quotes") == 2
