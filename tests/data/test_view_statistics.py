"""The views' distributions against those recorded from the official `DataAugmentationDINO` on the same images."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.data.backends import BACKENDS, make_backend
from passl.data.image_io import read_rgb
from passl.data.multi_crop import MultiCrop
from passl.data.transforms import Normalize
from passl.data.views import ViewParameters, ViewRecipe, draw_view_parameters

VIEWS = ("global1", "global2", "local")
MAX_ERRORS = 4  # standard errors, as the recordings' README asks for
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass
class Setting:
    recorded: dict[str, dict]
    images: list[Image.Image]
    recipes: dict[str, ViewRecipe]

    def draw(self, view: str, repetitions: int) -> list[tuple[Image.Image, ViewParameters]]:
        drawn = []
        for number, image in enumerate(self.images):
            rng = np.random.default_rng([VIEWS.index(view), number])
            for _ in range(repetitions):
                parameters = draw_view_parameters(rng, image.height, image.width, self.recipes[view])
                drawn.append((image, parameters))
        return drawn


@pytest.fixture(scope="module")
def setting(reference: Path) -> Setting:
    section = json.loads((reference / "aug_stats.json").read_text())["synthetic_images"]
    multi_crop = MultiCrop(
        global_crops_scale=section["settings"]["global_crops_scale"],
        local_crops_scale=section["settings"]["local_crops_scale"],
    )
    return Setting(
        recorded=section["views"],
        images=[read_rgb(path) for path in sorted((reference / section["folder"]).iterdir())],
        recipes=dict(zip(VIEWS, (*multi_crop.global_recipes, multi_crop.local_recipe))),
    )


def assert_rate(ours: float, recorded: float, n_ours: int, n_recorded: int, what: str) -> None:
    """Both are fractions of independent draws."""
    # +1 success and failure: a recorded 0 or 1 has an error too.
    p = (recorded * n_recorded + 1) / (n_recorded + 2)
    error = math.sqrt(p * (1 - p) * (1 / n_ours + 1 / n_recorded))
    assert abs(ours - recorded) <= MAX_ERRORS * error, f"{what}: {ours} instead of {recorded} (error {error})"


def assert_distribution(values: np.ndarray, recorded: dict, n_recorded: int, what: str) -> None:
    """Mean, standard deviation and quantiles; `values` are independent draws."""
    n = len(values)
    error = recorded["std"] * math.sqrt(1 / n + 1 / n_recorded)
    assert abs(values.mean() - recorded["mean"]) <= MAX_ERRORS * error, f"mean of {what}"
    # The error of a standard deviation is at most std / sqrt(2n) for distributions with tails no heavier than normal.
    assert abs(values.std() - recorded["std"]) <= MAX_ERRORS * error / math.sqrt(2), f"spread of {what}"
    for percent, quantile in recorded["quantiles"].items():
        p = float(percent) / 100
        slack = MAX_ERRORS * math.sqrt(p * (1 - p) * (1 / n + 1 / n_recorded))
        # Small images give tied values: the share below and the share up to the quantile enclose it.
        assert (values < quantile - 1e-6).mean() - slack <= p, f"{percent} % quantile of {what}"
        assert (values <= quantile + 1e-6).mean() + slack >= p, f"{percent} % quantile of {what}"


@pytest.mark.smoke
@pytest.mark.parametrize("view", VIEWS)
def test_drawn_parameters(setting: Setting, view: str) -> None:
    recorded = setting.recorded[view]
    n_recorded = recorded["n"]
    drawn = setting.draw(view, repetitions=n_recorded // len(setting.images))
    n = len(drawn)
    views = [parameters for _, parameters in drawn]

    rates = {
        "flip": np.array([v.flip for v in views]),
        "gray": np.array([v.gray for v in views]),
        "blur": np.array([v.blur_radius is not None for v in views]),
        "solarize": np.array([v.solarize for v in views]),
        "jitter": np.array([bool(v.jitter) for v in views]),
    }
    for name, happened in rates.items():
        assert_rate(happened.mean(), recorded["fraction"][name], n, n_recorded, name)
    for name, (event, given) in {
        "gray_given_jitter": ("gray", "jitter"),
        "flip_given_gray": ("flip", "gray"),
    }.items():
        n_given = rates[given].sum()
        joint = rates[event][rates[given]].mean()
        assert_rate(joint, recorded["joint"][name], n_given, n_recorded * rates[given].mean(), name)

    boxes = [v.box for v in views]
    areas = np.array([box.height * box.width / (im.height * im.width) for (im, _), box in zip(drawn, boxes)])
    assert_distribution(areas, recorded["area_ratio"], n_recorded, "area")
    aspects = np.array([math.log(box.width / box.height) for box in boxes])
    assert_distribution(aspects, recorded["log_aspect_w_over_h"], n_recorded, "aspect")
    assert all(box.top >= 0 and box.top + box.height <= im.height for (im, _), box in zip(drawn, boxes))
    assert all(box.left >= 0 and box.left + box.width <= im.width for (im, _), box in zip(drawn, boxes))
    histogram = np.histogram(areas, recorded["area_ratio"]["histogram_edges"])[0] / n
    for ours, theirs in zip(histogram, recorded["area_ratio"]["histogram"]):
        assert_rate(ours, theirs, n, n_recorded, "histogram of the area")

    radii = np.array([v.blur_radius for v in views if v.blur_radius is not None])
    assert_distribution(radii, recorded["blur_radius"], n_recorded * len(radii) / n, "blur radius")


@pytest.mark.parametrize("view", VIEWS)
def test_drawn_color_jitter(setting: Setting, view: str) -> None:
    recorded = setting.recorded[view]["jitter"]
    n_recorded = setting.recorded[view]["n"] * setting.recorded[view]["fraction"]["jitter"]
    drawn = setting.draw(view, repetitions=setting.recorded[view]["n"] // len(setting.images))
    jitters = [parameters.jitter for _, parameters in drawn if parameters.jitter]
    for i, name in enumerate(recorded["names"]):
        factors = np.array([dict(jitter)[name] for jitter in jitters])
        error = recorded["std"][i] * math.sqrt(1 / len(factors) + 1 / n_recorded)
        assert abs(factors.mean() - recorded["mean"][i]) <= MAX_ERRORS * error
        assert abs(factors.std() - recorded["std"][i]) <= MAX_ERRORS * error
        width = recorded["max"][i] - recorded["min"][i]
        assert factors.min() == pytest.approx(recorded["min"][i], abs=0.01 * width)
        assert factors.max() == pytest.approx(recorded["max"][i], abs=0.01 * width)
        first = np.mean([jitter[0][0] == name for jitter in jitters])
        fraction = recorded["first_operation_fraction"][i]
        assert_rate(first, fraction, len(jitters), n_recorded, f"{name} first")


@pytest.mark.parametrize("repetitions", [15, pytest.param(350, marks=pytest.mark.slow)])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rendered_views(setting: Setting, backend: str, view: str, repetitions: int) -> None:
    """Normalised channel values and sharpness. Crops of one image are correlated: twice the error for channel means."""
    recorded = setting.recorded[view]
    drawn = setting.draw(view, repetitions)
    growth = math.sqrt(1 + recorded["n"] / len(drawn))  # of the recorded error: ours comes on top of it
    size = setting.recipes[view].size
    # Unnormalised; an image is opened once for all its views.
    renderer = make_backend(backend, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    opened = {id(image): renderer.open(image) for image in setting.images}
    for image in opened.values():
        image.decode()
    pixels, normalize = np.empty((3, *size), np.float32), Normalize()
    means, spreads, luminances, energies, blurred = [], [], [], [], []
    for image, parameters in drawn:
        opened[id(image)].render(parameters, size, pixels)
        normalized = normalize(pixels)
        means.append(normalized.mean(axis=(1, 2), dtype=np.float64))
        spreads.append(normalized.std(axis=(1, 2), dtype=np.float64))
        luminance = np.einsum("c,chw->hw", LUMINANCE, pixels)
        luminances.append(luminance.mean(dtype=np.float64))
        across, down = np.diff(luminance, axis=1), np.diff(luminance, axis=0)
        energy = np.mean(across * across, dtype=np.float64) + np.mean(down * down, dtype=np.float64)
        energies.append(max(energy, 1e-12))  # A crop of one colour has none, and no logarithm.
        blurred.append(parameters.blur_radius is not None)

    error = 2 * np.array(recorded["channel_mean_standard_error"]) * growth
    assert (np.abs(np.mean(means, axis=0) - recorded["channel_mean"]) <= MAX_ERRORS * error).all()
    error = np.array([_spread(recorded["per_crop_std_quantiles"][c]) for c in "rgb"]) * growth
    error /= math.sqrt(recorded["n"])
    assert (np.abs(np.mean(spreads, axis=0) - recorded["per_crop_std_mean"]) <= MAX_ERRORS * error).all()
    error = _spread(recorded["luminance_quantiles"]) * growth / math.sqrt(recorded["n"])
    assert abs(np.mean(luminances) - recorded["luminance_mean"]) <= MAX_ERRORS * error

    energy = recorded["gradient_energy"]
    assert abs(np.mean(energies) - energy["mean"]) <= MAX_ERRORS * energy["standard_error"] * growth
    blurred = np.array(blurred)
    for name, selected in {
        "log10_mean": np.ones_like(blurred),
        "log10_mean_blurred": blurred,
        "log10_mean_not_blurred": ~blurred,
    }.items():
        if selected.any():
            ours = np.log10(energies)[selected].mean()
            error = energy["log10_std"] * growth / math.sqrt(recorded["n"] * selected.mean())
            assert abs(ours - energy[name]) <= MAX_ERRORS * error, f"{name}: {ours} instead of {energy[name]}"


def _spread(quantiles: dict[str, float]) -> float:
    """Standard deviation of a normal distribution with these quartiles."""
    return (quantiles["75"] - quantiles["25"]) / 1.349
