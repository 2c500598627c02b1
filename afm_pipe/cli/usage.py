"""How the command line meets a mistake in its use, and what the shell's completion offers."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperGroup

from afm_pipe.runtime import paths


class CommandGroup(TyperGroup):
    """The commands of `afm-pipe`. A mistake in their use is one line, as every other mistake of a user is."""

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run a command; exit with 2 if the command line is wrong."""
        try:
            code = super().main(*args, **settings | {"standalone_mode": False})
        except typer.Abort:
            sys.exit(1)
        except Exception as error:
            if not hasattr(error, "format_message"):  # not about the command line
                raise
            if not error.format_message() or type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
            else:
                print(f"error: {describe_usage(error)}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


def describe_usage(error: Any) -> str:
    """Return what was found on the command line, what was expected, and what to do."""
    context = error.ctx
    command = context.command_path if context else "afm-pipe"
    name, said = type(error).__name__, error.format_message()
    parameter = getattr(error, "param", None)
    hint = _hint(parameter) if parameter else ""
    remedy = f"see `{command} --help`."
    option = getattr(error, "option_name", "")
    if name == "MissingParameter":
        return f"Found no {hint}, which `{command}` needs: {remedy}"
    if name == "BadParameter" and hint:
        expected = error.message.rstrip(".").replace("Input should be", "expected").partition(", unable to parse")[0]
        return f"Found a wrong {hint}: {expected}: {remedy}"
    if name == "NoSuchOption":
        known = [opt for each in context.command.params for opt in each.opts] if context else []
        return f"Found the option {option}, which `{command}` does not have{_near(option, known) or ': '}{remedy}"
    if name == "BadOptionUsage":
        problem = "with a value, which it does not take" if "not take" in said else "without a value"
        return f"Found {option} {problem}: {remedy}"
    if said.startswith("No such command"):
        found = said.split("'")[1]
        return f"Found no command {found!r}{_near(found, context.command.commands) or ': '}{remedy}"
    if said.startswith("Got unexpected extra argument"):
        extra = said.partition("(")[2] if "(s) (" not in said else said.partition("(s) (")[2]
        return f"Found {extra.rstrip(').')!r}, which `{command}` does not take: {remedy}"
    return f"Found a command line that `{command}` cannot read ({said.rstrip('.')}): {remedy}"


def _hint(parameter: Any) -> str:
    """Return an option as it is typed, or the name that --help shows for an argument."""
    option = next((opt for opt in parameter.opts if opt.startswith("--")), None)
    return option or (parameter.metavar or parameter.name.upper()).strip("[].")


def _near(found: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(found, known, n=1)
    return f", did you mean {near[0]}? Otherwise " if near else ""


def _section_names(*sections: str) -> list[str]:
    """Return the names in sections of params.yaml, none if it cannot be read: a completion never prints."""
    from afm_pipe.params.yaml import YAMLError, load_yaml

    try:
        raw = load_yaml(paths.PARAMS.read_text(encoding="utf-8"))
        return [str(name) for section in sections for name in raw.get(section) or {}]
    except (OSError, ValueError, YAMLError, AttributeError, TypeError):
        return []


def complete_runs(incomplete: str) -> list[str]:
    """Complete a run or guided run in params.yaml."""
    return [name for name in _section_names("runs", "guided") if name.startswith(incomplete)]


def complete_models(incomplete: str) -> list[str]:
    """Complete a model: a run, a guided run or an imported model."""
    return [name for name in _section_names("runs", "guided", "imported") if name.startswith(incomplete)]


def complete_tables(incomplete: str) -> list[str]:
    """Complete a table in params.yaml."""
    return [name for name in _section_names("tables") if name.startswith(incomplete)]


def complete_profiles(incomplete: str) -> list[tuple[str, str]]:
    """Complete a profile, with its description."""
    from afm_pipe.params.profiles import list_profiles

    return [(each.name, each.description) for each in list_profiles() if each.name.startswith(incomplete)]


def complete_sizes(incomplete: str) -> list[str]:
    """Complete a model size."""
    from afm_pipe.params.sizes import SIZES

    return [size for size in SIZES if size.startswith(incomplete)]


def complete_formats(incomplete: str) -> list[str]:
    """Complete a format of `afm-pipe export`."""
    return [kind for kind in ("released", "safetensors", "diffusers", "adm-npz") if kind.startswith(incomplete)]
