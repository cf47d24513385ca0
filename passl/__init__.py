"""passl: self-supervised vision with PaddlePaddle, built around DINO."""

__version__ = "0.1.0"
