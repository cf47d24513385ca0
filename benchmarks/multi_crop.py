"""The time of DINO's views of an image: passl's back ends and the official pipeline on torchvision, one thread each.

    python benchmarks/multi_crop.py
    python benchmarks/multi_crop.py --images ~/imagenet/val --repeats 10

All sides read the same files and make of each two global views of 224 pixels and eight local ones of 96, finished and
normalised, by the official recipe. They take turns, pass by pass. Counted is processor time, which other programs
disturb less than the clock's; the table shows the medians of the passes. The parts come from passes of their own,
because measuring them takes time too. Without --images, JPEGs of the sizes common in ImageNet are made up.

The official side needs PyTorch and torchvision in the same environment; without them only passl is measured.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from passl.data import multi_crop
from passl.data.backends import opencv, pillow, pixels, resampling
from passl.data.image_io import image_extensions, read_source

PARTS = ("decode", "draw", "crop", "colour", "blur", "pack")
# Width and height of ImageNet's photos: most are like the first ones, and the mean is the mean.
SIZES = ((500, 375), (500, 375), (375, 500), (500, 333), (333, 500), (500, 400), (640, 480), (800, 600))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Make = Callable[[str], Any]  # path of a file -> its views


class Clock:
    """Processor seconds of the parts; time spent in a part within another one counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._entered = [""]
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._entered.append(name)
        try:
            yield
        finally:
            self._switch()
            self._entered.pop()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._entered[-1]] += now - self._since
        self._since = time.process_time()

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return timed


# --- passl ---


def passl_side(backend: str, clock: Optional[Clock]) -> Make:
    """With a clock, the functions of the back end are replaced by timed ones, for the rest of the process."""
    transform = multi_crop.MultiCrop(backend=backend)
    if clock is not None:
        for part, owner, names in _passl_functions(backend, transform):
            for name in names:
                setattr(owner, name, clock.wrap(part, getattr(owner, name)))
    count = iter(range(sys.maxsize))
    return lambda path: transform(read_source(path), np.random.default_rng(next(count)))


def _passl_functions(backend: str, transform: multi_crop.MultiCrop) -> list[tuple[str, Any, list[str]]]:
    """(part, module or class, names of the functions that are this part)"""
    draw = ("draw", multi_crop, ["draw_view_parameters"])
    if backend == "pillow":
        # What rendering consists of beside the named functions is packing.
        return [
            draw,
            ("decode", transform.backend, ["open"]),
            ("decode", pillow._PillowImage, ["decode"]),
            ("pack", pillow._PillowImage, ["render"]),
            ("crop", pillow, ["resized_crop", "horizontal_flip"]),
            ("colour", pillow, ["apply_color_jitter", "grayscale", "solarize"]),
            ("blur", pillow, ["gaussian_blur"]),
        ]
    return [
        draw,
        ("decode", transform.backend, ["open"]),
        ("decode", opencv._ArrayImage, ["decode"]),
        ("pack", opencv._ArrayImage, ["render"]),
        ("crop", resampling, ["resize"]),
        ("crop", pixels, ["horizontal_flip"]),
        ("colour", opencv, ["apply_color_jitter"]),
        ("colour", pixels, ["to_gray"]),
        ("blur", pixels, ["gaussian_blur"]),
    ]


# --- the official pipeline ---


class OfficialBlur:
    """Of the official recipe, with its probability."""

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def official_solarize(image: Image.Image) -> Image.Image:
    """Of the official recipe, with its probability."""
    return ImageOps.solarize(image) if random.random() < 0.2 else image


def official_side(clock: Optional[Clock]) -> Make:
    """The composition of the official `DataAugmentationDINO`. Raises ImportError: no torchvision."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):  # without them, a torchvision built for GPUs cannot be imported beside CPU PyTorch
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import transforms

    torch.set_num_threads(1)
    bicubic = transforms.InterpolationMode.BICUBIC

    def timed(part: str, *operations: Callable) -> Callable:
        composed = transforms.Compose(operations)
        return composed if clock is None else clock.wrap(part, composed)

    def view(size: int, scale: tuple[float, float], blur_prob: float, *last: Callable) -> Callable:
        jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic)
        operations = [
            timed("crop", crop, transforms.RandomHorizontalFlip(p=0.5)),
            timed("colour", transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(p=0.2)),
            timed("blur", OfficialBlur(blur_prob)),
            *[timed("colour", operation) for operation in last],
            timed("pack", transforms.ToTensor(), transforms.Normalize(MEAN, STD)),
        ]
        return transforms.Compose(operations)

    def load(path: str) -> Image.Image:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")

    views = [view(224, (0.4, 1.0), 1.0), view(224, (0.4, 1.0), 0.1, official_solarize)]
    views += [view(96, (0.05, 0.4), 0.5)] * 8
    decode = load if clock is None else clock.wrap("decode", load)

    def make(path: str) -> Any:
        image = decode(path)
        return [transform(image) for transform in views]

    return make


SIDES: dict[str, Callable[[Optional[Clock]], Make]] = {
    "passl, opencv": lambda clock: passl_side("opencv", clock),
    "passl, pillow": lambda clock: passl_side("pillow", clock),
    "official": official_side,
}


# --- measuring ---


def made_up_images(folder: Path, number: int) -> list[str]:
    """JPEGs with the sizes, and about the bytes per pixel, of ImageNet's."""
    paths = []
    for index in range(number):
        width, height = SIZES[index % len(SIZES)]
        rng = np.random.default_rng(index)
        picture = np.zeros((height, width, 3))
        for cells, weight in ((4, 90), (16, 50), (64, 30), (height, 12)):
            noise = rng.normal(0, weight, (cells, cells, 3))
            picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        paths.append(str(folder / f"{index:03d}.jpg"))
        Image.fromarray(np.clip(picture + 120, 0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def seconds_per_image(make: Make, paths: list[str]) -> float:
    start = time.process_time()
    for path in paths:
        make(path)
    return (time.process_time() - start) / len(paths)


def measure(paths: list[str], repeats: int) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """-> seconds per image of each pass of each side; and of each part, the medians. Sides that lack are left out."""
    makes, clocks = {}, {name: Clock() for name in SIDES}
    for name, side in SIDES.items():
        try:
            makes[name] = side(None)
            seconds_per_image(makes[name], paths[:4])  # imports, tables, memory
        except (ImportError, RuntimeError) as error:  # a torchvision of another build raises the latter
            print(f"{name}: cannot be measured here ({error})")
    passes: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(repeats):
        for name, make in makes.items():
            passes[name].append(seconds_per_image(make, paths))
    makes = {name: SIDES[name](clocks[name]) for name in makes}
    parts: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in makes}
    for _ in range(repeats):
        for name, make in makes.items():
            clocks[name].seconds.clear()
            seconds_per_image(make, paths)
            for part, seconds in clocks[name].seconds.items():
                parts[name][part].append(seconds / len(paths))
    return passes, {name: {p: statistics.median(s) for p, s in those.items()} for name, those in parts.items()}


def report(passes: dict[str, list[float]], parts: dict[str, dict[str, float]]) -> str:
    totals = {name: statistics.median(seconds) for name, seconds in passes.items()}
    lines = ["milliseconds per image" + "".join(f"{name:>15}" for name in totals)]
    lines.append(f"{'all':<22}" + "".join(f"{1e3 * seconds:>15.2f}" for seconds in totals.values()))
    for part in PARTS:
        cells = (f"{1e3 * parts[name][part]:>15.2f}" if part in parts[name] else f"{'-':>15}" for name in totals)
        lines.append(f"  {part:<20}" + "".join(cells))
    lines.append(f"{'images per core-second':<22}" + "".join(f"{1 / seconds:>15.1f}" for seconds in totals.values()))
    if "official" in totals:
        for name in totals:
            ratios = [theirs / ours for ours, theirs in zip(passes[name], passes["official"])]
            if name != "official":
                spread = f"{min(ratios):.2f} to {max(ratios):.2f} in single passes"
                lines.append(f"{name}: {totals['official'] / totals[name]:.2f} times the official pipeline ({spread})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of images (default: made-up JPEGs)")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each side (default: 5)")
    parser.add_argument("--number", type=int, default=40, help="at most so many images (default: 40)")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.number < 1:
        parser.error("--repeats and --number must be at least 1")
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.images is None:
            paths = made_up_images(Path(folder), arguments.number)
        else:
            files = sorted(arguments.images.expanduser().rglob("*"))
            paths = [str(path) for path in files if path.suffix.lower() in image_extensions()][: arguments.number]
        if not paths:
            parser.error(f"{arguments.images} contains no images")
        print(f"{len(paths)} images, {arguments.repeats} passes of each side, one thread")
        passes, parts = measure(paths, arguments.repeats)
        print(report(passes, parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
