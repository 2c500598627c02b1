"""params.yaml: what is inherited, what is refused, and in which words."""

import copy
import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from afm_pipe.params import Run
from afm_pipe.params.base import NULLABLE, deep_merge
from afm_pipe.params.file import json_schema, load_params, validate
from afm_pipe.runtime.errors import UserError
from tests.conftest import ROOT, SMOKE

MEASURED = (
    "{kind: kl, latent_channels: 4, downsample: 4, scaling_factor: measured, train: null, pretrained: x, "
    f"sha256: '{'0' * 64}'}}"
)
PROFILES = [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml"))]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_committed_profile_is_valid(path: Path) -> None:
    assert load_params(path).runs


def test_a_run_is_the_train_section_with_its_own_fields_over_it() -> None:
    params = load_params(SMOKE, ["train.lr=0.5", "runs.t4-no-transport.penalty.weight=9"])
    run = params.runs["t4-no-transport"]
    assert run.lr == 0.5
    assert run.penalty.weight == 9
    assert run.penalty.batch_fraction == params.train.penalty.batch_fraction
    assert run.transport.start == 0


def test_a_run_takes_the_files_seed_unless_it_has_its_own() -> None:
    params = load_params(SMOKE, ["seed=5", "runs.t4.seed=7"])
    assert (params.runs["t4"].seed, params.runs["t4-no-transport"].seed) == (7, 5)


def test_transport_may_be_a_number() -> None:
    transport = load_params(SMOKE, ["runs.t4.transport=0.3"]).runs["t4"].transport
    assert (transport.start, transport.end) == (0.3, 0.3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batchsize=4", "train.batchsize: found an unknown field, did you mean batch_size?"),
        ("runs.t4.penalty.wieght=1", "runs.t4.penalty.wieght: found an unknown field, did you mean weight?"),
        ("nonsense.x=1", "nonsense: found an unknown field, expected one of seed, data"),
        (
            "train.lr='1e-3'",
            "train.lr: found '1e-3', expected a valid number; this is text: write 0.001 without quotes",
        ),
        ("train.batch_size=many", "train.batch_size: found 'many', expected a valid integer"),
        ("train.batch_size=true", "train.batch_size: found true, expected a valid integer"),
        (
            "runs.t4.size=x9",
            "runs.t4.size: found 'x9', expected 't4', 's4', 't2', 'b2', 'm2', 'l2', 'xl2', 't1', 'b1' or 'xl1'",
        ),
        ("runs.t4.phases=[{until_epoch: 3}, {until_epoch: 2}]", "expected until_epoch to rise from phase to phase"),
        ("autoencoder.downsample=8", "expected downsample 4 for 3 block_out_channels, found 8"),
        ("autoencoder.pretrained=x", "expected `sha256` beside `pretrained`"),
        (f"autoencoder={MEASURED}", "expected a number as `scaling_factor` beside `pretrained`"),
        ("autoencoder.scaling_factor=big", "autoencoder.scaling_factor: found 'big'"),
        ("data.image_size=30", "data.image_size: expected a multiple of autoencoder.downsample 4, found 30"),
        ("data.image_size=36", "expected a patch that divides the latent side 9, found t4 with patch 4"),
        ("runs.autoencoder={}", "expected another name than autoencoder"),
        ("runs={../x: {}}", "runs.../x: found the name '../x', expected text that should match pattern"),
        ("train.penalty.batch_fraction=0.001", "expected penalty.batch_fraction to leave at least one of 64 images"),
        ("data=3", "data: found 3, expected a section of fields"),
        ("autoencoder.sha256=abc", "autoencoder.sha256: found 'abc', expected text that should match pattern"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_expectation(override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_params(SMOKE, [override])
    assert words in str(error.value)


def test_a_mistake_in_train_is_told_once_not_once_per_run() -> None:
    with pytest.raises(UserError, match="Found 1 mistake"):
        load_params(SMOKE, ["train.lr=-1"])


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    raw = yaml.safe_load(SMOKE.read_text())
    del raw["evaluate"]["samples"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"evaluate\.samples: found nothing, expected a value"):
        load_params(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x", "alias"),
        ("seed: 1\nseed: 2", "found seed twice, again in line 2"),
        ("a: [1", "not plain YAML"),
        ("- 1", "holding list"),
        ("a: !!python/object/apply:os.system [true]", "not plain YAML"),
        ("#" + "x" * (1 << 20), "expected at most"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("override", ["train.lr", "train.phases.7.lr=1", "seed.x=1", "=3"])
def test_an_override_that_leads_nowhere_is_refused(override: str) -> None:
    with pytest.raises(UserError, match="override"):
        load_params(SMOKE, [override])


def test_the_committed_schema_is_the_codes() -> None:
    assert (ROOT / "params.schema.json").read_text() == json_schema(), "run `afm-pipe schema > params.schema.json`"


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_names_the_schema_in_its_first_line(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == ROOT / "params.schema.json"


def test_the_schema_lets_a_run_leave_out_what_it_inherits() -> None:
    definitions = json.loads(json_schema())["$defs"]
    assert "required" not in definitions["RunOverrides"]
    assert "lr" in definitions["Run"]["required"]


@pytest.mark.parametrize(
    "text",
    ["runs: {t4: }", "runs: {t4: {penalty: , ema: {}, monitor: {probe: }}}", "runs: {t4: ~}"],
)
def test_an_empty_section_overrides_nothing(text: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(SMOKE.read_text())
    raw["runs"]["t4"] = {}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(deep_merge({}, raw) | yaml.safe_load(text)))
    params = load_params(tmp_path / "params.yaml")
    assert params.runs["t4"] == params.train


def test_an_empty_setting_of_a_table_overrides_nothing(tmp_path: Path) -> None:
    raw = yaml.safe_load(SMOKE.read_text())
    table = raw["tables"]["transport"]
    table["base"], table["rows"]["settings"]["0.2"] = None, None
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    assert load_params(tmp_path / "params.yaml").trials == load_params(SMOKE).trials


def test_null_turns_off_what_may_be_null(tmp_path: Path) -> None:
    chosen = ["train.selection={every_epochs: 1.0, samples: 1000}", "runs.t4.selection=null"]
    params = load_params(SMOKE, chosen)
    assert params.runs["t4"].selection is None and params.runs["t4-no-transport"].selection is not None
    nullable = {name for name, field in Run.model_fields.items() if type(None) in get_args(field.annotation)}
    assert nullable == NULLABLE


WRONG: list[Any] = [
    None,
    True,
    3,
    -1.5,
    "x",
    "1e-3",
    [],
    [None],
    {},
    {"a": 1},
    {7: 1},
    datetime.date(2001, 1, 1),
    1 << 9000,
]
PYTHON = re.compile(
    r"instance of|Input should|dict|tuple|boolean|\bNone\b|\bTrue\b|datetime|\bobject\b|pydantic|String|"
    r"\b(Run|Phase|Data|Params|Axis|Group|Check|Encode|Sample|Ema|Guided|Imported|Evaluate|StudyTable)\b"
)


def places(raw: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a params file; of a list, of its first entry."""
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw[:1]):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def test_no_message_names_a_class_of_python_or_pydantic() -> None:
    whole = yaml.safe_load(SMOKE.read_text())
    whole["guided"] = {"g": {"from": "t4", "until_epoch": 1.0, "guidance": {"scale": 0.1, "t": [0.0, 1.0]}}}
    whole["imported"] = {"i": {"file": "x.pth"}}
    seen = set()
    for index, path in enumerate(places(whole)):
        for value in [WRONG[index % len(WRONG)], WRONG[(5 * index + 2) % len(WRONG)]]:
            raw = copy.deepcopy(whole)
            here = raw
            for part in path[:-1]:
                here = here[part]
            here[path[-1]] = value
            try:
                validate(raw, Path("params.yaml"))
            except UserError as error:
                seen.add(str(error))
    assert len(seen) > 200
    assert [said for said in seen if PYTHON.search(said)] == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("runs", "", "runs: found an empty section, expected a list or section of at least 1"),
        ("runs", " {}", "runs: found an empty section, expected a list or section of at least 1"),
        ("evaluate", "", "evaluate.samples: found nothing, expected a value"),
        ("autoencoder", "", "autoencoder.kind: found nothing, expected a value"),
        ("guided", "", "guided: expected {} where there are none, since DVC goes through this section; found nothing"),
        ("tables", "", "tables: expected {} where there are none"),
        ("seed", "", "seed: found null, expected a valid integer"),
    ],
)
def test_an_empty_part_of_the_file_is_named_in_its_own_words(name: str, text: str, words: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(SMOKE.read_text())
    del raw[name]
    (tmp_path / "params.yaml").write_text(f"{yaml.safe_dump(raw)}{name}:{text}\n")
    with pytest.raises(UserError) as error:
        load_params(tmp_path / "params.yaml")
    assert words in str(error.value)
    assert "instance" not in str(error.value) and "dictionary" not in str(error.value)
