"""Networks and methods. Importing this registers all of them."""

from passl.models.dino import DINO, DINOHead, DINOLoss
from passl.models.method import Method
from passl.models.pixels import RawPixels
from passl.models.probe import LinearProbe
from passl.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from passl.models.vision_transformer import VisionTransformer, vit_base, vit_small, vit_tiny

__all__ = [
    "DINO",
    "DINOHead",
    "DINOLoss",
    "LinearProbe",
    "Method",
    "RawPixels",
    "ResNet",
    "VisionTransformer",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vit_base",
    "vit_small",
    "vit_tiny",
]
