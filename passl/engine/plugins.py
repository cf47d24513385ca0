"""Components of the user's own: files and modules that register them, imported before a configuration is checked."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passl.config import ConfigError


def load_plugins(config: Mapping[str, Any]) -> None:
    """Import what ``Global.plugins`` lists: Python files by their path, anything else as a module.

    Raises:
        ConfigError: one of them is missing or fails.
    """
    section = config.get("Global")
    plugins = section.get("plugins") if isinstance(section, Mapping) else None
    if plugins is None:
        return
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        raise ConfigError([f"Global.plugins: must be a list of Python files or modules, got {plugins!r}"])
    for plugin in plugins:
        try:
            _load_file(Path(plugin).expanduser()) if plugin.endswith(".py") else importlib.import_module(plugin)
        except Exception as error:  # foreign code: whatever it raises, the user must learn where
            raise ConfigError([f"Global.plugins: {plugin}: {type(error).__name__}: {error}"]) from error


def _load_file(path: Path) -> None:
    name = f"passl_plugin_{path.resolve().as_posix().replace('/', '_')}"
    if name in sys.modules:  # registering the same names again would be an error
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
