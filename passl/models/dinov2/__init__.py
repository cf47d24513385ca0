"""DINOv2 (Oquab et al. 2023)."""

from passl.models.dinov2.backbones import dinov2_vit_base, dinov2_vit_giant, dinov2_vit_large, dinov2_vit_small

__all__ = ["dinov2_vit_base", "dinov2_vit_giant", "dinov2_vit_large", "dinov2_vit_small"]
