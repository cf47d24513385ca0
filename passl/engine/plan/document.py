"""A plan as a YAML file with comments, and as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from passl.engine.plan.recipe import Setting
from passl.yaml_io import dump

_WIDTH = 110


def config_of(settings: Sequence[Setting]) -> dict[str, Any]:
    """The settings as one configuration; later ones are put into earlier ones."""
    config: dict[str, Any] = {}
    for setting in settings:
        *parents, last = setting.key.split(".")
        section = config
        for name in parents:
            section = section.setdefault(name, {})
        value = setting.value
        section[last] = {**section.get(last, {}), **value} if isinstance(value, Mapping) else value
    return config


def yaml_text(settings: Sequence[Setting], header: Sequence[str]) -> str:
    """A configuration that says why: each reason is a comment above its key."""
    reasons = {tuple(setting.key.split(".")): setting.reason for setting in settings if setting.reason}
    lines = [comment for text in header for comment in _comment(text, 0)]
    lines += _lines(config_of(settings), (), reasons)
    return "\n".join(lines) + "\n"


def _lines(section: Mapping[str, Any], path: tuple[str, ...], reasons: Mapping[tuple[str, ...], str]) -> list[str]:
    lines = []
    for key, value in section.items():
        own = (*path, key)
        if not path:
            lines.append("")
        if own in reasons:
            lines += _comment(reasons[own], len(path))
        if isinstance(value, Mapping) and value:
            lines.append(f"{'  ' * len(path)}{dump({key: None}).split(':')[0]}:")
            lines += _lines(value, own, reasons)
        else:
            lines += textwrap.indent(dump({key: value}).rstrip("\n"), "  " * len(path)).split("\n")
    return lines


def _comment(text: str, depth: int) -> list[str]:
    # Names of files may hold anything, also ends of lines and what no terminal or parser takes.
    words = "".join(char if char.isprintable() else " " for char in text).split()
    prefix = "  " * depth + "# "
    return textwrap.wrap(" ".join(words), _WIDTH, initial_indent=prefix, subsequent_indent=prefix,
                         break_long_words=False, break_on_hyphens=False) or ["#"]  # fmt: skip


def table(settings: Sequence[Setting], width: int) -> list[str]:
    """The settings that have a reason: name, value, why."""
    rows = [(setting.key, _short(setting.value), setting.reason) for setting in settings if setting.reason]
    names = max(len(_tail(key)) for key, _, _ in rows)
    values = max(len(value) for _, value, _ in rows)
    left = names + values + 4
    space = max(width - left, 30)
    lines = [f"{'setting':{names}}  {'value':{values}}  why", f"{'-' * names}  {'-' * values}  {'-' * space}"]
    for key, value, reason in rows:
        printable = "".join(char if char.isprintable() else " " for char in reason)
        first, *more = textwrap.wrap(printable, space) or [""]
        lines.append(f"{_tail(key):{names}}  {value:{values}}  {first}")
        lines += [" " * left + line for line in more]
    return lines


def _tail(key: str) -> str:
    """The last two parts of a key."""
    return ".".join(key.split(".")[-2:])


def _batch_rule(schedule: Mapping[str, Any]) -> str:
    """What the batch multiplies the values of a schedule with."""
    if "reference_batch_size" not in schedule:
        return ""
    ratio = f"batch/{schedule['reference_batch_size']}"
    return f" * sqrt({ratio})" if schedule.get("batch_rule") == "sqrt" else f" * {ratio}"


def _short(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return str(value[0].get("name", "")) + f", {len(value)} of them" * (len(value) > 1)
    if not isinstance(value, Mapping):
        return dump(value).replace("\n...", "").strip() if not isinstance(value, list) else str(value)
    name = value.get("name", "")
    if name == "Constant":
        return f"{value['value']:g}"
    if name == "Cosine":
        start = f"{value['warmup_start']:g} -> " if value.get("warmup_start") else ""
        end = f" -> {value['final']:g}" if value["final"] != value["base"] else ""
        scale = _batch_rule(value)
        return f"{start}{value['base']:g}{scale}{end}"
    if "embed_dim" in value:
        return f"ViT {value['embed_dim']} x {value['depth']}, patch {value['patch_size']}"
    return f"{name}, patch {value['patch_size']}" if "patch_size" in value else str(name)
