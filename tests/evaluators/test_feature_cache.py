"""Features of linear probes, kept on disk."""

from __future__ import annotations

import logging
import os

import numpy as np
import paddle
import pytest

from passl import checkpoint
from passl.data.datasets import ImageFolder
from passl.data.transforms import Compose, RandomHorizontalFlip, ToTensor
from passl.evaluators import LinearSweep, evaluate
from passl.evaluators import frozen_features as frozen
from passl.evaluators.frozen_features import FeatureChoice, FrozenFeatures
from passl.models import VisionTransformer
from tests.engine import tiny
from tests.evaluators.sweeps import Arrays, sweep, untrained


@pytest.fixture
def folder(tmp_path):
    tiny.write_images(tmp_path, size=16)
    return tmp_path


@pytest.fixture
def backbone():
    return untrained()


@pytest.fixture
def counted(monkeypatch):
    """How often a data set went through the backbone."""
    calls = []
    original = frozen.map_dataset
    monkeypatch.setattr(frozen, "map_dataset", lambda *args, **kw: calls.append(args[3]) or original(*args, **kw))
    return calls


@pytest.mark.smoke
def test_a_second_probe_does_not_see_the_images(folder, backbone, counted):
    first = evaluate(sweep(folder, cache=True), backbone, folder)
    assert len(counted) == 2
    assert len(list((folder / "feature_cache").iterdir())) == 2
    assert evaluate(sweep(folder, cache=str(folder / "feature_cache")), backbone, folder / "other") == first
    fewer = evaluate(sweep(folder, cache=True, n_last_blocks=1, avgpool=False), backbone, folder)
    assert len(counted) == 2
    assert fewer["linear_top1_n1"] == first["linear_top1_n1"]
    evaluate(sweep(folder, cache=True, n_last_blocks=2, avgpool=False), backbone, folder)
    assert len(counted) == 2
    evaluate(sweep(folder), backbone, folder)
    assert len(counted) == 4, "only where asked"


def test_what_makes_features_stale(folder, backbone, counted):
    cache = str(folder / "cache")
    evaluate(sweep(folder, cache=cache), backbone, folder)

    def computed(network=backbone, **arguments) -> int:
        counted.clear()
        evaluate(sweep(folder, cache=cache, **arguments), network, folder)
        return len(counted)

    assert computed() == 0
    assert computed(transform=Compose([ToTensor(), ToTensorTwice()])) == 2
    assert computed(transform=Compose([ToTensor(), ToTensorTwice(3)])) == 2
    assert computed(transform=Compose([ToTensor(), ToTensorTwice(4).__call__])) == 2
    assert computed(transform=Compose([ToTensor(), ToTensorTwice(5).__call__])) == 2, "a method is its object's"
    other = VisionTransformer(16, 8, embed_dim=12, depth=3, num_heads=3)  # the same weights in other heads
    other.set_state_dict(backbone.state_dict())
    other.eval()
    assert computed(other) == 2
    image = folder / "val/class0/0.png"
    os.utime(image, ns=(1, 1))
    assert computed() == 1
    (folder / "val/class0/0.png").rename(folder / "val/class0/00.png")
    assert computed() == 1
    backbone.norm.bias.set_value(backbone.norm.bias + 1e-6)
    assert computed() == 2
    assert computed() == 0


class ToTensorTwice:
    def __init__(self, factor=2):
        self.factor = factor

    def __call__(self, array, rng=None):
        return array * self.factor


def test_random_transforms_and_samples_without_files_are_not_kept(folder, backbone, counted, caplog):
    transform = Compose([RandomHorizontalFlip(), ToTensor()])
    with caplog.at_level(logging.INFO, "passl"):
        evaluate(sweep(folder, transform=transform, cache=True), backbone, folder)
    assert "the transform is random, so features are not kept" in caplog.text
    assert not (folder / "feature_cache").exists()
    arrays = Arrays(np.zeros((3, 3, 16, 16), np.float32), [0, 1, 2])
    evaluate(LinearSweep(arrays, arrays, n_last_blocks=1, epochs=1, cache=True), backbone, folder)
    assert "features are not kept: the samples of Arrays are no files" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "pickle", "other"])
def test_damaged_files_are_computed_anew(folder, backbone, counted, caplog, damage):
    first = evaluate(sweep(folder, cache=True), backbone, folder)
    for path in (folder / "feature_cache").iterdir():
        content = bytearray(path.read_bytes())
        if damage == "cut":
            content = content[: len(content) // 2]
        elif damage == "bit":
            content[len(content) // 3] ^= 1
        elif damage == "text":
            content = b"features"
        if damage in ("cut", "bit", "text"):
            path.write_bytes(content)
        else:
            rows = np.array([{}], object) if damage == "pickle" else np.zeros(3, np.float32)
            with path.open("wb") as file:
                np.savez(file, rows=rows, labels=np.zeros(3))
    counted.clear()
    assert evaluate(sweep(folder, cache=True), backbone, folder) == first
    assert len(counted) == 2
    assert caplog.text.count("computed anew") == 2
    counted.clear()
    assert evaluate(sweep(folder, cache=True), backbone, folder) == first
    assert not counted


def test_the_key_is_that_of_another_process(folder, backbone):
    """Layers are numbered by process, and a forward leaves its marks on them."""
    checkpoint.write(dict(backbone.state_dict()), folder / "w.pdparams")
    code = f"""
import paddle
from passl import checkpoint
from passl.data.datasets import ImageFolder
from passl.data.transforms import ToTensor
from passl.evaluators import fingerprint
from passl.models import VisionTransformer
for _ in range(2):
    network = VisionTransformer(16, 8, embed_dim=12, depth=3, num_heads=2)
checkpoint.load_weights(network, checkpoint.read_weights({str(folder / "w")!r}))
print(fingerprint.of_network(network), fingerprint.of_data(ImageFolder({str(folder / "val")!r}, ToTensor())))
network(paddle.zeros([1, 3, 16, 16]))
network.eval()
print(fingerprint.of_network(network))
"""
    done = tiny.run(code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.split()[0] == second
    dataset = ImageFolder(folder / "val", ToTensor())
    assert first.split() == [frozen.fingerprint.of_network(backbone), frozen.fingerprint.of_data(dataset)]


def test_settings_in_lists_are_the_networks():
    keys = []
    for stride in (1, 2):
        paddle.seed(0)
        keys.append(frozen.fingerprint.of_network(paddle.nn.Conv2D(3, 4, 3, stride=stride)))
    assert keys[0] != keys[1]


def test_columns_of_a_probe():
    rows = np.arange(2 * 12, dtype=np.float32).reshape(2, 12)  # three blocks and a mean, 3 wide each
    found = FrozenFeatures(rows, np.zeros(2, int), 3, True)
    assert found.of(FeatureChoice(2, False))[0].tolist() == [3, 4, 5, 6, 7, 8]
    assert found.of(FeatureChoice(2, True))[0].tolist() == [3, 4, 5, 6, 9, 7, 10, 8, 11]
