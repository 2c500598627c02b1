"""YAML as DVC reads and writes it: the same library, hence version 1.2, in which 2e-05 is a number and yes is text."""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode

MAX_DEPTH = 32


class PlainComposer(Composer):
    """Composes YAML without aliases, which can make a small file large; without duplicate keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.parser.peek_event().start_mark.line + 1
        if self.depth > MAX_DEPTH:
            raise YAMLError(f"found more than {MAX_DEPTH} nested levels in line {line}")
        if self.parser.check_event(AliasEvent):
            raise YAMLError(f"found an alias in line {line}, expected plain values")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, MappingNode):
            _check_keys(node)
        return node


def load_yaml(text: str) -> Any:
    """Parse one document. Raises YAMLError, in one line, if it is not plain YAML."""
    return _parsed(_yaml().load, text)


def compose_yaml(text: str) -> Any:
    """Parse one document into nodes that know their place in the text. Raises YAMLError as `load_yaml` does."""
    return _parsed(_yaml().compose, text)


def dump_yaml(value: Any) -> str:
    """Write a value as YAML that `load_yaml` and DVC read as the same value; lists in one line."""
    stream = io.StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue()


def _yaml() -> YAML:
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Composer = PlainComposer
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = None, False, 100
    return yaml


def _parsed(parser: Any, text: str) -> Any:
    try:
        return parser(text)
    except MarkedYAMLError as error:
        raise YAMLError(f"{error.problem} in line {error.problem_mark.line + 1}") from None
    except YAMLError as error:
        raise YAMLError(" ".join(str(error).split())) from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise YAMLError(str(error)) from None  # of Python: a date of month 13, a number of 5,000 digits


def _check_keys(node: MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise YAMLError(f"found a key that is not a scalar in line {line}")
        if key.value in seen:
            raise YAMLError(f"found {key.value} twice, again in line {line}")
        seen.add(key.value)
