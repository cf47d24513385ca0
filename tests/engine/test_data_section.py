"""The section Data: what it says reaches every component, and what contradicts it is an error."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from passl.checkpoint import STATES, write
from passl.config import Config, ConfigError, to_yaml
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from passl.engine import build, data_section
from passl.engine.run import checked
from passl.engine.settings import GlobalSettings

MEAN, STD = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
DATA = {"channels": 4, "mean": MEAN, "std": STD}


def config(data: object = None, **model: object) -> Config:
    validation = [{"Resize": {"size": 8}}, {"ToTensor": {}}, {"Normalize": {}}]
    dataset = {"name": "ImageList", "root": "images", "transform": validation}
    sections = {
        "Model": {
            "name": "DINO",
            "backbone": {"name": "vit_tiny", **model},
            "head": {"name": "DINOHead", "out_dim": 8},
        },
        "DataLoader": {
            "Train": {
                "dataset": {"name": "ImageFolder", "root": "images", "transform": {"name": "MultiCrop"}},
                "sampler": {"batch_size": 2},
            },
            "Eval": None,
        },
        "Evaluators": [{"name": "KNN", "train_dataset": dataset, "val_dataset": dict(dataset)}],
    }
    return Config({**sections, **({} if data is None else {"Data": data})})


def complete(given: Config, tmp_path, **settings: object) -> Config:
    return data_section.complete(given, given, GlobalSettings(**settings), tmp_path)[0]


@pytest.mark.smoke
def test_it_reaches_every_component(tmp_path):
    found = complete(config(DATA), tmp_path)
    assert found["Model"]["backbone"] == {"name": "vit_tiny", "in_chans": 4}
    train = found["DataLoader"]["Train"]["dataset"]
    assert train["channels"] == 4
    assert train["transform"] == {"name": "MultiCrop", "mean": MEAN, "std": STD}
    for name in ("train_dataset", "val_dataset"):
        dataset = found["Evaluators"][0][name]
        assert dataset["channels"] == 4
        assert dataset["transform"][2] == {"name": "Normalize", "mean": MEAN, "std": STD}
        assert dataset["transform"][:2] == [{"name": "Resize", "size": 8}, {"name": "ToTensor"}]
    given = config(DATA)
    given["Evaluators"] = [{"name": "RegionExtraction", "dataset": {"name": "ImageList", "root": "images"}}]
    (extraction,) = complete(given, tmp_path)["Evaluators"]
    assert (extraction["mean"], extraction["std"], extraction["dataset"]["channels"]) == (MEAN, STD, 4)


@pytest.mark.smoke
def test_a_component_that_says_it_itself_is_left_alone(tmp_path):
    given = config({"channels": 3, "mean": [0.5, 0.5, 0.5], "std": [0.1, 0.1, 0.1]}, in_chans=3)
    given["DataLoader"]["Train"]["dataset"]["transform"]["mean"] = [0.0, 0.0, 0.0]
    found = complete(given, tmp_path)["DataLoader"]["Train"]["dataset"]["transform"]
    assert found == {"name": "MultiCrop", "mean": [0.0, 0.0, 0.0], "std": [0.1, 0.1, 0.1]}


def test_without_it_nothing_changes(tmp_path):
    assert complete(config(), tmp_path) == config()


def test_defaults(tmp_path):
    assert data_section.settings_of({"Data": {"mean": MEAN, "std": STD}}).channels == 4
    plain = data_section.settings_of({"Data": {"channels": 3}})
    assert (plain.mean, plain.std) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert data_section.settings_of({"Data": None}) is None


@pytest.mark.parametrize(
    ("data", "model", "text"),
    [
        ({"channels": 4}, {}, "Data.mean is missing: `passl-data stats"),
        ({"channels": 0}, {}, r"Data.channels \(0\) must be at least 1"),
        ({"channels": 2, "mean": [1.0], "std": [1.0, 1.0]}, {}, "Data.mean has 1 values, and Data.channels is 2"),
        ({"channels": 1, "mean": [1.0], "std": [0.0]}, {}, r"Data.std \(\[0.0\]\) must be finite numbers above 0"),
        ({"channels": 1, "mean": [float("nan")], "std": [1.0]}, {}, "Data.mean .* must be finite numbers"),
        (DATA, {"in_chans": 3}, "Model.backbone.in_chans is 3, and Data.channels is 4"),
        (None, {"in_chans": 4}, "the backbone's in_chans is 4, and ImageFolder reads images as 8-bit RGB: `passl-data"),
    ],
)
def test_contradictions(data, model, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        complete(config(data, **model), tmp_path)


def test_contradictions_are_found_before_anything_is_built():
    given = config(DATA)
    given["Evaluators"][0]["val_dataset"]["transform"] = [{"ToTensor": {}}, {"Normalize": {"mean": [0.5, 0.5, 0.5]}}]
    with pytest.raises(
        ConfigError, match=r"Evaluators.0.val_dataset.transform.1.mean has 3 values, and Data.channels is"
    ):
        checked(given, training=False)
    with pytest.raises(ConfigError, match="Data.chanels: DataSettings has no such argument. Did you mean 'channels'?"):
        checked(config({"chanels": 4}), training=False)


def save_run(prefix, data: object) -> None:
    """As much of a run's checkpoint as tells its configuration."""
    prefix.parent.mkdir(exist_ok=True)
    prefix.with_name(f"{prefix.name}.pdparams").write_bytes(b"")
    text = to_yaml(config(data))
    write({"config": text, "step": 1, "checksums": {}}, prefix.with_name(f"{prefix.name}{STATES}"))


@pytest.mark.smoke
@pytest.mark.parametrize("key", ["pretrained_model", "checkpoint"])
def test_it_is_taken_from_the_run_that_a_run_starts_from(key, tmp_path, caplog):
    save_run(tmp_path / "run/latest", DATA)
    with caplog.at_level(logging.INFO, "passl"):
        given = config()
        settings = GlobalSettings(**{key: str(tmp_path / "run/latest")})
        found, source = data_section.complete(given, given, settings, tmp_path)
    assert found["DataLoader"]["Train"]["dataset"]["channels"] == 4
    assert source["Data"] == DATA  # it is saved with this run too
    assert "Data" not in source["DataLoader"]["Train"]["dataset"]["transform"]
    shown = "{channels: 4, mean: [0.1, 0.2, 0.3, 0.4], std: [1.0, 2.0, 3.0, 4.0]}"
    assert caplog.messages == [f"Data: {shown}, as in the run {tmp_path / 'run/latest'}"]


def test_auto_means_the_folder_of_the_run(tmp_path):
    assert complete(config(), tmp_path / "run", checkpoint="auto") == config()
    save_run(tmp_path / "run/latest", DATA)
    assert complete(config(), tmp_path / "run", checkpoint="auto")["Data"] == DATA


def test_what_the_configuration_says_counts_and_the_difference_is_named(tmp_path, caplog):
    save_run(tmp_path / "run/latest", DATA)
    own = {"channels": 2, "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    found = complete(config(own), tmp_path, pretrained_model=str(tmp_path / "run/latest"))
    assert found["Model"]["backbone"]["in_chans"] == 2
    assert "as the configuration says, and not as in the run" in caplog.text


def test_a_damaged_run_is_left_to_who_loads_it(tmp_path, caplog):
    save_run(tmp_path / "run/latest", DATA)
    (tmp_path / f"run/latest{STATES}").write_bytes(b"nothing")
    assert complete(config(), tmp_path, pretrained_model=str(tmp_path / "run/latest")) == config()
    assert "no section Data can be taken from it" in caplog.text


def test_transforms_whose_mean_is_one_number_get_nothing(tmp_path, monkeypatch):
    from passl.registry import TRANSFORMS

    class Noise:
        def __init__(self, mean: float = 0.0, std: float = 0.1) -> None:
            pass

    monkeypatch.setitem(TRANSFORMS._builders, "Noise", Noise)
    given = config(DATA)
    given["DataLoader"]["Train"]["dataset"]["transform"] = [{"Noise": {}}, {"ToTensor": {}}]
    found = complete(given, tmp_path)["DataLoader"]["Train"]["dataset"]["transform"]
    assert found[0] == {"name": "Noise"}


@pytest.mark.smoke
def test_arrays_reach_the_batches(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", rng.random((20, 30, 4)))
    given = config(DATA)
    given["DataLoader"]["Train"]["dataset"]["root"] = str(tmp_path / "images")
    given["DataLoader"]["Train"]["loader"] = {"num_workers": 0}
    loader = build.train_loader(complete(given, tmp_path), seed=0)
    batch = next(iter(loader.iterate(0, 1)))
    assert batch["global_crops"].shape == (4, 4, 224, 224)
