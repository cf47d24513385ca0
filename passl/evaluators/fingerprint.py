"""Short texts that change when a network, or the images and what is done with them, change."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from paddle import nn

from passl.data.image_io import UnreadableImageError
from passl.data.samples import Samples

_PLAIN = (bool, int, float, str, bytes, type(None))
# Of a layer: what it is doing at the moment, and its number among the layers of this process.
_PASSING = {"training", "_full_name", "_helper", "_built", "_dtype"}


class NotDescribableError(ValueError):
    """Something of which nothing tells whether it is the same as before."""


def of_network(layer: nn.Layer) -> str:
    """Of the weights, and of the settings of all layers (heads, epsilons, sizes) that weights do not show."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(layer.state_dict().items()):
        array = np.ascontiguousarray(tensor.numpy())
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data if array.size else b"")
    for name, part in [("", layer), *layer.named_sublayers()]:
        settings = {key: value for key, value in vars(part).items() if key not in _PASSING and _is_plain(value)}
        digest.update(f"{name} {type(part).__qualname__} {sorted(settings.items())}".encode())
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    """Also of lists, such as the strides of a convolution."""
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def of_data(dataset: Samples) -> str:
    """Of the data set's files (name, size, time of the last change), labels and transform.

    Raises:
        NotDescribableError: samples that are no files, or a transform of unknown parts.
    """
    digest = hashlib.blake2b(digest_size=16)
    own = {key: value for key, value in vars(dataset).items() if isinstance(value, _PLAIN)}
    parts = (type(dataset).__qualname__, sorted(own.items()), described(getattr(dataset, "transform", None)))
    digest.update(repr(parts).encode())
    if dataset.labels is not None:
        digest.update(np.ascontiguousarray(dataset.labels).data if len(dataset.labels) else b"")
    digest.update(json.dumps(list(dataset.class_names)).encode())
    known: dict[str, bytes] = {}
    for index in range(len(dataset)):
        try:
            name = dataset.describe(index)
        except NotImplementedError as error:
            raise NotDescribableError(f"the samples of {type(dataset).__name__} have no names") from error
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        file = name.partition("!")[0]
        if file not in known:
            known[file] = _state_of(file)
            digest.update(known[file])
    if not any(known.values()):
        raise NotDescribableError(f"the samples of {type(dataset).__name__} are no files")
    return digest.hexdigest()


def _state_of(file: str) -> bytes:
    try:
        state = os.stat(file)
    except OSError:  # it may have been removed, like other images that cannot be read
        return b""
    return f"{state.st_size} {state.st_mtime_ns}".encode()


def described(value: Any) -> Any:
    """``value``, a transform for example, as plain values of which equal ones mean the same.

    Raises:
        NotDescribableError: something in it is neither plain nor has attributes.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return [described(one) for one in value]
    if isinstance(value, Mapping):
        return [(str(key), described(one)) for key, one in sorted(value.items(), key=lambda pair: str(pair[0]))]
    if isinstance(value, types.MethodType):
        return [value.__func__.__qualname__, described(value.__self__)]
    if isinstance(value, functools.partial):
        return described([value.func, value.args, value.keywords])
    if isinstance(value, type) or (hasattr(value, "__qualname__") and "<" not in value.__qualname__):
        return f"{value.__module__}.{value.__qualname__}"  # not of a lambda: all of them have one name
    if hasattr(value, "__dict__") and not hasattr(value, "__qualname__"):
        return [described(type(value)), described(vars(value))]
    raise NotDescribableError(f"{value!r} does not tell what it does")


def draws_at_random(dataset: Samples) -> bool:
    """Whether the data set's transform draws random numbers, so that its images differ each time."""
    for index in range(len(dataset)):
        rng = np.random.default_rng(0)
        before = rng.bit_generator.state
        try:
            dataset.sample(index, rng)
        except UnreadableImageError:
            continue
        return rng.bit_generator.state != before
    return False
