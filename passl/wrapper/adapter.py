"""Any model as a backbone: a layer with `embed_dim` that turns images into feature vectors."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import paddle
from paddle import Tensor, nn

from passl.models.multi_crop import features_of_crops
from passl.models.vision_transformer import TokenTransformer
from passl.wrapper import positions, taps
from passl.wrapper.conf import DINOConf
from passl.wrapper.reading import NoFeaturesError, Reading
from passl.wrapper.taps import NotPassedError, Tap, Taps

logger = logging.getLogger("passl")

_DROP_RATES = ("p", "rate", "drop_prob", "drop_rate", "drop_path_rate")


class Features(nn.Layer):
    """The features of ``model``. images: [B, C, H, W] -> [B, embed_dim], the places of `taps` side by side.

    Attributes:
        embed_dims: the width of each place.
    """

    def __init__(self, model: nn.Layer, reading: Reading, embed_dims: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.reading = reading
        self.embed_dims = list(embed_dims)
        self.embed_dim = sum(embed_dims)
        self._first: Optional[Tensor] = None
        self._keeps_first = False

    def forward(self, images: Tensor) -> Tensor:
        vectors = self.reading.vectors(self.model, images)
        return self._kept(vectors[0] if len(vectors) == 1 else paddle.concat(vectors, axis=-1))

    def keep_first(self) -> None:
        """Of the coming calls, the output of the first is for :meth:`first`."""
        self._keeps_first, self._first = True, None

    def first(self) -> Tensor:
        """What was kept; it is let go."""
        kept, self._first, self._keeps_first = self._first, None, False
        return kept

    def _kept(self, features: Tensor) -> Tensor:
        if self._keeps_first and self._first is None:
            self._first = features
        return features


class TokenFeatures(Features):
    """The same of passl's own transformers, which give all their tokens, and take crops of several sizes at once."""

    @property
    def patch_size(self) -> int:
        return self.model.patch_size

    @property
    def mask_token(self) -> Optional[Tensor]:
        return getattr(self.model, "mask_token", None)

    def features_of_crops(self, crops: Sequence[Tensor]) -> Tensor:
        """See the function of this name."""
        return self._kept(features_of_crops(self.model, crops))

    def forward_crops(
        self, crops: Sequence[Tensor], masks: Optional[Sequence[Optional[Tensor]]] = None
    ) -> list[Tensor]:
        """See `TokenTransformer.forward_crops`."""
        tokens = self.model.forward_crops(crops, masks)
        self._kept(tokens[0][:, 0])
        return tokens


# --- building ---


def network_of(model: Any) -> nn.Layer:
    """The Layer in ``model``. Raises TypeError if there is none."""
    if isinstance(model, paddle.Model):
        model = model.network
    if isinstance(model, paddle.DataParallel):
        raise TypeError(
            "the model is in a paddle.DataParallel already: wrap the other way round, "
            "paddle.DataParallel(DINOWrapper(model))"
        )
    if not isinstance(model, nn.Layer):
        hint = " (a class: create one of it)" if isinstance(model, type) else ""
        raise TypeError(f"DINOWrapper takes a paddle.nn.Layer or a paddle.Model, not {model!r}{hint}")
    return model


def make_features(model: nn.Layer, conf: DINOConf) -> Features:
    """``model`` as a backbone; it is run once in evaluation mode at each crop size to find the features' width.

    Raises:
        ValueError: it does not take such crops, or gives no features; the message says what to set.
    """
    if conf.return_layer is not None:
        several = [conf.return_layer] if isinstance(conf.return_layer, str) else conf.return_layer
        choices = [taps.named(model, several)]
    else:
        choices = taps.candidates(model)
    reading, widths = _first_that_works(model, choices, conf)
    if conf.return_layer is None:
        _say_where(model, reading.where, sum(widths))
    if isinstance(model, TokenTransformer) and reading.where.taps == () and conf.preprocess_func is None:
        return TokenFeatures(model, reading, widths)
    return Features(model, reading, widths)


def _first_that_works(model: nn.Layer, choices: Sequence[tuple[Tap, ...]], conf: DINOConf) -> tuple[Reading, list[int]]:
    errors = []
    for choice in choices:
        try:
            return _tried(model, choice, conf)
        except ValueError as error:
            errors.append(error)
    if conf.return_layer is None and all(isinstance(error.__cause__, NotPassedError) for error in errors):
        return _tried(model, (), conf)  # a classifier that is not called, or not as a layer, is none
    raise errors[0]


def _tried(model: nn.Layer, choice: tuple[Tap, ...], conf: DINOConf) -> tuple[Reading, list[int]]:
    """How the features are read, at both sizes, and their widths."""
    sizes = {"global": _pair(conf.global_crop_size)}
    if conf.local_crops_number:
        sizes["local"] = _pair(conf.local_crop_size)
    reading = Reading(Taps(choice, stop=False), conf.preprocess_func)
    found: dict[str, list[int]] = {}
    for kind, size in sizes.items():
        images = paddle.zeros([2, len(conf.mean), *size])
        with trying(model):
            reading, found[kind] = _read(model, reading, images, kind, sizes["global"])
    widths = found["global"]
    if found.get("local", widths) != widths:
        raise ValueError(
            f"{type(model).__name__} gives features {widths} wide for global crops {sizes['global']} and "
            f"{found['local']} for local crops {sizes['local']}; they have to be equal: set return_layer to a layer "
            "before the flattening, preprocess_func to a function that pools, or local_crop_size to global_crop_size"
        )
    return reading, widths


def _read(
    model: nn.Layer, reading: Reading, images: Tensor, kind: str, global_size: tuple[int, int]
) -> tuple[Reading, list[int]]:
    """The same at one size: as the model is or, if that is for one size only, with its position embeddings resized."""
    own_size = positions.own_size_of(model) or global_size
    fixed = positions.fixed_positions(model, own_size) if reading.positions is None else None
    attempts = [reading]
    if fixed and tuple(images.shape[-2:]) != own_size:
        refuses = _refuses(model, reading, paddle.zeros([*images.shape[:2], *fixed.larger_size]))
        attempts.insert(0 if refuses else 1, reading._replace(positions=fixed))
    errors: list[Exception] = []
    for attempt in attempts:
        try:
            if reading.where.taps and kind == "global":
                attempt = attempt._replace(where=Taps(reading.where.taps, stop=_can_stop(model, attempt, images)))
            return attempt, [vector.shape[1] for vector in attempt.vectors(model, images)]
        except Exception as error:
            errors.append(error)
    raise ValueError(_why_not(model, kind, images, errors[0], own_size)) from errors[0]


def _refuses(model: nn.Layer, reading: Reading, images: Tensor) -> bool:
    """Images that are larger than its own, if the model is for one size: of smaller ones it may be content to take the
    first embeddings, which are those of other places."""
    try:
        reading.vectors(model, images)
    except Exception:
        return True
    return False


def _can_stop(model: nn.Layer, reading: Reading, images: Tensor) -> bool:
    """Whether each tap is passed once, so that nothing is lost by leaving at the last."""
    try:
        seen, counts = reading.run(model, images)
    except Exception:
        # Perhaps what fails lies behind the last tap; if not, it fails again without these taps.
        seen, counts = reading._replace(where=Taps(reading.where.taps, stop=True)).run(model, images)
    return len(seen) == len(reading.where.taps) and set(counts.values()) == {1}


def _why_not(model: nn.Layer, kind: str, images: Tensor, error: Exception, own_size: tuple[int, int]) -> str:
    name, (_, channels, height, width) = type(model).__name__, images.shape
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 600 else f"... {reason[-600:]}"
    if not isinstance(error, ValueError) or reason.startswith("("):  # Paddle's own begin with their kind in brackets
        reason = f"{type(error).__name__}: {reason}"
    if kind == "global":
        advice = (
            f"global_crop_size says how large crops are, and mean and std (here {channels} values) how many channels "
            "images have"
        )
    elif (
        any("pos" in path for path, _ in model.named_parameters())
        and positions.fixed_positions(model, own_size) is None
    ):
        advice = positions.why_not(model, own_size)
    else:
        advice = (
            "for a model of one image size set local_crop_size to global_crop_size, or local_crops_number=0, or "
            "return_layer to a layer that any size reaches"
        )
    tried = f"{name} was tried with {kind} crops of {height} x {width} px, {channels} channels"
    if isinstance(error, NoFeaturesError):
        return f"{tried}: {reason}"
    return f"{tried}: {reason.rstrip('.')}. What to set: {advice}"


@contextlib.contextmanager
def trying(model: nn.Layer) -> Iterator[None]:
    """Inside, the model is in evaluation mode and no gradient is kept; afterwards each of its layers is as before."""
    training = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
    model.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        for layer, was_training in training:
            layer.training = was_training


def teacher_of(student: Features, conf: DINOConf) -> Features:
    """A copy for the teacher, without dropout and stochastic depth.

    Raises:
        ValueError: the model cannot be copied, or the copy computes with the model's own layers.
    """
    try:
        teacher = copy.deepcopy(student)
    except Exception as error:
        raise ValueError(
            f"{type(student.model).__name__} cannot be copied for the teacher ({type(error).__name__}: {error}): keep "
            "no computed tensors, open files or locks in the model's attributes"
        ) from error
    for layer in teacher.sublayers():
        if "Drop" in type(layer).__name__:
            for name in _DROP_RATES:
                if isinstance(getattr(layer, name, None), float):
                    setattr(layer, name, 0.0)
    _check_copy(student, teacher, paddle.zeros([2, len(conf.mean), *_pair(conf.global_crop_size)]))
    return teacher


def _check_copy(student: Features, teacher: Features, images: Tensor) -> None:
    """A lambda, or a function in a function, is not copied: it still knows the model that it was made with, and the
    teacher would be the student."""
    called: list[str] = []
    name = type(student.model).__name__
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: called.append(path))
        for path, layer in student.model.named_sublayers(include_self=True)
    ]
    advice = "make what computes it a method of the class, not a lambda or a function that knows the model"
    try:
        with trying(teacher), trying(student):
            teacher(images)
    except Exception as error:
        raise ValueError(
            f"the copy of {name} for the teacher fails where {name} does not ({type(error).__name__}: {error}): "
            f"{advice}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if called:
        raise ValueError(
            f"the copy of {name} for the teacher calls the layers of the original ({called[0] or name}), and would not "
            f"be a teacher of its own: {advice}"
        )


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, tuple) else (size, size)


def _say_where(model: nn.Layer, where: Taps, width: int) -> None:
    source = f"what goes into {where.taps[0].name!r}" if where.taps else "its output"
    if where.taps and where.taps[0].side == "output":
        source = f"what comes out of {where.taps[0].name!r}"
    logger.info("features of %s: %s, %d wide (return_layer chooses another place)", type(model).__name__, source, width)
