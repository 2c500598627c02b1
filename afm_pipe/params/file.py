"""Read params.yaml: parse, override, validate, and explain mistakes in it."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from afm_pipe.params import AutoencoderParams, Imported, Params
from afm_pipe.params.base import NAME, NAME_RULE
from afm_pipe.params.renames import old_keys
from afm_pipe.params.yaml import MAX_DEPTH, YAMLError, load_yaml
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError, describe_mistake, show_value
from afm_pipe.runtime.files import read_text

MAX_BYTES = 1 << 18  # a params file is written by hand
SHOWN = 20  # mistakes listed in an error


def load_params(path: Path = paths.PARAMS, overrides: Iterable[str] = ()) -> Params:
    """Load a params file and apply `dotted.path=value` overrides.

    Raises UserError naming, for every mistake, the dotted path, the value found and what was expected.
    """
    raw = parse(read(path), path)
    _refuse_old_keys(raw, str(path), f"run `afm-pipe migrate {path}`")
    for override in overrides:
        _override(raw, override)
        _refuse_old_keys(raw, f"the override {override!r}", "use the new name")
    return validate(raw, path)


def read(path: Path) -> str:
    """Read the text of a params file."""
    try:
        return read_text(path, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(
            f"Found no {path} in {Path.cwd()}: run this in the project root, or begin a study here with "
            "`afm-pipe init`."
        ) from None
    except PermissionError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Found {path}, which is not plain YAML: {error}.") from None


def parse(text: str, path: Path) -> dict[str, Any]:
    """Parse the text of a params file. Raises UserError if it is not plain YAML with sections."""
    try:
        raw = load_yaml(text)
    except YAMLError as error:
        raise UserError(f"Found {path}, which is not plain YAML: {error}.") from None
    if not isinstance(raw, dict):
        raise UserError(f"Found {path} holding {type(raw).__name__}, expected sections such as data, train and runs.")
    return raw


def validate(raw: dict[str, Any], path: Path) -> Params:
    """Return the params of a parsed file. Raises UserError listing every mistake."""
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(path, raw, error)) from None


def imported(options: dict[str, Any]) -> Imported:
    """Return the settings of an import from the options of a command. Raises UserError naming the wrong option."""
    try:
        return Imported.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        option = next(part for part in problem["loc"] if part in options)
        raise UserError(f"Found --{option}: {describe_mistake(problem)}.") from None


def json_schema() -> str:
    """Return the JSON schema of params.yaml, for editors. All fields of a run are optional."""
    return json.dumps(schema_of_params(), indent=1, sort_keys=True) + "\n"


def schema_of_params() -> dict[str, Any]:
    """Return the JSON schema of params.yaml, its fields in the order of the file."""
    schema = Params.model_json_schema()
    run = json.loads(json.dumps(schema["$defs"]["Run"]))
    run.pop("required")
    schema["$defs"]["RunOverrides"] = run
    schema["properties"]["runs"]["patternProperties"] = {
        pattern: {"anyOf": [{"$ref": "#/$defs/RunOverrides"}, {"type": "null"}]}
        for pattern in schema["properties"]["runs"]["patternProperties"]
    }
    schema["$defs"]["Run"]["required"].remove("seed")  # the default is the file's seed
    for name in ("Run", "RunOverrides", "Phase"):
        schema["$defs"][name]["properties"]["transport"] = {
            "anyOf": [{"$ref": "#/$defs/Transport"}, {"type": "number", "minimum": 0}]
        }
    kinds = [kind.model_json_schema() for kind in AutoencoderParams.kinds.values()]
    for kind in kinds:
        schema["$defs"] |= kind.pop("$defs", {})
    del schema["$defs"]["AutoencoderParams"]
    schema["properties"]["autoencoder"] = {"anyOf": kinds}
    return schema


def _refuse_old_keys(raw: dict[str, Any], where: str, remedy: str) -> None:
    keys = old_keys(raw)
    if keys:
        lines = "".join(f"\n  {key}" for key in keys[:SHOWN])
        raise UserError(f"Found keys of version 0.1 in {where}: {remedy}.{lines}")


def _override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"Found the override {override!r}, expected PATH=VALUE such as train.batch_size=64.")
    try:
        value = load_yaml(text[: MAX_BYTES + 1])
    except YAMLError:
        raise UserError(f"Found the override {override!r}, whose value is not YAML.") from None
    *parents, last = dotted.split(".")
    if len(parents) > MAX_DEPTH:
        raise UserError(f"Found the override {override[:80]!r} with more than {MAX_DEPTH} levels.")
    here: Any = raw
    for part in parents:
        if isinstance(here, dict):
            here = here.setdefault(part, {})
        else:
            here = here[int(part)] if _is_index(part, here) else None
    if isinstance(here, dict):
        here[last] = value
    elif _is_index(last, here):
        here[int(last)] = value
    else:
        raise UserError(f"Found the override {override!r}, but params has no {dotted}.")


def _is_index(text: str, values: Any) -> bool:
    if not isinstance(values, list):
        return False
    return text.isascii() and text.isdigit() and len(text) < 9 and int(text) < len(values)


def _explain(path: Path, raw: dict[str, Any], error: ValidationError) -> str:
    mistakes: dict[str, list[str]] = {}  # what was found where: what was expected, by each branch of a union
    for problem in error.errors(include_url=False):
        place = list(problem["loc"])
        while problem["type"] != "missing" and not _exists(raw, place):
            place.pop()  # pydantic appends the names of union branches
        field = list(problem["loc"][:3])  # runs, a name, a field
        if field[:1] == ["runs"] and len(field) == 3 and field[2] != "[key]" and not _exists(raw, field):
            continue  # inherited from train, and reported there
        if problem["loc"] == ("train", "seed") and not _exists(raw, ["train", "seed"]):
            continue  # inherited from the file's seed
        found, _, expected = _explain_one(raw, place, problem).partition(", expected ")
        mistakes.setdefault(found, []).append(expected)
    lines = [
        f"{found}{', expected ' * any(expected)}{' or '.join(dict.fromkeys(expected))}"
        for found, expected in mistakes.items()
    ]
    shown = "".join(f"\n  {line}" for line in lines[:SHOWN])
    more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"Found {len(lines)} mistake{'s' * (len(lines) != 1)} in {path}:{shown}{more}"


def _explain_one(raw: Any, place: list[Any], problem: Any) -> str:
    dotted = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        fields = _fields_at(raw, place[:-1])
        near = difflib.get_close_matches(str(place[-1]), fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(fields)}"
        return f"{dotted}: found an unknown field, {hint}"
    if problem.get("ctx", {}).get("pattern") == NAME:
        return f"{dotted}: found the name {show_value(problem['input'])}, {NAME_RULE}"
    return f"{dotted}: {describe_mistake(problem)}" if dotted else describe_mistake(problem)


def _exists(raw: Any, place: list[Any]) -> bool:
    for part in place:
        if isinstance(raw, dict) and part in raw or isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return False
    return True


def _fields_at(raw: Any, place: list[Any]) -> list[str]:
    """Return the field names of the section at a place in the file, or none if it is not a section."""
    section: Any = Params
    for part in place:
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields = {field.alias or name: field for name, field in section.model_fields.items()}
            if part not in fields:
                return []
            annotation = fields[part].annotation
            section = annotation if get_origin(annotation) is dict else _section_in(annotation)
            if section is AutoencoderParams:
                section = section.kinds.get(raw["autoencoder"]["kind"])
        elif get_origin(section) is dict:
            section = get_args(section)[1]
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_section_in, get_args(annotation)) if found), None)
