"""DINOConf: defaults by version, and every mistake with what to type."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys

import pytest

from passl.data.multi_crop import MultiCrop
from passl.wrapper.conf import NAMES, DINOConf
from passl.yaml_io import ConfigError

pytestmark = pytest.mark.smoke


def test_defaults_by_version():
    shared = {
        "global_crops_number": 2,
        "global_crop_size": 224,
        "local_crops_number": 8,
        "local_crop_size": 96,
        "warmup_teacher_temp": 0.04,
        "len_train_loader": None,
        "epochs": 100,
        "preprocess_func": None,
        "return_layer": None,
    }
    of_version = {
        "v1": {
            "global_crops_scale": (0.4, 1.0),
            "local_crops_scale": (0.05, 0.4),
            "momentum_teacher": 0.996,
            "teacher_temp": 0.04,
            "warmup_teacher_temp_epochs": 0,
        },
        "v2": {
            "global_crops_scale": (0.32, 1.0),
            "local_crops_scale": (0.05, 0.32),
            "momentum_teacher": 0.992,
            "teacher_temp": 0.07,
            "warmup_teacher_temp_epochs": 30,
        },
    }
    assert DINOConf() == DINOConf(version="v1")
    for version, expected in of_version.items():
        conf = DINOConf(version=version)
        for name, value in {**shared, **expected}.items():
            assert getattr(conf, name) == value, name


def test_views_are_those_of_multi_crop_by_default():
    ours = DINOConf().view_arguments()
    official = {name: p.default for name, p in inspect.signature(MultiCrop).parameters.items() if name != "backend"}
    assert ours == official


def test_what_is_given_stays_and_the_rest_follows_the_version():
    conf = DINOConf(teacher_temp=0.05, epochs=10)
    conf.merge({"version": "v2"})
    assert (conf.teacher_temp, conf.momentum_teacher, conf.warmup_teacher_temp_epochs) == (0.05, 0.992, 10)
    conf.teacher_temp = None
    assert conf.teacher_temp == 0.07


def test_blur_is_in_proportion_to_small_crops():
    assert DINOConf().blur_radius == (0.1, 2.0)
    assert DINOConf(global_crop_size=(448, 300)).blur_radius == (0.1, 2.0)
    assert DINOConf(global_crop_size=(56, 112)).blur_radius == (0.025, 0.5)
    assert DINOConf(global_crop_size=56, blur_radius=[0.1, 1.0]).blur_radius == (0.1, 1.0)


def test_load_makes_settings_or_changes_them(tmp_path):
    file = tmp_path / "dino.yaml"
    file.write_text("version: v2\nlocal_crop_size: [48, 64]\nteacher_temp: 5e-2\nreturn_layer: [layer3, layer4]\n")
    loaded = DINOConf.load(file)
    assert (loaded.version, loaded.local_crop_size, loaded.teacher_temp) == ("v2", (48, 64), 0.05)
    assert loaded.return_layer == ("layer3", "layer4")
    conf = DINOConf(epochs=7)
    assert conf.load(str(file)) is conf
    assert (conf.version, conf.epochs) == ("v2", 7)


def test_merge_changes_all_or_nothing():
    conf = DINOConf()
    with pytest.raises(ConfigError):
        conf.merge({"epochs": 3, "teacher_temp": -1})
    assert conf == DINOConf()
    assert conf.merge({"epochs": 3}) is conf
    assert conf.epochs == 3


def test_copies_are_equal_and_independent():
    conf = DINOConf(version="v2", epochs=3)
    for copied in (conf.copy(), copy.deepcopy(conf), pickle.loads(pickle.dumps(conf))):
        assert copied == conf
        copied.epochs = 4
        assert conf.epochs == 3


def test_it_can_be_read_and_printed():
    conf = DINOConf(version="v2", global_crop_size=(48, 64), preprocess_func=len)
    assert repr(conf) == "DINOConf(version='v2', global_crop_size=(48, 64), preprocess_func=<built-in function len>)"
    lines = str(conf).splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert "  global_crop_size: [48, 64]" in lines
    assert "  teacher_temp: 0.07" in lines
    assert "  preprocess_func: len" in lines
    assert list(inspect.signature(DINOConf).parameters) == list(NAMES)


@pytest.mark.parametrize("way", ["constructor", "merge", "yaml", "attribute"])
def test_unknown_names_are_errors_with_a_suggestion(way, tmp_path):
    (tmp_path / "a.yaml").write_text("local_crops_numbr: 3\n")
    ways = {
        "constructor": lambda: DINOConf(local_crops_numbr=3),
        "merge": lambda: DINOConf().merge({"local_crops_numbr": 3}),
        "yaml": lambda: DINOConf.load(tmp_path / "a.yaml"),
        "attribute": lambda: setattr(DINOConf(), "local_crops_numbr", 3),
    }
    with pytest.raises(ConfigError) as caught:
        ways[way]()
    assert "there is no setting 'local_crops_numbr'. Did you mean 'local_crops_number'?" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "v3"}, "version ('v3') must be 'v1' (DINO) or 'v2' (DINOv2)"),
        ({"version": 2}, "version (2) must be 'v1' (DINO) or 'v2' (DINOv2)"),
        ({"global_crops_number": 3}, "global_crops_number (3) must be 2: the loss compares each view"),
        ({"global_crop_size": 0}, "global_crop_size (0) must be a number of pixels, or (height, width)"),
        ({"local_crop_size": (3, 4, 5)}, "local_crop_size ((3, 4, 5)) must be a number of pixels, or (height, width)"),
        ({"local_crop_size": "96"}, "local_crop_size ('96') must be a number of pixels"),
        ({"local_crops_number": -1}, "local_crops_number (-1) must be a whole number of at least 0"),
        ({"local_crops_scale": (0.4, 0.1)}, "local_crops_scale ((0.4, 0.1)) must be (low, high), shares of the image"),
        ({"global_crops_scale": 0.5}, "global_crops_scale (0.5) must be (low, high)"),
        ({"momentum_teacher": 1.5}, "momentum_teacher (1.5) must be a number from 0 to 1"),
        ({"teacher_temp": 0}, "teacher_temp (0) must be a number above 0"),
        ({"epochs": 0}, "epochs (0) must be a whole number of at least 1"),
        ({"epochs": True}, "epochs (True) must be a whole number"),
        ({"epochs": 5, "warmup_teacher_temp_epochs": 6}, "warmup_teacher_temp_epochs (6) must be at most epochs (5)"),
        ({"len_train_loader": 0}, "len_train_loader (0) must be the number of batches in an epoch"),
        ({"preprocess_func": "mean"}, "preprocess_func ('mean') must be a function of the features"),
        ({"return_layer": 4}, "return_layer (4) must be the dotted name of a sublayer"),
        ({"return_layer": []}, "return_layer (()) must be the dotted name of a sublayer"),
        ({"return_layer": ["a", "a"]}, "return_layer (['a', 'a']) must name each sublayer once"),
        ({"koleo_loss_weight": 0.2}, "koleo_loss_weight is a setting of DINOv2: set version='v2', or leave it out"),
        ({"version": "v2", "centering": "mean"}, "centering ('mean') must be 'softmax' or 'sinkhorn'"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "mean and std need one value per channel"),
        ({"flip_prob": 2}, "flip_prob"),
        ({"use_bn": 1}, "use_bn (1) must be True or False"),
    ],
)
def test_values_are_checked(settings, message):
    with pytest.raises(ConfigError) as caught:
        DINOConf(**settings)
    assert message in str(caught.value)


def test_all_mistakes_come_at_once():
    with pytest.raises(ConfigError) as caught:
        DINOConf(epochs=0, teacher_temp=-1)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- version\n", "expected settings such as 'version: v2'"),
        ("version: v1\nversion: v2\n", "line 2"),
        ("teacher_temp: high\n", "teacher_temp ('high') must be a number above 0"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        DINOConf.load(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        DINOConf.load(tmp_path / "none.yaml")


def test_importing_passl_does_not_import_paddle():
    program = "import passl, sys; assert 'paddle' not in sys.modules; passl.DINOConf; passl.DINOWrapper"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("value", [0.5, (), ("a", "b"), (0.5, None)])
def test_mean_and_std_are_lists_of_numbers(value):
    with pytest.raises(
        ConfigError, match=r"mean \(.*\) must be a list of one number for each channel, such as \[0.5\]"
    ):
        DINOConf(mean=value)
