"""passl-visualize pca"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.cli import visualize_main
from passl.cli.visualize.pca import output_names

NETWORKS = {
    "vit": ["--arch", "VisionTransformer", "--set", "embed_dim=12", "--set", "depth=2", "--set", "num_heads=2",
            "--set", "img_size=32", "--patch_size", "8"],
    "dinov2": ["--arch", "dinov2_vit_small", "--set", "num_register_tokens=4", "--image_size", "28"],
    "xcit": ["--arch", "xcit_nano_12_p8"],
    "resnet": ["--arch", "resnet18", "--image_size", "64"],
}  # fmt: skip


def write_images(folder, sizes):
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        noise = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        noise.resize((width, height)).save(folder / f"{number}.png")


def run(*arguments):
    visualize_main(["pca", "--device", "cpu", *map(str, arguments)])


def opened(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("more", [[], ["--foreground", "--upsample", "smooth"]])
def test_any_network_and_size(name, more, tmp_path):
    write_images(tmp_path / "in", [(40, 33), (64, 32)])
    run("--images", tmp_path / "in", "--output_dir", tmp_path / "out", *NETWORKS[name], *more)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0_pca.png", "1_pca.png", "overview.png"]
    height, width = opened(tmp_path / "out/1_pca.png").shape[:2]
    assert width == 2 * height
    assert len(np.unique(opened(tmp_path / "out/1_pca.png").reshape(-1, 3), axis=0)) > 2


def test_registers_are_no_patches(tmp_path):
    write_images(tmp_path / "in", [(32, 32)])
    registers = ["--arch", "dinov2_vit_small", "--set", "num_register_tokens=4", "--image_size", "42", "28"]
    run("--images", tmp_path / "in", "--output_dir", tmp_path, *registers)
    picture = opened(tmp_path / "0_pca.png")
    assert picture.shape == (42, 28, 3)
    blocks = picture.reshape(3, 14, 2, 14, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_the_same_pictures_again_and_in_any_order(tmp_path):
    write_images(tmp_path / "in", [(40, 33), (64, 32), (32, 32)])
    files = sorted((tmp_path / "in").iterdir())
    for name, images in (("a", [tmp_path / "in"]), ("b", files[::-1]), ("c", [*files, files[0]])):
        run("--images", *images, "--output_dir", tmp_path / name, *NETWORKS["vit"], "--batch_size", 2)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()


def test_colours_of_each_image_alone(tmp_path):
    write_images(tmp_path / "in", [(40, 33), (64, 32)])
    run("--images", tmp_path / "in", "--output_dir", tmp_path / "both", *NETWORKS["vit"], "--per_image")
    run("--images", tmp_path / "in/0.png", "--output_dir", tmp_path / "one", *NETWORKS["vit"])
    run("--images", tmp_path / "in", "--output_dir", tmp_path / "joint", *NETWORKS["vit"])
    one, alone, joint = (opened(tmp_path / name / "0_pca.png") for name in ("one", "both", "joint"))
    assert np.array_equal(one, alone)
    assert not np.array_equal(one, joint)


@pytest.mark.parametrize("more", [[], ["--foreground"], ["--per_image", "--foreground"]])
def test_constant_images_and_single_patches(more, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8), "navy").save(tmp_path / "in/a.png")
    run("--images", tmp_path / "in", "--output_dir", tmp_path, *NETWORKS["vit"], *more)
    assert (opened(tmp_path / "a_pca.png") == 128).all()


def test_bad_files_and_errors(tmp_path, capsys):
    write_images(tmp_path / "in", [(32, 32)])
    (tmp_path / "in/bad.png").write_bytes(b"no image")

    def error(*arguments):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        return stopped.value.code, capsys.readouterr().err

    code, text = error("--images", tmp_path / "in", "--output_dir", tmp_path / "out", *NETWORKS["vit"])
    assert code == 1
    assert "left out: " in text
    assert "bad.png" in text
    assert (tmp_path / "out/0_pca.png").is_file()
    for arguments, wanted in (
        (["--images", tmp_path / "in/bad.png", *NETWORKS["vit"]], "none of the images can be read"),
        (["--images", tmp_path / "none", *NETWORKS["vit"]], "none: no such file or folder"),
        (["--images", tmp_path / "in/0.png", "--arch", "RawPixels"], "RawPixels shows no features of patches"),
        (["--images", tmp_path / "in/0.png", *NETWORKS["vit"], "--layer", 2], "layer (2) must be from -2 to 1"),
        (["--images", tmp_path / "in/0.png", *NETWORKS["vit"], "--image_size", 8, 8, 8], "--image_size 8 8 8: one"),
    ):
        code, text = error("--output_dir", tmp_path / "out2", *arguments)
        assert code == 2
        assert wanted in text


def test_damaged_weights_are_no_mistake_of_the_configuration(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "in", [(32, 32)])
    broken = paddle.full([1, 4, 4, 12], float("nan"))
    monkeypatch.setattr("passl.cli.visualize.patch_reader.patch_features", lambda *_: broken)
    with pytest.raises(SystemExit) as ended:
        run("--images", tmp_path / "in", "--output_dir", tmp_path / "out", *NETWORKS["vit"])
    assert ended.value.code == 1
    assert "features are not finite" in capsys.readouterr().err


def test_output_names():
    assert output_names(["a/x.png", "b/y.jpg"]) == ["x", "y"]
    assert output_names(["a/x.png", "b/x.png"]) == ["a/x", "b/x"]
    assert output_names(["a/x.png", "a/x.jpg"]) == ["x.png", "x.jpg"]
