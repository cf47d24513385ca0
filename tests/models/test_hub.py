"""passl.models.hub and hubconf.py: the official models by name."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from passl import convert
from passl.checkpoint import CheckpointError
from passl.convert import save_torch
from passl.convert.layout import slots
from passl.download import DownloadError
from passl.models import hub, vit_small
from passl.models.dinov2 import dinov2_vit_small

ROOT = Path(__file__).parent.parent.parent
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if re.search("vit[bl]|medium", name) else [])
    for name in hub.OFFICIAL
    if "vitg" not in name  # which would fill gigabytes
]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """The state of a ViT-S/16."""
    return {name: tensor.numpy() for name, tensor in vit_small(patch_size=16).state_dict().items()}


@pytest.fixture
def converted(monkeypatch, weights) -> SimpleNamespace:
    """What every file is found to hold; `read` lists the files."""
    backbone = SimpleNamespace(name="vit_small", arguments={"patch_size": 16}, state=weights, read=[])

    def read_backbone(path: Path, checkpoint_key: str) -> SimpleNamespace:
        backbone.read.append((path, checkpoint_key))
        return backbone

    monkeypatch.setattr(convert, "read_backbone", read_backbone, raising=False)
    return backbone


@pytest.fixture
def official(server, reference, monkeypatch):
    """The server has the official file of dino_vits16, as far as its format goes."""
    server.content = (reference / "vit_p16_backbone.pth").read_bytes()
    server.announced = len(server.content)
    model = hub.OFFICIAL["dino_vits16"]
    address = server.address(model.address.rsplit("/", 1)[-1])
    monkeypatch.setitem(hub.OFFICIAL, "dino_vits16", model._replace(address=address))
    return server


def assert_has(model: paddle.nn.Layer, state: dict[str, np.ndarray]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(loaded[name].numpy(), value, err_msg=name)


# --- the names ---


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_its_backbone(name):
    model = getattr(hub, name)()
    kind = "ResNet" if "resnet" in name else "XCiT" if "xcit" in name else "VisionTransformer"
    assert type(model).__name__ == kind
    if kind != "ResNet":
        assert model.patch_embed.patch_size == int(re.search(r"(8|14|16)(_reg)?$", name)[1])
    if "dinov2" in name:
        registers = 4 if name.endswith("_reg") else 0
        assert model.num_prefix_tokens == 1 + registers
        assert list(model.pos_embed.shape) == [1, 1 + 37**2, model.embed_dim]
        assert model.pos_embed_mode == ("antialias" if registers else "scale")
    stated = re.match(r".* \(D = (\d+), (\d+) M parameters", hub.OFFICIAL[name].summary)
    assert model.embed_dim == int(stated[1])
    assert sum(parameter.size for parameter in model.parameters()) / 1e6 == pytest.approx(int(stated[2]), abs=0.9)


@pytest.mark.smoke
@pytest.mark.parametrize("name", hub.OFFICIAL)
def test_every_name_says_what_it_is(name):
    function = getattr(hub, name)
    assert function.__name__ == name
    assert function.__doc__.startswith(hub.OFFICIAL[name].summary)
    assert [(p.name, p.default) for p in inspect.signature(function).parameters.values()] == [
        ("pretrained", False),
        ("checkpoint_key", "teacher"),
        ("cache_dir", None),
    ]


@pytest.mark.smoke
def test_files_have_their_official_addresses():
    def address(stem: str) -> str:
        return f"https://dl.fbaipublicfiles.com/dino/{stem}/{stem}.pth"

    old_stems = {"vits16": "deitsmall16", "vits8": "deitsmall8", "vitb16": "vitbase16", "vitb8": "vitbase8"}
    for name, model in hub.OFFICIAL.items():
        short = name.partition("_")[2]
        if name.startswith("dinov2_"):
            folder = name.replace("_reg", "")
            file = name.replace("_reg", "_reg4")
            assert model.address == f"https://dl.fbaipublicfiles.com/dinov2/{folder}/{file}_pretrain.pth"
            continue
        assert model.address == address(f"dino_{old_stems.get(short, short)}_pretrain")
    assert hub.dino_deits16 is hub.dino_vits16
    assert hub.dino_deits8 is hub.dino_vits8


def test_the_documentation_says_the_same():
    lines = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8").splitlines()
    for name, model in hub.OFFICIAL.items():
        (row,) = [line.split(" | ") for line in lines if f"| `{name}` |" in line]
        knn, linear = re.search(r"k-NN (.*) %, linear (.*) %", model.summary).groups()
        assert [row[-2], row[-1].rstrip(" |")] == [knn, linear]
        prefix = row[3].strip("`")
        assert model.address.endswith(f"/{prefix}.pth")
        assert sum(f"[backbone]({model.address})" in line for line in lines) == 1


@pytest.mark.smoke
def test_importing_the_models_does_not_import_the_converter():
    program = (
        "import sys, passl.models; print(*sorted(m for m in sys.modules if m in ('passl.convert', 'passl.models.hub')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


# --- the weights ---


def test_an_official_file_is_converted(server, weights, tmp_path, monkeypatch):
    shapes = slots(vit_small(patch_size=16))
    save_torch({slot.torch_name: slot.to_torch(weights[slot.name]) for slot in shapes}, tmp_path / "official.pth")
    server.content = (tmp_path / "official.pth").read_bytes()
    server.announced = len(server.content)
    model = hub.OFFICIAL["dino_vits16"]
    monkeypatch.setitem(hub.OFFICIAL, "dino_vits16", model._replace(address=server.address("official.pth")))
    assert_has(hub.dino_vits16(pretrained=True, cache_dir=tmp_path / "cache"), weights)
    assert_has(hub.dino_vits16(pretrained=tmp_path / "official"), weights)
    with pytest.raises(ValueError, match=r"holds vit_small\(patch_size=16\), .* dino_vits8: use dino_vits16"):
        hub.dino_vits8(pretrained=tmp_path / "official.pth")


@pytest.mark.parametrize("registers", [0, 4])
def test_a_file_of_dinov2_is_converted(tmp_path, registers):
    """As published: with a mask token, positions of 518 pixels, LayerScale; with or without registers."""
    paddle.seed(0)
    model = dinov2_vit_small(num_register_tokens=registers)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert "mask_token" in state
    save_torch({slot.torch_name: slot.to_torch(state[slot.name]) for slot in slots(model)}, tmp_path / "official.pth")
    right, wrong = hub.dinov2_vits14, hub.dinov2_vits14_reg
    if registers:
        right, wrong = wrong, right
    assert_has(right(pretrained=tmp_path / "official.pth"), state)
    with pytest.raises(ValueError, match=f"which does not fit {wrong.__name__}: use {right.__name__}$"):
        wrong(pretrained=tmp_path / "official.pth")


@pytest.mark.smoke
def test_official_weights_are_downloaded_once(official, converted, weights, tmp_path):
    assert_has(hub.dino_vits16(pretrained=True, cache_dir=tmp_path), weights)
    file = tmp_path / "dino_deitsmall16_pretrain.pth"
    assert file.read_bytes() == official.content
    official.status = 404
    assert_has(hub.dino_deits16(True, "student", str(tmp_path)), weights)
    assert converted.read == [(file, "teacher"), (file, "student")]
    assert official.requests == ["/folder/dino_deitsmall16_pretrain.pth"]


def test_the_cache_is_in_the_home_folder(official, converted, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    hub.dino_vits16(pretrained=True)
    cached = tmp_path / ".cache" / "passl" / "hub" / "dino_deitsmall16_pretrain.pth"
    assert [path for path, _ in converted.read] == [cached]
    hub.dino_vits16(pretrained=True, cache_dir="~/other")
    assert converted.read[1][0] == tmp_path / "other" / "dino_deitsmall16_pretrain.pth"


@pytest.mark.smoke
def test_without_a_network_the_error_says_what_to_do(official, converted, weights, tmp_path):
    official.shutdown()
    official.server_close()
    with pytest.raises(DownloadError) as caught:
        hub.dino_vits16(pretrained=True, cache_dir=tmp_path)
    address = hub.OFFICIAL["dino_vits16"].address
    assert str(caught.value).startswith(f"{address} could not be downloaded (")
    assert str(caught.value).endswith(
        f"Fetch it where there is a network, and put it at {tmp_path / 'dino_deitsmall16_pretrain.pth'}; "
        "or name your copy of it: dino_vits16(pretrained='/path/to/file')"
    )
    assert caught.value.__suppress_context__
    # What it says works.
    (tmp_path / "dino_deitsmall16_pretrain.pth").write_bytes(official.content)
    assert_has(hub.dino_vits16(pretrained=True, cache_dir=tmp_path), weights)


@pytest.mark.smoke
def test_a_page_in_place_of_weights_is_not_kept(official, tmp_path):
    official.content = b"<!DOCTYPE html><title>Log in</title>"
    official.announced = len(official.content)
    with pytest.raises(
        DownloadError, match="could not be downloaded .*not a file of PyTorch: it starts with b'<!DOCTYPE"
    ):
        hub.dino_vits16(pretrained=True, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_download_is_not_kept(official, tmp_path):
    damaged = bytearray(official.content)
    damaged[len(damaged) // 2] ^= 1
    official.content = bytes(damaged)
    with pytest.raises(DownloadError, match="could not be downloaded"):
        hub.dino_vits16(pretrained=True, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_file_that_changed_is_refused(official, converted, tmp_path):
    hub.dino_vits16(pretrained=True, cache_dir=tmp_path)
    file = tmp_path / "dino_deitsmall16_pretrain.pth"
    file.write_bytes(official.content[:-1])
    with pytest.raises(DownloadError, match="is damaged or was replaced.* or name your copy of it"):
        hub.dino_vits16(pretrained=True, cache_dir=tmp_path)
    assert len(converted.read) == 1


@pytest.mark.smoke
def test_weights_of_a_file(converted, weights, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_has(hub.dino_vits16(pretrained="~/my/run"), weights)
    assert_has(hub.dino_vits16(pretrained=Path("run.pth"), checkpoint_key="student"), weights)
    assert converted.read == [(tmp_path / "my" / "run", "teacher"), (Path("run.pth"), "student")]


def test_an_argument_at_its_default_makes_no_difference(converted, weights):
    converted.arguments = {"img_size": 224, "patch_size": 16, "pos_embed_mode": "scale"}
    assert_has(hub.dino_vits16(pretrained="x.pth"), weights)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        ("vit_small", {"patch_size": 8}, "vit_small(patch_size=8), which does not fit dino_vits16: use dino_vits8"),
        ("resnet50", {}, "resnet50(), which does not fit dino_vits16: use dino_resnet50"),
        (
            "vit_small",
            {"patch_size": 16, "pos_embed_mode": "size"},
            "vit_small(patch_size=16, pos_embed_mode='size'), which does not fit dino_vits16: no official model is "
            "one; name that backbone in a configuration, and the file as Global.pretrained_model",
        ),
    ],
)
def test_another_architecture_is_named(converted, backbone, arguments, message):
    converted.name, converted.arguments = backbone, arguments
    with pytest.raises(ValueError) as caught:
        hub.dino_vits16(pretrained="mine.pth")
    assert str(caught.value) == f"mine.pth holds {message}"


def test_an_argument_at_its_default_is_named_where_it_matters(converted):
    converted.arguments = {}
    with pytest.raises(
        ValueError, match=re.escape("vit_small(patch_size=16), which does not fit dino_vits8: use dino_vits16")
    ):
        hub.dino_vits8(pretrained="mine.pth")


def test_missing_weights_are_an_error(converted, weights):
    converted.state = {name: value for name, value in weights.items() if name != "norm.bias"}
    with pytest.raises(
        CheckpointError, match="mine.pth does not fit VisionTransformer: .*missing in the file: norm.bias"
    ):
        hub.dino_vits16(pretrained="mine.pth")


@pytest.mark.parametrize("value", [None, 1, b"file.pth"])
def test_pretrained_is_checked(value):
    with pytest.raises(
        TypeError, match=re.escape(f"pretrained ({value!r}) must be True, False, or the path of a file")
    ):
        hub.dino_vits16(pretrained=value)


# --- paddle.hub ---


@pytest.mark.smoke
def test_paddle_hub_finds_the_models(tmp_path, converted, weights):
    names = [name for name in vars(hub) if name.startswith(("dino_", "dinov2_"))]
    assert sorted(paddle.hub.list(str(ROOT), source="local")) == sorted(names)
    assert len(names) == len(hub.OFFICIAL) + 2
    assert paddle.hub.help(str(ROOT), "dino_deits8", source="local").startswith("ViT-S/8 (D = 384")
    model = paddle.hub.load(str(ROOT), "dino_vits16", source="local", pretrained=False)
    assert model(paddle.zeros([1, 3, 32, 32])).shape == [1, 384]
    model = paddle.hub.load(str(ROOT), "dino_vits16", source="local", pretrained=str(tmp_path / "x.pth"))
    assert_has(model, weights)


@pytest.mark.smoke
def test_paddle_hub_works_from_a_checkout_that_is_not_installed(tmp_path):
    program = (
        f"import paddle; model = paddle.hub.load({str(ROOT)!r}, 'dino_vits8', source='local');"
        "print(type(model).__name__, model.patch_embed.patch_size)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["VisionTransformer", "8"], done.stderr
