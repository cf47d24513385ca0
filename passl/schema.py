"""Checks a configuration against the signatures of what it will build, and finds all its errors at once.

A schema is one of
- a dict: a section, each key with its own schema; the key `"*"` stands for any further key;
- a `Registry`: a component, `{name: X, ...arguments of X}`; X's signature is the schema of the arguments;
- a class, a function or a dataclass: a mapping of its arguments;
- `Component(registry or callable, provided=[...])`: as above, with arguments that the engine supplies;
- `[schema]`: a list;
- a type: `int`, `float`, `bool`, `str`, `list`, `dict`, `Optional[int]`, `Literal["a", "b"]`, `Any`, ...

Everything may be left out or null, unless it is wrapped in `Required`. An argument named in `registry.SLOTS`
holds a component (`transform`: or a list of them); one whose type is a dataclass holds a mapping of its arguments.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Callable, Optional, Union

from passl.registry import SLOTS, SUPPLIED, Registry, did_you_mean
from passl.yaml_io import ConfigError, show

MISSING = ("is required", "needs this argument")  # how the problems of missing keys end

Path = tuple  # of dict keys (str) and list indices (int)

_SCALARS = (bool, int, float, str)
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping)
_UNIONS = (Union, getattr(types, "UnionType", Union))


@dataclass(frozen=True)
class Component:
    """A component whose arguments `provided` are supplied by the engine and may not be given."""

    target: Union[Registry, Callable]
    provided: Sequence[str] = ()


@dataclass(frozen=True)
class Required:
    """A section that may be neither absent nor null."""

    schema: Any


def check(config: Mapping[str, Any], schema: Any) -> None:
    """Checks the whole configuration; nothing is built.

    Raises:
        ConfigError: with every problem as `file: dotted.key: message`.
    """
    checker = _Checker(config)
    checker.value(config, Required(schema), ())
    if checker.problems:
        raise ConfigError(checker.problems)


def is_short_form(item: Any) -> bool:
    """Whether a list's item is a component written as `- Name: {arguments}` or `- Name:`."""
    if not isinstance(item, dict) or len(item) != 1:
        return False
    ((key, arguments),) = item.items()
    return key != "name" and (arguments is None or isinstance(arguments, dict))


def component_parts(component: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a checked component, in its long or its short form."""
    if is_short_form(component):
        ((name, arguments),) = component.items()
        return name, dict(arguments or {})
    return component["name"], {key: value for key, value in component.items() if key != "name"}


class _Checker:
    """Walks through a configuration and its schema together, and collects the problems."""

    def __init__(self, config: Mapping[str, Any]):
        self.problems: list[str] = []
        self._source: Callable[[Path], Optional[str]] = getattr(config, "source", lambda path: None)

    def report(self, path: Path, message: str, set_at: Optional[Path] = None) -> None:
        """Adds a problem of the value at `path`, or, if it is missing, of what was set at `set_at`."""
        places = (self._source(set_at or path), ".".join(map(str, path)))
        self.problems.append(": ".join([place for place in places if place] + [message]))

    def value(self, value: Any, schema: Any, path: Path) -> None:
        required = isinstance(schema, Required)
        if required:
            schema = schema.schema
        if value is None:
            if required:
                self.report(path, MISSING[0])
        elif isinstance(schema, dict):
            self.section(value, schema, path)
        elif isinstance(schema, list):
            self.items(value, schema[0], path)
        elif isinstance(schema, Component):
            self.component(value, schema, path)
        elif isinstance(schema, Registry) or not _is_type(schema):
            self.component(value, Component(schema), path)
        else:
            self.typed(value, schema, path)

    def section(self, value: Any, schema: Mapping[str, Any], path: Path) -> None:
        if not isinstance(value, dict):
            self.report(path, f"expected a section with keys, got {show(value)}")
            return
        for key, item in value.items():
            if key in schema or "*" in schema:
                self.value(item, schema.get(key, schema.get("*")), (*path, key))
            else:
                self.report((*path, key), f"no such key. {did_you_mean(key, schema)}")
        for key, item in schema.items():
            if isinstance(item, Required) and key not in value and key != "*":
                self.report((*path, key), MISSING[0])

    def items(self, value: Any, schema: Any, path: Path) -> None:
        if not isinstance(value, list):
            self.report(path, f"expected a list, got {show(value)}")
            return
        if isinstance(schema, Registry):
            schema = Component(schema)
        named = isinstance(schema, Component) and isinstance(schema.target, Registry)
        for index, item in enumerate(value):
            here = (*path, index)
            if named and is_short_form(item):
                ((name, arguments),) = item.items()
                self.named(name, arguments or {}, schema, path=(*here, name), name_path=(*here, name))
            else:
                self.value(item, Required(schema), here)

    def component(self, value: Any, schema: Component, path: Path) -> None:
        kind = schema.target.kind if isinstance(schema.target, Registry) else ""
        if not isinstance(value, dict):
            wanted = f"the {kind} as {{name: ..., arguments}}" if kind else "a mapping of arguments"
            self.report(path, f"expected {wanted}, got {show(value)}")
        elif not kind:
            self.arguments(value, schema.target, schema.provided, path)
        elif isinstance(value.get("name"), str):
            name, arguments = component_parts(value)
            self.named(name, arguments, schema, path, name_path=(*path, "name"))
        else:
            self.report(path, f"the {kind} needs a 'name'. {did_you_mean('', schema.target.names())}")

    def named(self, name: str, arguments: dict, schema: Component, path: Path, name_path: Path) -> None:
        """Checks a component of a registry; `path` leads to its arguments, `name_path` to its name."""
        registry = schema.target
        if name in registry:
            self.arguments(arguments, registry.get(name), schema.provided, path)
        else:
            suggestion = did_you_mean(name, registry.names())
            self.report(name_path, f"unknown {registry.kind} '{name}'. {suggestion}")

    def arguments(self, given: dict, builder: Callable, provided: Sequence[str], path: Path) -> None:
        """Checks the arguments `given` to `builder` by its signature."""
        owner, parameters = _name(builder), _parameters(builder)
        for key, value in given.items():
            here = (*path, key)
            if key in provided:
                self.report(here, f"{owner} gets this argument from the program: remove it")
            elif key not in parameters:
                choices = [name for name in parameters if name not in provided]
                self.report(here, f"{owner} has no such argument. {did_you_mean(key, choices)}")
            elif value is None and parameters[key].default is None:
                continue
            elif key in SLOTS:
                self.slot(value, key, here)
            else:
                self.typed(value, parameters[key].annotation, here)
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and key not in given and key not in provided:
                self.report((*path, key), f"{owner} {MISSING[1]}", set_at=(*path, "name"))

    def slot(self, value: Any, name: str, path: Path) -> None:
        schema = Component(SLOTS[name], SUPPLIED.get(name, ()))
        several = name == "transform" and isinstance(value, list)
        self.value(value, [schema] if several else Required(schema), path)

    def typed(self, value: Any, annotation: Any, path: Path) -> None:
        section = _dataclass(annotation)
        is_plain = any(choice in _SCALARS for choice in typing.get_args(annotation)) and not isinstance(value, dict)
        if section is not None and value is not None and not is_plain:
            self.component(value, Component(section), path)
            return
        if _matches(value, annotation):
            return
        message = f"expected {_describe(annotation)}, got {show(value)}"
        choices = [choice for choice in _literals(annotation) if isinstance(choice, str)]
        if isinstance(value, str) and choices:
            message += f". {did_you_mean(value, choices)}"
        self.report(path, message)


def _name(builder: Callable) -> str:
    return getattr(getattr(builder, "func", builder), "__name__", repr(builder))


@functools.cache
def _parameters(builder: Callable) -> dict[str, inspect.Parameter]:
    """The named parameters of a builder, each with its evaluated annotation.

    One that cannot be evaluated (a name imported for the type checker only) counts as none: anything goes.
    """
    signature = inspect.signature(builder)
    function = inspect.unwrap(getattr(builder, "func", builder))
    function = function.__init__ if inspect.isclass(function) else function
    namespace = getattr(function, "__globals__", {})
    named = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        try:
            holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
            annotation = typing.get_type_hints(holder, namespace)[name]
        except (NameError, AttributeError, TypeError):
            annotation = parameter.empty
        named[name] = parameter.replace(annotation=annotation)
    return named


def _is_type(schema: Any) -> bool:
    plain = (*_SCALARS, *_LISTS, *_MAPPINGS, Any, None, type(None))
    return typing.get_origin(schema) is not None or any(schema is one for one in plain)


def _matches(value: Any, annotation: Any) -> bool:
    """Whether a value read from YAML fits an annotation. What YAML cannot express is not checked."""
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in _UNIONS:
        return any(_matches(value, choice) for choice in arguments)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is None or origin is type(None):
        return value is None
    if is_dataclass(origin):
        return isinstance(value, dict)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in _SCALARS:
        return type(value) is origin
    if origin in _MAPPINGS:
        item = arguments[1] if arguments else Any
        return isinstance(value, dict) and all(_matches(one, item) for one in value.values())
    if origin in _LISTS:
        return isinstance(value, list) and _items_match(value, origin, arguments)
    return True


def _items_match(values: list, origin: Any, arguments: tuple) -> bool:
    if not arguments:
        return True
    if origin is tuple and arguments[-1] is not Ellipsis:
        return len(values) == len(arguments) and all(map(_matches, values, arguments))
    return all(_matches(value, arguments[0]) for value in values)


def _dataclass(annotation: Any) -> Any:
    """The dataclass that `annotation` is or allows, whose fields are then the keys of a section."""
    if typing.get_origin(annotation) in _UNIONS:
        return next(filter(None, map(_dataclass, typing.get_args(annotation))), None)
    return annotation if is_dataclass(annotation) else None


def _literals(annotation: Any) -> list:
    """The choices of a `Literal`, also inside a `Union`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(arguments)
    if typing.get_origin(annotation) in _UNIONS:
        return [choice for argument in arguments for choice in _literals(argument)]
    return []


def _describe(annotation: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in _UNIONS:
        return " or ".join(_describe(choice) for choice in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(show(choice) for choice in arguments)
    if origin is None or origin is type(None):
        return "null"
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"[{', '.join(_describe(argument) for argument in arguments)}]"
    if is_dataclass(origin):
        return "a mapping of arguments"
    if origin in _LISTS:
        return f"list of {_describe(arguments[0])}" if arguments else "list"
    if origin in _MAPPINGS:
        return f"mapping to {_describe(arguments[1])}" if arguments else "mapping"
    return {bool: "true or false", str: "text"}.get(origin) or _name(origin)
