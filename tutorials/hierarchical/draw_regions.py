"""Draw synthetic regions: two tissues in equal shares, and four ways to arrange them, which are the classes.

python tutorials/hierarchical/draw_regions.py --out DIR [--seed S] [--train N] [--val N]

Writes DIR/regions/{train,val}/<class>/<number>.jpg, of 512 pixels, and into DIR/patches a few patches of 32 pixels of
each training region.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

GRID, PATCH = 16, 32  # patches along a side of a region, and pixels along a side of a patch
SIDE = GRID * PATCH
WAVELENGTH = 5.0  # of the arrangements, in patches
PATCHES_PER_REGION = 12
CLASSES = ("bands", "islands", "mosaic", "speckles")


def smooth_noise(rng: np.random.Generator, side: int, scale: int) -> np.ndarray:
    """[side, side] float32, of mean 0 and deviation 1: waves of about `scale` pixels."""
    coarse = Image.fromarray(rng.standard_normal((2 + side // scale,) * 2, dtype=np.float32))
    values = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return (values - values.mean()) / values.std()


def arrangement(rng: np.random.Generator, name: str) -> np.ndarray:
    """[SIDE, SIDE] bool: where the first tissue is; half of the region."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / PATCH
    phase = rng.uniform(0, 2 * np.pi)
    if name == "bands":
        angle = rng.uniform(0, np.pi)
        field = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / WAVELENGTH + phase)
    elif name == "islands":
        field = smooth_noise(rng, SIDE, int(WAVELENGTH * PATCH / 2))
    elif name == "mosaic":
        field = rng.normal(size=(GRID, GRID)).repeat(PATCH, axis=0).repeat(PATCH, axis=1)
    else:
        field = smooth_noise(rng, SIDE, PATCH // 2)
    return field > np.median(field)


def tissues(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two [SIDE, SIDE, 3]: dark nuclei on pink, and pale fibres. The stain varies inside a region, not between regions:
    what a region's views share would otherwise be its stain, and nothing else would be learnt.
    """
    nuclei = (smooth_noise(rng, SIDE, 5) > 0.5)[..., None]
    cells = np.where(nuclei, (85, 50, 140), (205, 150, 195)).astype(np.float32)
    fibres = np.sin(3 * smooth_noise(rng, SIDE, 10))
    pale = np.array([225, 160, 185], np.float32) + 25 * fibres[..., None]
    stain = np.stack([1 + 0.08 * smooth_noise(rng, SIDE, PATCH) for _ in range(3)], axis=-1)
    return cells * stain, pale * stain


def draw_region(rng: np.random.Generator, name: str) -> np.ndarray:
    """[SIDE, SIDE, 3] uint8"""
    first, second = tissues(rng)
    pixels = np.where(arrangement(rng, name)[..., None], first, second)
    return (pixels + 6 * rng.standard_normal(pixels.shape, dtype=np.float32)).clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=60, help="training regions of each class")
    parser.add_argument("--val", type=int, default=30, help="validation regions of each class")
    options = parser.parse_args()
    patches = options.out / "patches"
    patches.mkdir(parents=True, exist_ok=True)
    for part, (split, count) in enumerate((("train", options.train), ("val", options.val))):
        for label, name in enumerate(CLASSES):
            folder = options.out / "regions" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([options.seed, part, label, number])
                pixels = draw_region(rng, name)
                Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=90)
                if split == "train":
                    for cell in rng.choice(GRID**2, PATCHES_PER_REGION, replace=False):
                        top, left = (PATCH * int(step) for step in divmod(cell, GRID))
                        patch = Image.fromarray(pixels[top : top + PATCH, left : left + PATCH])
                        patch.save(patches / f"{name}_{number:03d}_{cell:03d}.png")
    print(f"{options.out}: {(options.train + options.val) * len(CLASSES)} regions of {SIDE} pixels")


if __name__ == "__main__":
    main()
