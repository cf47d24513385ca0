"""Configurations: YAML files that inherit from each other, changed by `-o`, checked before anything is built.

    config = load("configs/dino/x.yaml", ["Optimizer.weight_decay=0.1"])
    check(config, schema)
    print(to_yaml(config))

`_base_: path` or `_base_: [paths]`, relative to the file, names what a file starts from. Mappings merge,
lists and scalars replace; a section whose `name` changes is another component and keeps nothing of the base's
arguments. `-o key=value` sets exactly that key, through lists as well (`...transform.0.size=224`); changing a
`name` drops what the files said about the old component, not what other `-o` say about the new one. `Global.name` is no
component's: it names the run, and changes nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Union

from passl.schema import Component, Path, Required, check, component_parts, is_short_form
from passl.yaml_io import ConfigError, dump, parse, show

__all__ = ["Component", "Config", "ConfigError", "Required", "check", "component_parts", "load", "to_yaml"]

OVERRIDE = "-o"
_RUN = ("Global",)  # the section whose name is no component's


class Config(dict):
    """A resolved configuration: plain dicts, lists and scalars, and where each of them was set.

    sources: file name, or `-o`, by path. A path is a tuple of dict keys and list indices; what has no entry
        of its own has its parent's.
    """

    def __init__(self, values: Iterable = (), sources: Optional[Mapping[Path, str]] = None):
        super().__init__(values)
        self.sources: dict[Path, str] = dict(sources or {})

    def source(self, path: Path) -> Optional[str]:
        """The file that set the value at `path`, or `-o`; None if unknown."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.sources:
                return self.sources[path[:length]]
        return None

    def claim(self, path: Path, sources: Mapping[Path, str]) -> None:
        """Replaces what is known about `path` and everything below it."""
        kept = {other: source for other, source in self.sources.items() if not _is_within(other, path)}
        self.sources = {**kept, **sources}


def load(path: Union[str, os.PathLike], overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration, everything it inherits from, and the overrides `a.b.0.c=value`, in this order.

    Raises:
        ConfigError: a file cannot be read or resolved, or overrides cannot be applied (all are named).
    """
    config = _load_file(os.fspath(path), asked_by="", parents=())
    _apply_overrides(config, overrides)
    return config


def to_yaml(config: Mapping[str, Any]) -> str:
    """The configuration as text that `load` reads back as an equal one."""
    return dump(dict(config))


# --- files and inheritance ---


def _load_file(path: str, asked_by: str, parents: tuple[str, ...]) -> Config:
    values = parse(_read(path, asked_by), path)
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: expected a mapping of sections, got {show(values)}"])
    bases = values.pop("_base_", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError([f"{path}: _base_: expected a path or a list of paths, got {show(bases)}"])

    parents = (*parents, path)
    config = Config()
    for base in bases:
        base_path = os.path.normpath(os.path.join(os.path.dirname(path), base))
        if any(os.path.realpath(parent) == os.path.realpath(base_path) for parent in parents):
            raise ConfigError([f"{path}: _base_: a cycle: {' -> '.join((*parents, base_path))}"])
        _merge(config, _load_file(base_path, f"{path}: _base_: ", parents), ())
    _merge(config, Config(values, {(): path}), ())
    config.sources[()] = path
    return config


def _read(path: str, asked_by: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError([f"{asked_by}{path}: not UTF-8 text ({error.reason} at byte {error.start})"]) from error
    except OSError as error:
        raise ConfigError([f"{asked_by}{path}: {error.strerror}"]) from error


def _merge(config: Config, other: Config, path: Path) -> None:
    """Lays `other` over `config`, from `path` down."""
    old, new = _at(config, path), _at(other, path)
    if _changes_name(old, new.get("name"), path):
        old.clear()
        config.claim(path, {path: other.source(path)})
    for key, value in new.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(config, other, here)
        else:
            old[key] = value
            below = {one: source for one, source in other.sources.items() if _is_within(one, here)}
            config.claim(here, {here: other.source(here), **below})


def _at(config: Config, path: Path) -> dict[str, Any]:
    return _at(config, path[:-1])[path[-1]] if path else config


def _changes_name(section: dict[str, Any], name: Any, path: Path) -> bool:
    """Whether ``name`` makes another component of what is at ``path``."""
    return bool(path) and path != _RUN and name is not None and section.get("name") not in (None, name)


def _is_within(path: Path, root: Path) -> bool:
    return path[: len(root)] == root


# --- overrides ---


def _apply_overrides(config: Config, overrides: Sequence[str]) -> None:
    problems: list[str] = []
    applied: list[tuple[list[str], Any]] = []
    for override in overrides:
        try:
            keys, value = _parse_override(override)
            if _assign(config, keys, value):
                # The files' arguments of the old component are gone, those from -o hold in any order.
                for earlier_keys, earlier_value in applied:
                    below = len(earlier_keys) >= len(keys) and earlier_keys[: len(keys) - 1] == keys[:-1]
                    if below and earlier_keys != keys:
                        _assign(config, earlier_keys, earlier_value)
            applied.append((keys, value))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def _parse_override(override: str) -> tuple[list[str], Any]:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError([f"{OVERRIDE}: {override}: expected key=value"])
    keys = dotted.strip().split(".")
    if not all(keys):
        raise ConfigError([f"{OVERRIDE}: {override}: expected key=value with a dotted key such as Global.epochs"])
    return keys, parse(text, f"{OVERRIDE}: {dotted}")


def _assign(config: Config, keys: list[str], value: Any) -> bool:
    """Sets one value, through missing sections; returns whether it put another component in a section."""
    node: Any = config
    path: Path = ()
    for key, next_key in zip(keys, keys[1:]):
        index = _index(node, key, path)
        path = (*path, index)
        if isinstance(node, list) and is_short_form(node[index]) and next_key not in node[index]:
            name, arguments = component_parts(node[index])
            node[index] = {"name": name, **arguments}
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
            config.claim(path, {path: OVERRIDE})
        node = node[index]
    index = _index(node, keys[-1], path)
    replaces = index == "name" and _changes_name(node, value, path)
    if replaces:
        node.clear()
        config.claim(path, {path: OVERRIDE})
    node[index] = value
    config.claim((*path, index), {(*path, index): OVERRIDE})
    return replaces


def _index(node: Any, key: str, path: Path) -> Union[str, int]:
    """`key` as an index into `node`."""
    if isinstance(node, dict):
        return key
    dotted = ".".join(map(str, path))
    if not isinstance(node, list):
        raise ConfigError([f"{OVERRIDE}: {dotted}.{key}: {dotted} is {show(node)}, not a section or a list"])
    if not key.isdecimal():
        raise ConfigError([f"{OVERRIDE}: {dotted}.{key}: {dotted} is a list: write an index in place of '{key}'"])
    if int(key) >= len(node):
        raise ConfigError([f"{OVERRIDE}: {dotted}.{key}: {dotted} has only {len(node)} items (the first is 0)"])
    return int(key)
