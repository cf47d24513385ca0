"""Networks and methods. Importing this registers all of them."""

from passl.models.dino import DINO, DINOHead, DINOLoss
from passl.models.dinov2 import DINOv2, dinov2_vit_base, dinov2_vit_giant, dinov2_vit_large, dinov2_vit_small
from passl.models.fine_tune import FineTune
from passl.models.method import Method
from passl.models.pixels import RawPixels
from passl.models.probe import LinearProbe
from passl.models.region_transformer import RegionTransformer, hvit_xs
from passl.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from passl.models.simsiam import SimSiam
from passl.models.vision_transformer import VisionTransformer, vit_base, vit_large, vit_small, vit_tiny
from passl.models.xcit import (
    XCiT,
    xcit_medium_24_p8,
    xcit_medium_24_p16,
    xcit_nano_12_p8,
    xcit_nano_12_p16,
    xcit_small_12_p8,
    xcit_small_12_p16,
    xcit_small_24_p8,
    xcit_small_24_p16,
    xcit_tiny_12_p8,
    xcit_tiny_12_p16,
    xcit_tiny_24_p8,
    xcit_tiny_24_p16,
)

__all__ = [
    "DINO",
    "DINOHead",
    "DINOLoss",
    "DINOv2",
    "FineTune",
    "LinearProbe",
    "Method",
    "RawPixels",
    "RegionTransformer",
    "ResNet",
    "SimSiam",
    "VisionTransformer",
    "XCiT",
    "dinov2_vit_base",
    "dinov2_vit_giant",
    "dinov2_vit_large",
    "dinov2_vit_small",
    "hvit_xs",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vit_base",
    "vit_large",
    "vit_small",
    "vit_tiny",
    "xcit_medium_24_p8",
    "xcit_medium_24_p16",
    "xcit_nano_12_p8",
    "xcit_nano_12_p16",
    "xcit_small_12_p8",
    "xcit_small_12_p16",
    "xcit_small_24_p8",
    "xcit_small_24_p16",
    "xcit_tiny_12_p8",
    "xcit_tiny_12_p16",
    "xcit_tiny_24_p8",
    "xcit_tiny_24_p16",
]
