"""DINOv2 (Oquab et al. 2023)."""

from passl.models.dinov2.backbones import dinov2_vit_base, dinov2_vit_giant, dinov2_vit_large, dinov2_vit_small
from passl.models.dinov2.ibot_loss import IBOTLoss
from passl.models.dinov2.koleo_loss import koleo_loss
from passl.models.dinov2.method import DINOv2

__all__ = [
    "DINOv2",
    "IBOTLoss",
    "dinov2_vit_base",
    "dinov2_vit_giant",
    "dinov2_vit_large",
    "dinov2_vit_small",
    "koleo_loss",
]
