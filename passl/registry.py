"""Tables that turn a name in a configuration into the class or function that builds the component."""

from __future__ import annotations

import difflib
from collections import ChainMap
from collections.abc import Iterable, MutableMapping
from typing import Callable, TypeVar

Builder = TypeVar("Builder", bound=Callable)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence that helps with a misspelt `word`: the nearest choice, or else all of them."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    if near:
        return f"Did you mean '{by_lower[near[0]]}'?"
    return f"Choose from: {', '.join(sorted(by_lower.values()))}." if by_lower else "There are none to choose from."


class Registry:
    """Named builders of one kind of component.

    A builder is a class or a function; its signature is the schema of the component's arguments in a
    configuration, so it takes no `**kwargs`.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._builders: MutableMapping[str, Callable] = {}

    def register(self, *names: str) -> Callable[[Builder], Builder]:
        """Decorator that adds a builder under `names` (default: its own `__name__`).

        Raises:
            TypeError: a name is not text (a forgotten `()` after `register`).
            ValueError: a name is taken.
        """
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"write @register() or @register('name'): {name!r} is not a name")

        def add(builder: Builder) -> Builder:
            for name in names or (builder.__name__,):
                if name in self._builders:
                    raise ValueError(f"{self.kind} '{name}' is registered already, by {self._builders[name]!r}")
                self._builders[name] = builder
            return builder

        return add

    def get(self, name: str) -> Callable:
        """The builder registered as `name`.

        Raises:
            ValueError: there is none; the message suggests the nearest name.
        """
        if name not in self._builders:
            raise ValueError(f"unknown {self.kind} '{name}'. {did_you_mean(str(name), self._builders)}")
        return self._builders[name]

    @classmethod
    def union(cls, kind: str, *registries: Registry) -> Registry:
        """What is in any of `registries`, also if it is registered later; of equal names the first counts."""
        union = cls(kind)
        union._builders = ChainMap(*(registry._builders for registry in registries))
        return union

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._builders)

    def __contains__(self, name: object) -> bool:
        return name in self._builders

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self.names())})"


BACKBONES = Registry("backbone")
HEADS = Registry("head")
METHODS = Registry("method")
DATASETS = Registry("dataset")
TRANSFORMS = Registry("transform")
BATCH_TRANSFORMS = Registry("batch transform")
SAMPLERS = Registry("sampler")
SCHEDULES = Registry("schedule")
OPTIMIZERS = Registry("optimizer")
EVALUATORS = Registry("evaluator")

# A constructor's argument of one of these names holds a component (`transform`: or a list of them).
SLOTS = {
    "backbone": BACKBONES,
    "head": HEADS,
    "ibot_head": HEADS,
    "dataset": DATASETS,
    "train_dataset": DATASETS,
    "val_dataset": DATASETS,
    "transform": TRANSFORMS,
}

# Arguments of the component in a slot that come from the component around it, never from a configuration:
# a method gives its head the width of its backbone.
SUPPLIED = {"head": ("in_dim",), "ibot_head": ("in_dim",)}
