"""passl: self-supervised vision with PaddlePaddle, built around DINO."""

# Before Paddle: 2.6.2 brings a zlib of its own, and whoever loads zlib after it can read no PNG.
import zlib  # noqa: F401

__version__ = "0.1.0"
