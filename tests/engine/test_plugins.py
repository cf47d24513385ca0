"""Backbones of the user's own in a configuration."""

from __future__ import annotations

import pytest

from passl.config import ConfigError
from passl.engine.plugins import load_plugins
from tests.engine import tiny

PLUGIN = """
from paddle import nn
from passl.registry import BACKBONES

@BACKBONES.register()
class TwoConvolutions(nn.Layer):
    def __init__(self, width: int = 8):
        super().__init__()
        self.embed_dim = width
        self.layers = nn.Sequential(
            nn.Conv2D(3, width, 3, 2), nn.ReLU(), nn.Conv2D(width, width, 3), nn.AdaptiveAvgPool2D(1), nn.Flatten()
        )

    def forward(self, images):
        return self.layers(images)
"""


def test_a_layer_with_embed_dim_trains_and_is_probed(tmp_path):
    tiny.write_images(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    tiny.write_config(tmp_path, tiny.PROBE, "probe.yaml")
    mine = tiny.overrides(
        Global__plugins=f"[{tmp_path / 'mine.py'}]",
        Model__backbone="{name: TwoConvolutions, width: 6}",
        Global__max_train_step=2,
    )
    trained = tiny.run(tiny.TRAIN, "-c", tmp_path / "pretrain.yaml", *mine)
    assert trained.returncode == 0, trained.stderr
    weights = tiny.overrides(Global__pretrained_model=tmp_path / "out/DINO/latest")
    probed = tiny.run(tiny.TRAIN, "-c", tmp_path / "probe.yaml", *mine, *weights)
    assert probed.returncode == 0, probed.stderr
    assert "4 of 4 keys matched" in probed.stderr

    misspelt = tiny.overrides(Model__backbone__widht=3)
    refused = tiny.run(tiny.TRAIN, "-c", tmp_path / "pretrain.yaml", *mine, *misspelt, "--check")
    assert refused.returncode == 2
    assert "TwoConvolutions has no such argument. Did you mean 'width'?" in refused.stderr


BATCH_PLUGIN = """
import numpy as np
from passl.registry import BATCH_TRANSFORMS

@BATCH_TRANSFORMS.register()
class Noise:
    def __init__(self, std: float = 0.1) -> None:
        self.std = std

    def __call__(self, arrays, rng):
        crops = arrays["global_crops"]
        return {**arrays, "global_crops": crops + self.std * rng.standard_normal(crops.shape, np.float32)}
"""


def test_a_batch_transform(tmp_path):
    """In the weights to the last bit, in micro-batches: with workers, and after a restart in the middle of an epoch."""
    tiny.write_images(tmp_path)
    (tmp_path / "mine.py").write_text(BATCH_PLUGIN)
    config = tiny.write_config(tmp_path, tiny.PRETRAIN, "pretrain.yaml")
    common = {
        "Global__plugins": f"[{tmp_path / 'mine.py'}]",
        "Global__accum_steps": 2,
        "Global__epochs": 1,
        "DataLoader__Train__sampler__drop_last": "false",
    }

    def train(name, batch_transform, *flags, **more):
        values = {**common, **more, "Global__name": name, "DataLoader__Train__batch_transform": batch_transform}
        return tiny.run(tiny.TRAIN, "-c", config, *tiny.overrides(**values), *flags)

    noise = "{name: Noise, std: 0.5}"
    cut = {"Global__max_train_step": 2, "DataLoader__Train__loader__num_workers": 2}
    whole = [train("whole", noise), train("without", "null"), train("cut", noise, **cut)]
    for done in [*whole, train("cut", noise, Global__checkpoint="auto")]:
        assert done.returncode == 0, done.stderr
    latest = tmp_path / "out/whole/latest"
    tiny.assert_same_checkpoint(latest, tmp_path / "out/cut/latest")
    with pytest.raises(AssertionError):
        tiny.assert_same_checkpoint(latest, tmp_path / "out/without/latest")
    refused = train("whole", "{name: Noise, sdt: 1}", "--check")
    assert refused.returncode == 2
    assert "DataLoader.Train.batch_transform.sdt: Noise has no such argument. Did you mean 'std'?" in refused.stderr


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ("mine.py", "Global.plugins: must be a list of Python files or modules, got 'mine.py'"),
        (["gone.py"], "Global.plugins: gone.py: FileNotFoundError"),
        (["no_such_module"], "Global.plugins: no_such_module: ModuleNotFoundError"),
        (["{folder}/broken.py"], "broken.py: ZeroDivisionError"),
    ],
)
def test_a_plugin_that_cannot_be_imported(tmp_path, plugins, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    if isinstance(plugins, list):
        plugins = [name.format(folder=tmp_path) for name in plugins]
    with pytest.raises(ConfigError, match=message):
        load_plugins({"Global": {"plugins": plugins}})
