"""DINO: self-distillation with no labels (Caron et al. 2021)."""

from passl.models.dino.head import DINOHead
from passl.models.dino.method import DINO
from passl.models.dino_loss import DINOLoss

__all__ = ["DINO", "DINOHead", "DINOLoss"]
