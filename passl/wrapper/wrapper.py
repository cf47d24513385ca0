"""DINO and DINOv2 for any model, in a training loop of one's own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, Optional, Union

import numpy as np
import paddle
from paddle import Tensor, nn

from passl import distributed
from passl.data.masks import BlockMasks
from passl.models.dino import DINO, DINOHead, DINOLoss
from passl.models.dinov2 import DINOv2
from passl.models.distillation import SelfDistillation, zero_of
from passl.registry import did_you_mean
from passl.wrapper.adapter import Features, TokenFeatures, make_features, network_of, teacher_of, trying
from passl.wrapper.clock import Clock
from passl.wrapper.conf import DINOConf
from passl.wrapper.images import Images, Views
from passl.wrapper.parallel import ParallelHeads, ParallelLoss

logger = logging.getLogger("passl")

_MODES = ("train", "val")
_PATIENCE = 100  # forward calls without an ema_update
_BATCH_NORMS = (nn.BatchNorm1D, nn.BatchNorm2D, nn.BatchNorm3D, nn.SyncBatchNorm)


class DINOWrapper(nn.Layer):
    """``model`` with the loss of DINO (version 1) or DINOv2 (version 2) beside its features.

        dino_model = DINOWrapper(model)
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=dino_model.parameters())
        features, dino_loss = dino_model(images)  # then backward, step, clear_grad ...
        dino_model.ema_update(step)  # ... and, after each of the optimizer's steps, this

    The student is ``model`` itself, which is trained; the teacher is a copy of it that follows. Both get a projection
    head. A classifier (`fc`, `head`, `classifier` ...) is passed by while the wrapper runs the model, and only then.

    Args:
        model: a Layer, or a paddle.Model, over images [B, C, H, W].
        configs: settings; None for those of version 1.

    Attributes:
        model: what was given, the student.
        teacher: a Layer of the same class, the better one: evaluate and save this.
        losses: the parts of the last loss by name, detached, to log.
    """

    def __init__(self, model: Union[nn.Layer, paddle.Model], configs: Optional[DINOConf] = None) -> None:
        super().__init__()
        self.configs = conf = _settings(configs)
        features = make_features(network_of(model), conf)
        self.method = _method(features, conf)
        self.losses: dict[str, Tensor] = {}
        self._views = Views(conf)
        self._masks: Optional[BlockMasks] = None
        if hasattr(self.method, "ibot_loss"):
            self._masks = BlockMasks(features.model.patch_size, conf.mask_prob, conf.mask_ratio)
        self._clock = Clock(conf)
        # In the state, so that a loop that goes on does so with the views and the momentum that come next.
        self.register_buffer("next_step", paddle.zeros([1], "int64"))
        self.register_buffer("num_forwards", paddle.zeros([1], "int64"))
        self._frozen = SimpleNamespace(last_layer=False)
        self._hooked: tuple[int, ...] = ()
        self._forwards_since_update = 0
        _stay_in_full_precision([self.method.teacher, self.method.student.head, self.method.dino_loss])

    @property
    def model(self) -> nn.Layer:
        return self.method.student.backbone.model

    @property
    def teacher(self) -> nn.Layer:
        return self.method.teacher.backbone.model

    @property
    def embed_dim(self) -> int:
        """D, the width of the features."""
        return self.method.student.backbone.embed_dim

    def forward(
        self, images: Images, epoch: int = 0, mode: Literal["train", "val"] = "train"
    ) -> Union[tuple[Tensor, Tensor], Tensor]:
        """ "train": (the mean of the student's features of the global crops [B, D], the loss), both with gradient.
        "val": the teacher's features [B, D] of the normalised images in evaluation mode, without.

        images: a batch Tensor [B, C, H, W], uint8 or floats in [0, 1]; or a list of arrays [H, W, C] or Pillow images,
            of any sizes. Not normalised: the wrapper does it.
        epoch: counts from 0; with `len_train_loader` set and `ema_update` called it need not be given.

        Raises:
            TypeError, ValueError: other images, or another mode.
        """
        if mode not in _MODES:
            raise ValueError(f"mode ({mode!r}) must be 'train' or 'val'. {did_you_mean(str(mode), _MODES)}")
        if mode == "val":
            return self._evaluated(images)
        if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch < 0:
            raise ValueError(f"epoch ({epoch!r}) must be a whole number, counted from 0")
        return self._trained(self._crops(images), int(epoch))

    def ema_update(self, step: Optional[int] = None) -> None:
        """To be called after each step of the optimizer: the teacher follows the student, and the centre the teacher.

        step: how many there were before this one, over all epochs; None: one more than at the last call.
        """
        if step is None:
            step = int(self.next_step.item())
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
            raise ValueError(f"step ({step!r}) must be a whole number, the steps of the optimizer before this one")
        self.method.after_step(self._clock.momentum(int(step)))
        self.next_step.set_value(paddle.full([1], int(step) + 1, self.next_step.dtype))
        self._forwards_since_update = 0

    def half_precision_layers(self) -> list[nn.Layer]:
        """What `paddle.amp.decorate(..., level="O2")` should be given: the rest is better off with float32 weights."""
        return self.method.half_precision_layers()

    def extra_repr(self) -> str:
        return f"version={self.configs.version!r}, embed_dim={self.embed_dim}"

    # --- training ---

    def _crops(self, images: Images) -> dict[str, Tensor]:
        seed = [self.configs.seed, distributed.rank(), int(self.num_forwards.item())]
        rng = np.random.default_rng(seed)
        crops = {name: self._in_its_type(crop) for name, crop in self._views.crops(images, rng).items()}
        if self._masks is not None and "masks" not in crops:
            crops["masks"] = paddle.to_tensor(self._masks(crops, rng)["masks"])
        self.num_forwards += 1
        return crops

    def _trained(self, crops: dict[str, Tensor], epoch: int) -> tuple[Tensor, Tensor]:
        self._check_batch(crops)
        step = int(self.next_step.item())
        epochs = self.configs.freeze_last_layer
        self._freeze_last_layer(epochs is None or self._clock.epoch(epoch, step) < epochs)
        student = self.method.student.backbone
        student.keep_first()
        losses = dict(self.method(crops, teacher_temp=self._clock.teacher_temp(epoch, step)))
        features = student.first()
        rows = crops["global_crops"].shape[0]
        first, second = features[:rows].chunk(2)
        loss = losses.pop("loss")
        self.losses = {"loss": loss.detach(), **{name: part.detach() for name, part in losses.items()}}
        if paddle.is_grad_enabled():
            self._check_training(features)
            if distributed.world_size() > 1:  # a classifier that is passed by must not keep the others waiting
                loss = loss + zero_of(student, loss.dtype)
        return (first + second) / 2, loss

    def _freeze_last_layer(self, frozen: bool) -> None:
        """By a hook on the gradient, which is then 0: without any, processes would wait for it for ever."""
        parameters = [p for p in self._last_layer_parameters() if not p.stop_gradient]
        if frozen and self._hooked != tuple(map(id, parameters)):  # also of a copy, whose parameters have no hooks
            flag = self._frozen
            for parameter in parameters:
                parameter.register_hook(lambda gradient: paddle.zeros_like(gradient) if flag.last_layer else None)
            self._hooked = tuple(map(id, parameters))
        self._frozen.last_layer = frozen

    def _last_layer_parameters(self) -> Iterator[Tensor]:
        yield from self.method.student.head.last_layer.parameters()

    def _check_training(self, features: Tensor) -> None:
        if features.stop_gradient and self.training:
            raise ValueError(
                f"the features of {type(self.model).__name__} have no gradient: none of the parameters before them is "
                "trainable, or its forward computes without gradients"
            )
        self._forwards_since_update += 1
        if self._forwards_since_update == _PATIENCE:
            logger.warning(
                "forward was called %d times, and the teacher has not moved: call ema_update(step) after each "
                "optimizer.step()",
                _PATIENCE,
            )

    def _check_batch(self, crops: dict[str, Tensor]) -> None:
        rows = min(crop.shape[0] for name, crop in crops.items() if name != "masks")
        if rows > 1 or not self.training:
            return
        norms = [name for name, layer in self.model.named_sublayers() if isinstance(layer, _BATCH_NORMS)]
        if norms:
            raise ValueError(
                f"a batch of 1 image, with one local crop of it: the batch norms of {type(self.model).__name__} "
                f"({norms[0]} ...) cannot tell a single crop from its mean. Give batches of 2 images or more "
                "(drop_last=True in the DataLoader), or local_crops_number of 0 or at least 2"
            )

    # --- evaluation ---

    def _evaluated(self, images: Images) -> Tensor:
        teacher = self.method.teacher.backbone
        with trying(teacher):
            return teacher(self._in_its_type(self._views.whole(images)))

    def _in_its_type(self, images: Tensor) -> Tensor:
        """Views are made in float32; networks of float64 take no others than their own."""
        is_double = self.method.student.head.last_layer.parameters()[0].dtype == paddle.float64
        return images.astype("float64") if is_double and images.is_floating_point() else images


def _settings(configs: Any) -> DINOConf:
    if configs is None:
        return DINOConf()
    if isinstance(configs, dict):
        return DINOConf(**configs)
    if not isinstance(configs, DINOConf):
        raise TypeError(f"configs must be a DINOConf, a dict of its settings or None, not {configs!r}")
    return configs.copy()


def _method(features: Features, conf: DINOConf) -> SelfDistillation:
    """The engine's own method around ``features`` and a copy."""
    head = functools.partial(DINOHead, **conf.head_arguments())
    several = len(features.embed_dims) > 1
    if several:
        head = functools.partial(_parallel_heads, embed_dims=features.embed_dims, head=head)
    shared = {"student_temp": conf.student_temp, "center_momentum": conf.center_momentum}
    frozen = conf.epochs if conf.freeze_last_layer is None else conf.freeze_last_layer
    backbone = _Once(features, conf)
    if conf.version == "v1":
        method = DINO(backbone, head, freeze_last_layer=frozen, **shared)
    else:
        shared["centering"] = conf.centering
        method = DINOv2(
            backbone,
            head,
            freeze_last_layer=frozen,
            ibot_loss_weight=_ibot_weight(features, conf),
            koleo_loss_weight=conf.koleo_loss_weight,
            layer_decay=1.0,
            patch_embed_lr=1.0,
            **shared,
        )
    if several:
        out_dims = [one.out_dim for one in method.student.head.heads]
        method.dino_loss = ParallelLoss([DINOLoss(out_dim, **shared) for out_dim in out_dims], out_dims)
    return method


class _Once:
    """A builder that gives ``features`` first and copies of them from then on: the student, then the teacher."""

    def __init__(self, features: Features, conf: DINOConf) -> None:
        self._make: Callable[[], Features] = lambda: features
        self._features, self._conf = features, conf

    def __call__(self) -> Features:
        made, self._make = self._make(), lambda: teacher_of(self._features, self._conf)
        return made


def _parallel_heads(in_dim: int, embed_dims: list[int], head: Callable[..., nn.Layer]) -> ParallelHeads:
    return ParallelHeads(embed_dims, head)


def _ibot_weight(features: Features, conf: DINOConf) -> float:
    if conf.ibot_loss_weight == 0:
        return 0.0
    if isinstance(features, TokenFeatures) and features.mask_token is not None:
        return conf.ibot_loss_weight
    logger.info(
        "DINOv2 without iBOT: %s has no mask token to stand for hidden patches (passl's VisionTransformer has one with "
        "mask_token=True). The losses are DINO and KoLeo",
        type(features.model).__name__,
    )
    return 0.0


def _stay_in_full_precision(layers: list[nn.Layer]) -> None:
    """Keeps `paddle.amp.decorate` of a whole wrapper from casting them: a teacher's small moves would round to none."""
    for layer in layers:
        for one in layer.sublayers(include_self=True):
            # The two names that Paddle has had for its switch.
            one._cast_to_low_precision = False
            one._cast_to_low_precison = False
