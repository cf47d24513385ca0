"""The dialect of YAML that configurations are written in: reading with exact errors, and writing.

It is YAML 1.2's core rules, without tags, for values that a JSON file could hold:
- `true` and `false` are the only booleans: `yes`, `no`, `on`, `off` are text;
- `1e-6`, `5e-4`, `1.`, `.5`, `.inf`, `.nan` are floats, `010` is ten, a date is text;
- keys are text and may not repeat. Anchors, aliases and `<<` work and make independent copies.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Optional

import yaml

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_MAX_VALUES = 1_000_000
_STR_TAG, _MERGE_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line per problem."""

    def __init__(self, problems: list[str]):
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}  # none of PyYAML's own

    def compose_node(self, parent: Optional[yaml.Node], index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"tag '{event.tag}' is not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Optional[str]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in (_STR_TAG, _MERGE_TAG):
                raise yaml.MarkedYAMLError(problem="a key must be text: quote it", problem_mark=key.start_mark)
            if key.value in first_lines:
                problem = f"duplicate key '{key.value}' (first on line {first_lines[key.value]})"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first_lines[key.value] = key.start_mark.line + 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_VALUES:  # merged from mappings that were merged ...
            problem = f"merging gives more than {_MAX_VALUES} keys"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _kind, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("^<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


class _Dumper(yaml.SafeDumper):
    """Keeps PyYAML's own rules and adds ours, so that text which either would read as a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: list) -> yaml.SequenceNode:
        on_one_line = not any(isinstance(item, (dict, list)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=on_one_line)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: the text breaks the rules above; the message starts with `source`, line and column.
    """
    try:
        return _detached(yaml.load(text, _Loader), (), itertools.count(1))
    except RecursionError:
        raise ConfigError([f"{source}: nested too deeply"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError([f"{source}: {place}{error.problem or error.context}"]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{source}: {' '.join(str(error).split())}"]) from error


def dump(value: Any) -> str:
    """YAML that `parse` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def show(value: Any) -> str:
    """A value as it is written in YAML, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _detached(value: Any, parents: tuple[int, ...], count: Iterator[int]) -> Any:
    """`value` with a copy in place of each alias, so that changing one place changes no other.

    Raises:
        ValueError: it contains itself, or aliases of aliases make it grow beyond all measure.
    """
    if next(count) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES} values, most of them copies of aliases")
    if not isinstance(value, (dict, list)):
        return value
    if id(value) in parents:
        raise ValueError("an alias contains itself")
    parents = (*parents, id(value))
    if isinstance(value, dict):
        return {key: _detached(item, parents, count) for key, item in value.items()}
    return [_detached(item, parents, count) for item in value]
