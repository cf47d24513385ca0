"""Who computes the pixels of the views: back ends of `MultiCrop`, by name.

A back end gets everything random as parameters, so all of them show the same views of an image, and differ by
rounding only. Another one is a module with a `Backend` and an `OpenedImage`, and a line in `make_backend`.
"""

from __future__ import annotations

from collections.abc import Sequence

from passl.data.backends.backend import Backend, ImageInput, OpenedImage, least_reduction
from passl.data.backends.raw import RawBackend, is_raw

BACKENDS = ("opencv", "pillow")

__all__ = [
    "BACKENDS",
    "Backend",
    "ImageInput",
    "OpenedImage",
    "RawBackend",
    "is_raw",
    "least_reduction",
    "make_backend",
]


def make_backend(name: str, mean: Sequence[float], std: Sequence[float]) -> Backend:
    """The back end `name`, normalising with `mean` and `std`, one value per channel.

    Raises:
        ValueError: there is no back end of this name.
    """
    # Imported here: a back end's library is loaded only by those who use it.
    if name == "pillow":
        from passl.data.backends.pillow import PillowBackend

        return PillowBackend(mean, std)
    if name == "opencv":
        from passl.data.backends.opencv import OpenCVBackend

        return OpenCVBackend(mean, std)
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
