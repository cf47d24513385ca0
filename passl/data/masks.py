"""Which patches of the global crops a method hides from its student, drawn for a whole batch at once."""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np

from passl.config import ConfigError
from passl.registry import BATCH_TRANSFORMS

_WHERE = "DataLoader.Train.batch_transform (BlockMasks)"
_ATTEMPTS = 10  # to place one block


class BlockMaskGenerator:
    """Masks made of rectangles that may overlap (Bao et al. 2021; as in DINOv2).

    Each block has an area drawn evenly between `min_num_patches` and what is still to be hidden, an aspect ratio drawn
    evenly in its logarithm, and any place. It is smaller than the grid in both directions, unless that has a side of
    one patch. A block that would hide too much or nothing new is drawn again; after 10 failures the mask stays as it
    is, so that it may hide fewer patches than asked for, and never more.

    Args:
        grid: rows and columns of patches.
        min_num_patches: of a block, unless less is left to hide.
        max_num_patches: of a block; None: half of the grid.
        min_aspect: height over width is at least this, and at most 1 divided by this.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        min_num_patches: int = 4,
        max_num_patches: Optional[int] = None,
        min_aspect: float = 0.3,
    ) -> None:
        height, width = grid
        _check_blocks(min_num_patches, max_num_patches, min_aspect)
        if height < 1 or width < 1:
            raise ValueError(f"grid ({height} x {width}) must have at least one row and one column of patches")
        self.height, self.width = height, width
        self.min_num_patches = min_num_patches
        self.max_num_patches = height * width / 2 if max_num_patches is None else max_num_patches
        self.log_min_aspect = math.log(min_aspect)
        # A mask is one large integer with a bit for each patch, row by row: a block is placed by a shift, and compared
        # with a mask by one operation. Times a row of it, this is a block of so many rows.
        self._rows = [sum(1 << (row * width) for row in range(rows)) for rows in range(height + 1)]

    def __call__(self, num_masked: int, rng: np.random.Generator) -> np.ndarray:
        """A mask, bool [rows * columns], True for at most `num_masked` hidden patches."""
        return self._arrays([self._bits(num_masked, rng)])[0]

    def masks(self, nums_masked: list[int], rng: np.random.Generator) -> np.ndarray:
        """A mask for each of B numbers: bool [B, rows * columns]."""
        return self._arrays([self._bits(number, rng) for number in nums_masked])

    def _arrays(self, masks: list[int]) -> np.ndarray:
        num_patches = self.height * self.width
        size = -(-num_patches // 8)
        packed = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), np.uint8)
        bits = np.unpackbits(packed.reshape(len(masks), size), axis=1, count=num_patches, bitorder="little")
        return bits.astype(bool)

    def _bits(self, num_masked: int, rng: np.random.Generator) -> int:
        mask, count = 0, 0
        while count < num_masked:
            added = self._block(mask, min(num_masked - count, self.max_num_patches), rng)
            if not added:
                break
            mask |= added
            count += _count(added)
        return mask

    def _block(self, mask: int, most: float, rng: np.random.Generator) -> int:
        """The patches, at least one and at most so many, that one more block hides; 0 where none was found."""
        draw = rng.random
        for _ in range(_ATTEMPTS):
            area = self.min_num_patches + (most - self.min_num_patches) * draw()
            aspect = math.exp(self.log_min_aspect * (1.0 - 2.0 * draw()))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (1 <= height <= max(self.height - 1, 1) and 1 <= width <= max(self.width - 1, 1)):
                continue
            top = int(draw() * (self.height - height + 1))
            left = int(draw() * (self.width - width + 1))
            row = (1 << width) - 1
            added = (row * self._rows[height] << (top * self.width + left)) & ~mask
            if 0 < _count(added) <= most:
                return added
        return 0


def _count(bits: int) -> int:
    return bin(bits).count("1")  # int.bit_count is newer than Python 3.9


def _check_blocks(min_num_patches: int, max_num_patches: Optional[int], min_aspect: float) -> None:
    if min_num_patches < 1:
        raise ValueError(f"min_num_patches ({min_num_patches}) must be at least 1")
    if max_num_patches is not None and max_num_patches < 1:
        raise ValueError(f"max_num_patches ({max_num_patches}) must be at least 1")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"min_aspect ({min_aspect}) must be more than 0 and at most 1: 0.3 is from 0.3 to 1/0.3")


@BATCH_TRANSFORMS.register()
class BlockMasks:
    """Adds "masks", bool [2*B, N], to a batch: the patches of its global crops to hide, view by view (as in DINOv2).

    Args:
        patch_size: of the backbone; with the crops' size it gives the grid of N patches.
        mask_prob: share of the crops that get a mask, in random order; the others get an empty one.
        mask_ratio: least and largest share of the patches that a mask hides. Each masked crop of a batch draws from an
            interval of its own, all as wide, that lie side by side between the two.
        min_num_patches, max_num_patches, min_aspect: of the blocks, see `BlockMaskGenerator`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        patch_size: int,
        mask_prob: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        min_num_patches: int = 4,
        max_num_patches: Optional[int] = None,
        min_aspect: float = 0.3,
    ) -> None:
        if patch_size < 1:
            raise ValueError(f"patch_size ({patch_size}) must be at least 1 pixel")
        if not 0 <= mask_prob <= 1:
            raise ValueError(f"mask_prob ({mask_prob}) must be in [0, 1], a share of the crops")
        if len(mask_ratio) != 2 or not 0 <= mask_ratio[0] <= mask_ratio[1] <= 1:
            raise ValueError(f"mask_ratio ({list(mask_ratio)}) must be two shares of the patches, [least, largest]")
        _check_blocks(min_num_patches, max_num_patches, min_aspect)
        self.patch_size = patch_size
        self.mask_prob = mask_prob
        self.mask_ratio = tuple(mask_ratio)
        self.blocks = (min_num_patches, max_num_patches, min_aspect)
        self._generator: Optional[BlockMaskGenerator] = None  # of the last batch's grid

    def __call__(self, arrays: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """arrays: a batch with "global_crops" [2*B, C, H, W] -> the same with "masks".

        Raises:
            ConfigError: there are no global crops, or their size is no multiple of `patch_size`.
        """
        generator = self._generator_of(arrays)
        crops = len(arrays["global_crops"])
        num_masked = int(crops * self.mask_prob)
        bounds = np.linspace(*self.mask_ratio, num_masked + 1)
        ratios = bounds[:-1] + np.diff(bounds) * rng.random(num_masked)
        num_patches = generator.height * generator.width
        # By strata of their ratio, then those without a mask; the order of the crops has nothing to do with it.
        masks = np.zeros((crops, num_patches), bool)
        if num_masked:
            places = rng.permutation(crops)[:num_masked]
            masks[places] = generator.masks([int(num_patches * ratio) for ratio in ratios], rng)
        return {**arrays, "masks": masks}

    def _generator_of(self, arrays: dict[str, Any]) -> BlockMaskGenerator:
        if "global_crops" not in arrays:
            raise ConfigError(
                [
                    f"{_WHERE}: it hides patches of 'global_crops', and the batch has only "
                    f"{', '.join(arrays) or 'nothing'}: give the data set of DataLoader.Train the transform MultiCrop"
                ]
            )
        height, width = np.shape(arrays["global_crops"])[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                [
                    f"{_WHERE}: patch_size ({self.patch_size}) does not divide the global crops of {height} x {width} "
                    "pixels: make it the backbone's, and MultiCrop's global_crops_size a multiple of it"
                ]
            )
        grid = height // self.patch_size, width // self.patch_size
        if self._generator is None or (self._generator.height, self._generator.width) != grid:
            self._generator = BlockMaskGenerator(grid, *self.blocks)
        return self._generator
