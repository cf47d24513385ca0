"""passl-visualize attention: files in, files out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from passl.cli import visualize_main
from passl.data.image_io import read_rgb
from tests.visualize.test_attention import recorded_jobs

pytestmark = pytest.mark.smoke


def attention(*arguments):
    visualize_main(["attention", "--device", "cpu", *map(str, arguments)])


SMALL = ("--arch", "VisionTransformer", "--set", "embed_dim=12", "--set", "depth=2", "--set", "num_heads=2",
         "--patch_size", 8, "--set", "img_size=32", "--image_size", 32, 48)  # fmt: skip


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, [40, 60, 3]).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def error_of(capsys, code, *arguments):
    with pytest.raises(SystemExit) as stopped:
        attention(*arguments)
    assert stopped.value.code == code
    return capsys.readouterr().err


def test_the_official_files(reference, tmp_path):
    """By the recorded command lines; the architecture is that of the recorded weights."""
    recorded = np.load(reference / "visualize_attention.npz")
    for job, meta, _ in recorded_jobs(reference):
        argv, output = meta["argv"], tmp_path / job
        start = argv.index("--arch")
        options = argv[:start] + argv[start + 2 :]
        heads = f"num_heads={meta['arch']['num_heads']}"
        attention("--image_path", reference / "viz_image.png", "--pretrained_weights", reference / meta["weights"],
                  "--set", heads, *options, "--output_dir", output)  # fmt: skip
        extra = {"overview.png"} | ({"boxes.json"} if "--threshold" in argv else set())
        assert set(names_in(output)) == set(meta["files"]) | extra
        height, width = recorded[f"{job}/shape"][-2:]
        assert Image.open(output / "img.png").size == (width, height)
        if f"{job}/png_head0_rgba" in recorded:
            assert np.array_equal(Image.open(output / "attn-head0.png"), recorded[f"{job}/png_head0_rgba"])
            assert np.array_equal(Image.open(output / "img.png"), recorded[f"{job}/png_img_rgb"])
        if f"{job}/mask_maps" in recorded:
            image = np.asarray(Image.open(output / "img.png"))
            patch = meta["arch"]["patch_size"]
            for path, mask in zip(sorted(output.glob("mask_*")), recorded[f"{job}/mask_maps"]):
                drawn = (np.asarray(Image.open(path)) != image).any(2)
                assert (drawn != mask).sum() <= 1.1 * patch**2


def test_boxes_are_of_the_original_image(photo, tmp_path):
    attention("--image", photo, "--boxes", "--output_dir", tmp_path / "out", *SMALL)
    content = json.loads((tmp_path / "out/boxes.json").read_text())
    assert content["original_size"] == [40, 60]
    assert content["size"] == [32, 48]
    assert content["threshold"] == 0.6
    assert list(content["boxes"]) == ["head0", "head1", "mean"]
    for found in content["boxes"].values():
        assert [one["patches"] for one in found] == sorted((one["patches"] for one in found), reverse=True)
        for one in found:
            assert np.allclose(one["original_box"], np.array(one["box"]) * ([60 / 48, 40 / 32] * 2), atol=0.01)


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (("--head", "mean", "--threshold", "0.5"), ["attn-mean.png", "boxes.json", "img.png", "mask_th0.5_mean.png"]),
        (("--head", "1", "--layer", "0"), ["attn-head1.png", "img.png"]),
        (("--rollout",), ["attn-rollout.png", "img.png"]),
        (("--point", "59,39"), ["img.png", "similarity.png"]),
        (("--similarity", "--layer", "-2"), ["img.png", "similarity.png"]),
    ],
)
def test_what_is_written(photo, tmp_path, options, files):
    attention("--image", photo, "--output_dir", tmp_path / "out", *SMALL, *options)
    assert names_in(tmp_path / "out") == sorted([*files, "overview.png"])


@pytest.mark.parametrize("network", [("--arch", "resnet18"), ("--arch", "xcit_nano_12_p16")])
def test_similarity_in_any_network(photo, tmp_path, network):
    attention("--image", photo, "--point", "0.9,0.1", "--image_size", 64, "--output_dir", tmp_path, *network)
    assert Image.open(tmp_path / "similarity.png").size == (96, 64)


OWN = """
from paddle import nn
from passl.registry import BACKBONES

@BACKBONES.register()
class Own(nn.Layer):
    embed_dim = 6

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2D(in_chans, 6, 7, stride=7)

    def feature_map(self, images):
        return self.conv(images)

    def forward(self, images):
        return self.conv(images).mean([2, 3])

@BACKBONES.register()
class Bare(Own):
    feature_map = None
"""


def test_networks_of_ones_own(photo, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    config = tmp_path / "own.yaml"
    config.write_text(f"Global: {{plugins: [{tmp_path / 'own.py'}]}}\nModel: {{name: Own}}\n")
    attention("--image", photo, "--similarity", "-c", config, "--image_size", 50, 70, "--output_dir", tmp_path / "out")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "out/similarity.png"))[0, :, 0])) > 2
    error = error_of(capsys, 2, "--image", photo, "--similarity", "-c", config, "-o", "Model.name=Bare")
    assert "Bare shows no features of patches: give it a method feature_map(images) -> [B, D, h, w]" in error
    assert "get_last_selfattention(images) -> [B, heads, 1+N, 1+N]" in error_of(
        capsys, 2, "--image", photo, "-c", config
    )


def test_images_of_five_channels(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random([40, 48, 5]).astype(np.float32))
    config = tmp_path / "five.yaml"
    config.write_text(
        "Data: {channels: 5, mean: [0.5, 0.5, 0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2, 0.2, 0.2]}\n"
        "Model: {name: VisionTransformer, in_chans: 5, patch_size: 8, img_size: 32, embed_dim: 12, depth: 1,"
        " num_heads: 2}\n"
    )
    attention("--image", tmp_path / "a.npy", "-c", config, "--image_size", 40, 48, "--output_dir", tmp_path / "out")
    assert Image.open(tmp_path / "out/img.png").size == (48, 40)
    assert Image.open(tmp_path / "out/overview.png").mode == "RGB"


@pytest.mark.parametrize(
    "network",
    [
        ("--arch", "xcit_nano_12_p16", "--layer", "0"),
        ("--arch", "dinov2_vit_small", "--set", "num_register_tokens=4", "--set", "img_size=28"),
    ],
)
def test_attention_of_other_transformers(photo, tmp_path, network):
    attention("--image", photo, "--image_size", "64x100", "--output_dir", tmp_path / "out", *network)
    patch = 16 if "xcit" in network[1] else 14
    width, height = Image.open(tmp_path / "out/attn-head3.png").size
    assert (height, width) == (64 // patch * patch, 100 // patch * patch)


def test_attention_of_a_network_without(photo, capsys):
    error = error_of(capsys, 2, "--image", photo, "--arch", "resnet18", "--image_size", "64")
    assert "ResNet has no [CLS] token that attends to patches" in error
    assert "--similarity, or --point X,Y" in error


def test_folders_of_images(photo, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("a/one.png", "b/one.png", "two.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / name)
    (folder / "bad.png").write_bytes(b"no image")
    error = error_of(capsys, 1, "--image", folder, "--output_dir", tmp_path / "out", *SMALL)
    assert "1 could not be read and are left out:" in error
    assert "bad.png" in error
    assert names_in(tmp_path / "out") == ["one.png", "one.png-2", "two"]
    assert all("overview.png" in names_in(one) for one in (tmp_path / "out").iterdir())


def test_a_point_that_some_images_do_not_have(photo, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    error = error_of(capsys, 1, "--image", tmp_path / "small.png", photo, "--point", "50,30", "--output_dir",
                     tmp_path / "out", *SMALL)  # fmt: skip
    assert "small.png: point (50,30) is outside of the image, which is 20 wide and 20 high" in error
    assert names_in(tmp_path / "out") == ["photo"]


def test_too_little_memory(photo, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise MemoryError("(ResourceExhausted) Fail to alloc memory")

    monkeypatch.setattr("passl.visualize.attention_files.write_attention", full)
    error = error_of(capsys, 2, "--image", photo, "--output_dir", tmp_path, *SMALL)
    assert "--image_size: the memory does not suffice for 32 x 48 pixels" in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--layer", "2"), 2, "layer (2) must be from -2 to 1: there are 2 blocks"),
        (("--head", "2"), 2, "head (2) must be from 0 to 1"),
        (("--head", "one"), 2, "'one' must be all, mean, or a number from 0"),
        (("--threshold", "60"), 2, "'60' must be above 0 and at most 1"),
        (("--rollout", "--head", "0"), 2, "--rollout averages the heads"),
        (("--point", "3,4", "--threshold", "0.6"), 2, "--threshold: of attention"),
        (("--point", "61,4"), 1, "point (61,4) is outside of the image, which is 60 wide and 40 high"),
        (("--point", "61"), 2, "'61' must be X,Y in pixels"),
        (("--image_size", "1", "2", "3"), 2, "--image_size 1 2 3: one number, or height and width"),
        (("--image_size", "4"), 1, "an image of 4 x 6 has no whole patch of 8 pixels"),
        (("--image_size", "9000", "9000"), 1, "40 x 60 pixels, resized to 9000 x 9000, would be 8.1e+07 pixels"),
        (("--cmap", "no"), 2, "--cmap: cmap ('no') must be a colour map of matplotlib"),
    ],
)
def test_errors(photo, tmp_path, capsys, arguments, code, message):
    error = error_of(capsys, code, "--image", photo, "--output_dir", tmp_path, *SMALL, *arguments)
    assert message in error


def test_nothing_to_look_at(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "contains no images" in error_of(capsys, 1, "--image", tmp_path / "empty", *SMALL)
    assert "no such file" in error_of(capsys, 1, "--image", tmp_path / "none.png", *SMALL)
    (tmp_path / "clip.mp4").write_bytes(b"")
    assert "passl-visualize video" in error_of(capsys, 1, "--image", tmp_path / "clip.mp4", *SMALL)
    Image.new("RGB", (5000, 1)).save(tmp_path / "strip.png")
    strip = error_of(capsys, 1, "--image", tmp_path / "strip.png", "--arch", "resnet18", "--image_size", "480")
    assert "1 x 5000 pixels, resized to 480, would be 1.15e+09 pixels: give a smaller size, or HEIGHT WIDTH" in strip


def test_an_image_is_not_overwritten(photo, capsys):
    image = photo.rename(photo.with_name("img.png"))
    before = image.read_bytes()
    error = error_of(capsys, 2, "--image", image, "--output_dir", image.parent, *SMALL)
    assert "img.png would be overwritten, choose another folder" in error
    assert image.read_bytes() == before


def test_the_default_size_is_the_official_one(photo, tmp_path):
    options = SMALL[: SMALL.index("--image_size")]
    attention("--image", photo, "--output_dir", tmp_path / "out", "--patch_size", 32, *options[:-4])
    assert Image.open(tmp_path / "out/img.png").size == (480, 480)
    assert read_rgb(tmp_path / "out/overview.png").width > 480
