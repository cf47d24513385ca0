"""passl: self-supervised vision with PaddlePaddle, built around DINO."""

# Before Paddle: 2.6.2 brings a zlib of its own, and whoever loads zlib after it can read no PNG.
import zlib  # noqa: F401

__version__ = "0.1.0"


def list_models(pattern: str = "*") -> list[str]:
    """Names of the backbones that a configuration can use, sorted.

    pattern: as in a shell, upper and lower case differ: `passl.list_models("xcit_small*")`. No match is an empty list.
    """
    from fnmatch import fnmatchcase

    # Here, because it imports Paddle, which takes seconds. It registers the backbones.
    import passl.models  # noqa: F401
    from passl.registry import BACKBONES

    return [name for name in BACKBONES.names() if fnmatchcase(name, pattern)]


def __getattr__(name: str) -> object:
    """`passl.DINOWrapper` and `passl.DINOConf`, which import Paddle only when they are asked for."""
    if name in ("DINOConf", "DINOWrapper"):
        import passl.wrapper

        return getattr(passl.wrapper, name)
    raise AttributeError(f"module 'passl' has no attribute {name!r}")
