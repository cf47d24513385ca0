"""How feature vectors are read off a model: where, with which positions, and what is made of their shape."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, NamedTuple, Optional

from paddle import Tensor, nn

from passl.wrapper.positions import FixedPositions
from passl.wrapper.taps import Tap, Taps


class NoFeaturesError(ValueError):
    """What is there are no features; the message says what to set."""


class Reading(NamedTuple):
    """where: the taps. preprocess_func: the user's. positions: those to resize, of a transformer of one image size."""

    where: Taps
    preprocess_func: Optional[Callable[[Any], Any]] = None
    positions: Optional[FixedPositions] = None

    def vectors(self, model: nn.Layer, images: Tensor) -> list[Tensor]:
        """The features [B, D] of each place. images: [B, C, H, W]

        Raises:
            NoFeaturesError: what is there are no features.
            NotPassedError: the model's forward does not come by a place.
        """
        with self.at(model, images):
            found = self.where.outputs(model, images)
        names = [tap.name for tap in self.where.taps] or [None]
        return [self._vector(model, name, output, images.shape[0]) for name, output in zip(names, found)]

    def run(self, model: nn.Layer, images: Tensor) -> tuple[dict[Tap, Any], dict[Tap, int]]:
        """See `Taps.run`."""
        with self.at(model, images):
            return self.where.run(model, images)

    def at(self, model: nn.Layer, images: Tensor) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.positions is None else self.positions.at(model, images.shape[-2:])

    def _vector(self, model: nn.Layer, name: Optional[str], output: Any, rows: int) -> Tensor:
        """[B, D] from [B, D], a map [B, D, H, W] (its mean) or tokens [B, N, D] ([CLS], or their mean)."""
        owner = f"{f'the sublayer {name!r}' if name else 'forward'} of {type(model).__name__}"
        if self.preprocess_func is not None:
            output, owner = self.preprocess_func(output), f"preprocess_func of what {owner} gives"
        if not isinstance(output, Tensor):
            raise NoFeaturesError(
                f"{owner} is {_described(output)}, not one Tensor of features: set return_layer to the name of a "
                "sublayer that gives one, or preprocess_func to a function that picks it, such as lambda outputs: "
                "outputs[0]"
            )
        shape = list(output.shape)
        if len(shape) == 4:
            output = output.mean([2, 3])
        elif len(shape) == 3:
            output = output[:, 0] if has_cls_token(model) else output.mean(1)
        if output.ndim != 2 or output.shape[0] != rows:
            raise NoFeaturesError(
                f"{owner} is {shape} for {rows} images; features are [B, D], [B, D, H, W] (their mean is taken) or "
                "[B, N, D] ([CLS] or their mean): set preprocess_func to a function that makes them so"
            )
        return output


def has_cls_token(model: nn.Layer) -> bool:
    """Whether the first of the model's tokens stands for the image."""
    return any(name.rpartition(".")[2] in ("cls_token", "class_token") for name, _ in model.named_parameters())


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
