"""Networks and the views they are shown, from small to large, and which of them suit the images and the time."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, Optional

from passl.engine.plan.budget import PlanError
from passl.engine.plan.images import Images
from passl.engine.plan.machine import Machine
from passl.registry import BACKBONES

# Operations a second that training reached where it was measured (ViT-S/16 on CPU cores) or should reach at most (half
# precision on a GPU): only where to start looking is read off these, probes decide.
_SPEED = {"cpu": 60e9, "gpu": 60e12}
_LARGE_SET = 1_000_000


@dataclass(frozen=True)
class Design:
    """A backbone and its views.

    Attributes:
        name: for the reader and, where it is a registered backbone, for --arch.
        backbone: component of the configuration.
        level: place among the sizes, from 0; None for a backbone of which only the name is known.
        patch_size: None where there are no patches.
        global_size, local_size: pixels of the views. num_local: how many local ones.
        is_narrow: a network of the sizes that were made for short runs: it gets a small head.
        tera: 1e12 operations of one training step on one image; None where that is not known.
    """

    name: str
    backbone: dict[str, Any]
    level: Optional[int]
    patch_size: Optional[int]
    global_size: int
    local_size: int
    num_local: int
    is_narrow: bool
    tera: Optional[float]

    def nominal_seconds(self, machine: Machine) -> float:
        """Least time for one image on all of ``machine``."""
        units = machine.processes if machine.device == "gpu" else machine.cores
        return (self.tera or 0.1) * 1e12 / (_SPEED[machine.device] * units)


@dataclass(frozen=True)
class _Size:
    """A size of vision transformer. most: largest side of a view; fewest: images that it takes to be worth it."""

    name: str
    width: int
    depth: int
    heads: int
    most: int
    num_local: int
    fewest: int
    is_registered: bool = True


SIZES = (
    _Size("ViT of 96 x 2 blocks", 96, 2, 3, 64, 2, 0, False),
    _Size("ViT of 192 x 4 blocks", 192, 4, 3, 96, 4, 500, False),
    _Size("vit_tiny", 192, 12, 3, 224, 6, 2_000),
    _Size("vit_small", 384, 12, 6, 224, 8, 20_000),
    _Size("vit_base", 768, 12, 12, 224, 8, _LARGE_SET),
)
_LARGEST_ELSEWHERE = 3  # vit_small: the size of the recipe whose results are known


def candidates(images: Images, machine: Machine, patch_size: Optional[int], is_dense: bool) -> list[Design]:
    """The sizes that have enough images, the largest first."""
    suitable = [level for level, size in enumerate(SIZES) if size.fewest <= images.readable]
    if not machine.is_here:
        suitable = [level for level in suitable if level <= _LARGEST_ELSEWHERE]
    return [sized(level, images.side, patch_size, is_dense) for level in reversed(suitable)]


def sized(level: int, side: int, patch_size: Optional[int] = None, is_dense: bool = False) -> Design:
    """The size number ``level`` for images of ``side`` pixels."""
    size = SIZES[level]
    global_size, patch = _grid(min(side, size.most), patch_size, is_dense)
    local_size = _local(global_size, patch)
    backbone: dict[str, Any] = {"name": size.name, "patch_size": patch, "img_size": global_size}
    if size.is_registered:
        backbone["drop_path_rate"] = 0.1
    else:
        backbone = {
            "name": "VisionTransformer",
            "img_size": global_size,
            "patch_size": patch,
            "embed_dim": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "init_std": round(size.width**-0.5, 2),
        }
    tera = _tera(size, patch, global_size, local_size, size.num_local)
    return Design(
        size.name, backbone, level, patch, global_size, local_size, size.num_local, not size.is_registered, tera
    )


def named(arch: str, side: int, patch_size: Optional[int], is_dense: bool) -> Design:
    """The registered backbone ``arch``, for images of ``side`` pixels.

    Raises:
        PlanError: an unknown one, one that takes no images or no patch_size.
    """
    level = next((level for level, size in enumerate(SIZES) if size.name == arch), None)
    if level is not None:
        return sized(level, side, patch_size, is_dense)
    try:
        parameters = inspect.signature(BACKBONES.get(arch)).parameters
    except ValueError as error:
        raise PlanError(f"--arch {arch}: {error}") from error
    if arch in ("RegionTransformer", "hvit_xs"):
        raise PlanError(f"--arch {arch}: it is for features of regions, not images: see tutorials/hierarchical")
    backbone: dict[str, Any] = {"name": arch}
    fixed = re.search(r"_p(\d+)$", arch)
    if "patch_size" in parameters:
        patch: Optional[int] = patch_size or parameters["patch_size"].default
        backbone["patch_size"] = patch
    elif patch_size is not None:
        raise PlanError(f"--arch {arch} takes no --patch-size")
    else:
        patch = int(fixed[1]) if fixed else None
    global_size, patch = _grid(min(side, 224), patch or 32, False)
    if "img_size" in parameters:
        backbone["img_size"] = global_size
    if "drop_path_rate" in parameters:
        backbone["drop_path_rate"] = 0.1
    return Design(arch, backbone, None, patch, global_size, _local(global_size, patch), 8, False, None)


def is_convnet(design: Design) -> bool:
    return "resnet" in design.name.lower()


def _grid(side: int, patch_size: Optional[int], is_dense: bool) -> tuple[int, int]:
    """Side of the global views, a multiple of the patch size, and the patch size."""
    if patch_size is None:
        patch_size = next(patch for patch, most in ((4, 40), (8, 112), (16, side)) if side <= most)
        patch_size = max(patch_size // 2, 4) if is_dense else patch_size
    # Smaller images are enlarged: less than 4 x 4 patches have nothing to attend to.
    return max(side // patch_size, 4) * patch_size, patch_size


def _local(global_size: int, patch_size: int) -> int:
    # The official 96 of 224; of small views half, as less shows nothing.
    share = 96 / 224 if global_size > 112 else 0.5
    return max(round(global_size * share / patch_size), 2) * patch_size


def _tera(size: _Size, patch: int, global_size: int, local_size: int, num_local: int) -> float:
    """1e12 operations of a step: the student forward and backward (three forwards), the teacher forward."""

    def forward(side: int) -> float:
        tokens = 1 + (side // patch) ** 2
        per_token = size.depth * (12 * size.width**2 + 2 * tokens * size.width)
        return 2.0 * tokens * per_token

    student = 2 * forward(global_size) + num_local * forward(local_size)
    return (3 * student + 2 * forward(global_size)) / 1e12


def relative_cost(one: Design, other: Design) -> Optional[float]:
    """The operations of ``one`` as a multiple of those of ``other``; None where they are not known."""
    return one.tera / other.tera if one.tera and other.tera else None


def smaller(design: Design, side: int) -> list[Design]:
    """The sizes below ``design`` that --arch can name, the largest first."""
    top = len(SIZES) if design.level is None else design.level
    return [sized(level, side) for level in range(top - 1, -1, -1) if SIZES[level].is_registered]
