"""A backbone and a linear classifier, all of whose weights are trained."""

from __future__ import annotations

from typing import Callable, Literal

import numpy as np
import paddle
from paddle import Tensor, nn

from passl.models.classifier import Classifier, LinearClassifier
from passl.models.layer_rates import layer_rates
from passl.models.mixing import Mixing
from passl.registry import METHODS


@METHODS.register()
class FineTune(Classifier):
    """Trains a pre-trained backbone further, with a linear classifier on its output (as Bao et al. 2022, Touvron et al.
    2021).

    The last classifier of a LinearProbe on the same features (`n_last_blocks: 1`) may be the first one here: give that
    run as `Global.pretrained_model`.

    Args:
        backbone: its argument drop_path_rate, where it has one, is the stochastic depth.
        pool: of a transformer with `get_intermediate_layers`: its output, which is the normalised [CLS] token; the mean
            of the normalised patch tokens; or both, one after the other. Other backbones give their output.
        layer_decay: the learning rate of each block is so many times that of the block above (`layer_rates`); the
            classifier has the scheduled one.
        label_smoothing: the share of each label that is spread evenly over all classes.
        mixup_alpha, cutmix_alpha, mix_prob, switch_prob: see `Mixing`. Of a mixed image, top1 and top5 are measured
            against the label with the larger share.
    """

    def __init__(
        self,
        backbone: Callable[..., nn.Layer],
        num_classes: int,
        pool: Literal["cls", "mean", "cls+mean"] = "cls",
        layer_decay: float = 1.0,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
    ) -> None:
        super().__init__(backbone(), num_classes)
        if pool not in ("cls", "mean", "cls+mean"):
            raise ValueError(f"pool ({pool!r}) must be 'cls', 'mean' or 'cls+mean'")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing ({label_smoothing}) must be at least 0 and below 1")
        self.pool = pool if self._has_blocks else "cls"
        self.layer_decay = layer_decay
        self.label_smoothing = label_smoothing
        self.mixing = Mixing(mixup_alpha, cutmix_alpha, mix_prob, switch_prob)
        self.learning_rate_shares()  # an unusable layer_decay is told before anything is loaded
        self.linear = LinearClassifier(self.backbone.embed_dim * len(self.pool.split("+")), num_classes)

    def learning_rate_shares(self) -> dict[str, float]:
        """Those of the backbone, by layer_decay."""
        if self.layer_decay == 1:
            return {}
        rates = layer_rates(self.backbone, self.layer_decay)
        return {f"backbone.{name}": rate for name, rate in rates.items()}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: "image" [B, C, H, W], "label" [B] -> the loss and the rates, see `Classifier.outputs`."""
        images, label = self.checked(batch)
        share = 1.0
        if self.training and self.mixing.is_on():
            # The trainer seeds Paddle's generator at each step, so a resumed run mixes alike.
            rng = np.random.default_rng(paddle.randint(0, 2**31 - 1, [1], "int64").item())
            images, share = self.mixing(images, rng)
        logits = self.predict(images)
        other = label.flip([0])
        with paddle.amp.auto_cast(enable=False):
            loss = mixed_cross_entropy(logits, label, other, share, self.label_smoothing)
        return self.outputs(logits, label if share >= 0.5 else other, loss)

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> what the classifier sees, [B, D] or, for "cls+mean", [B, 2*D]"""
        if self.pool == "cls":
            return self.backbone(images)
        tokens = self.backbone.get_intermediate_layers(images, 1)[0]
        mean = tokens[:, 1:].mean(1)
        return mean if self.pool == "mean" else paddle.concat([tokens[:, 0], mean], axis=-1)

    def backbone_output(self, features: Tensor) -> Tensor:
        """The [CLS] token where it is among `features`, else the mean of the patch tokens, [B, D]."""
        return features[:, : self.backbone.embed_dim]


def mixed_cross_entropy(logits: Tensor, label: Tensor, other: Tensor, share: float, smoothing: float) -> Tensor:
    """Mean cross-entropy against ``share`` of ``label`` and the rest of ``other``, of both of which ``smoothing`` is
    spread evenly over all classes.

    Args:
        logits: [B, K]; label, other: [B].
    """
    # Not log_softmax, which is slow on a CPU for many classes and stops at -64.
    log_p = logits - paddle.logsumexp(logits, axis=-1, keepdim=True)
    hit = paddle.take_along_axis(log_p, label.unsqueeze(-1), axis=1).mean()
    if share != 1:
        hit = share * hit + (1.0 - share) * paddle.take_along_axis(log_p, other.unsqueeze(-1), axis=1).mean()
    return -(1.0 - smoothing) * hit - smoothing * log_p.mean() if smoothing else -hit
