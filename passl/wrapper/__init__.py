"""DINO for any model in a plain Paddle loop: `passl.DINOWrapper` and its settings, `passl.DINOConf`."""

from passl.wrapper.conf import DINOConf
from passl.wrapper.wrapper import DINOWrapper

__all__ = ["DINOConf", "DINOWrapper"]
