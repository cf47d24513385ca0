"""Where in a model its features are: taken by hooks that are there only while the wrapper runs the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from paddle import Tensor, nn

from passl.registry import did_you_mean

# What classifiers are called, in the order in which they are looked for.
CLASSIFIERS = ("fc", "head", "heads", "classifier", "_fc", "last_linear", "cls_head", "fc_out")
# The same of classes of paddle.vision.models that have another name for it. AlexNet is asked for its last feature maps
# if the crops are not of the one size that its linear layers take.
_OF_PADDLE = {
    "AlexNet": (("_fc8", "input"), ("_conv5", "output")),
    "DenseNet": (("out", "input"),),
    "GoogLeNet": (("_fc_out", "input"),),
    "SqueezeNet": (("_conv9", "input"),),
}


class Tap(NamedTuple):
    """The input or the output of the sublayer `name` (dotted)."""

    name: str
    side: str  # "input" or "output"


class _ReachedError(Exception):
    """All that is asked for is there: what comes after it in the model has not to be computed."""


class NotPassedError(RuntimeError):
    """The forward pass of the model does not come by a tap."""


def candidates(model: nn.Layer) -> list[tuple[Tap, ...]]:
    """Where the features may be, the best first; () is the model's output."""
    if type(model).__module__.startswith("paddle.vision.models") and type(model).__name__ in _OF_PADDLE:
        return [(Tap(*where),) for where in _OF_PADDLE[type(model).__name__]]
    children = dict(model.named_children())
    for name in CLASSIFIERS:
        if name in children:
            return _inputs_of_classifier(name, children[name])
    return [()]


def _inputs_of_classifier(name: str, classifier: nn.Layer) -> list[tuple[Tap, ...]]:
    if isinstance(classifier, nn.Identity):
        return [()]
    if isinstance(classifier, nn.Linear):
        return [(Tap(name, "input"),)]
    # Of an MLP the last layer is the classifier; the others make features.
    linears = [below for below, layer in classifier.named_sublayers() if isinstance(layer, nn.Linear)]
    last = [(Tap(f"{name}.{linears[-1]}", "input"),)] if linears else []
    return [*last, (Tap(name, "input"),)]


def named(model: nn.Layer, names: Sequence[str]) -> tuple[Tap, ...]:
    """The outputs of the sublayers of these names.

    Raises:
        ValueError: there is none of a name; the message suggests one.
    """
    known = [name for name, _ in model.named_sublayers()]
    for name in names:
        if name not in known:
            raise ValueError(
                f"return_layer: {type(model).__name__} has no sublayer {name!r}. {_suggestion(name, known)}"
            )
    return tuple(Tap(name, "output") for name in names)


def _suggestion(name: str, known: Sequence[str]) -> str:
    sentence = did_you_mean(name, known)
    if sentence.startswith("Choose") and len(known) > 30:  # of a large network only what is near the top
        return did_you_mean(name, [one for one in known if one.count(".") < 1])
    return sentence


class Taps:
    """Runs ``model`` and gives what its taps see.

    stop: leave the model's forward when all taps have been passed.
    """

    def __init__(self, taps: Sequence[Tap], stop: bool) -> None:
        self.taps = tuple(taps)
        self.stop = stop

    def outputs(self, model: nn.Layer, images: Tensor) -> list[Any]:
        """What the model gives, or what each tap saw last.

        Raises:
            NotPassedError: a tap was not passed.
        """
        if not self.taps:
            return [model(images)]
        seen, _ = self.run(model, images)
        missing = [tap.name for tap in self.taps if tap not in seen]
        if missing:
            raise NotPassedError(
                f"the forward pass of {type(model).__name__} does not call its sublayer {missing[0]!r}"
            )
        return [seen[tap] for tap in self.taps]

    def run(self, model: nn.Layer, images: Tensor) -> tuple[dict[Tap, Any], dict[Tap, int]]:
        """What each tap saw last, and how often it was passed."""
        seen: dict[Tap, Any] = {}
        counts: dict[Tap, int] = {}

        def see(tap: Tap, value: Any) -> None:
            seen[tap] = value
            counts[tap] = counts.get(tap, 0) + 1
            if self.stop and len(seen) == len(self.taps):
                raise _ReachedError

        handles = [_hook(model, tap, see) for tap in self.taps]
        try:
            model(images)
        except _ReachedError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen, counts


def sublayer(model: nn.Layer, name: str) -> nn.Layer:
    return functools.reduce(getattr, name.split("."), model)


def _hook(model: nn.Layer, tap: Tap, see: Any) -> Any:
    layer = sublayer(model, tap.name)
    if tap.side == "input":
        # Paddle does not show a hook what is given by keyword: nothing is seen then.
        return layer.register_forward_pre_hook(lambda _, inputs: see(tap, inputs[0]) if inputs else None)
    return layer.register_forward_post_hook(lambda _, inputs, output: see(tap, output))
