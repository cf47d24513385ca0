"""Attention maps, masks and pictures against recorded ones, and the overview."""

from __future__ import annotations

import io
import json

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.convert import load_torch
from passl.data.image_io import read_rgb
from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from passl.models import ResNet, VisionTransformer
from passl.visualize.attention import overview
from passl.visualize.attention_files import folder_names
from passl.visualize.attention_image import Prepared, picture_of, prepare
from passl.visualize.attention_maps import coloured, map_png, shaded, top_mass_masks, upsampled
from passl.visualize.attention_view import View, similarity
from passl.visualize.boxes import boxes
from tests.models.test_vision_transformer import img_size_of
from tests.models.weights import assert_close, load

pytestmark = pytest.mark.smoke


def recorded_jobs(reference):
    """(name in the npz, arguments, a backbone with the recorded weights) of each recorded run."""
    meta = json.loads((reference / "eval_meta.json").read_text())
    jobs = [name for name in meta if name.startswith("viz_")]
    assert jobs
    for job in jobs:
        state = load_torch(reference / meta[job]["weights"])
        arch = meta[job]["arch"]
        model = VisionTransformer(img_size_of(state, arch["patch_size"]), **arch)
        load(model, state)
        model.eval()
        yield job[len("viz_") :], meta[job], model


def sizes_of(argv):
    """What follows --image_size."""
    if "--image_size" not in argv:
        return [480, 480]
    rest = argv[argv.index("--image_size") + 1 :]
    sizes = [int(one) for one in rest[: next((i for i, one in enumerate(rest) if one.startswith("-")), None)]]
    return sizes[0] if len(sizes) == 1 else sizes


def test_recorded_maps_masks_and_pictures(reference):
    recorded = np.load(reference / "visualize_attention.npz")
    image = read_rgb(reference / "viz_image.png")
    for job, meta, model in recorded_jobs(reference):
        prepared = prepare(image, sizes_of(meta["argv"]), model.patch_size, IMAGENET_MEAN, IMAGENET_STD)
        assert_close(prepared.tensor, recorded[f"{job}/image_tensor"], 1e-6, job)
        maps, names = View().maps(model, paddle.to_tensor(prepared.tensor[None]))
        maps = maps[0]
        assert names == [f"head{head}" for head in range(model.blocks[0].attn.num_heads)]
        assert_close(maps, recorded[f"{job}/attention_grid"], 1e-6, job)
        enlarged, expected = upsampled(maps, *prepared.size), recorded[f"{job}/attention_maps"]
        step = enlarged.shape[1] // expected.shape[1]
        assert_close(enlarged[:, ::step, ::step], expected, 1e-6, job)
        if f"{job}/mask_grid" in recorded:
            threshold = float(meta["argv"][meta["argv"].index("--threshold") + 1])
            masks = top_mass_masks(maps, threshold)
            assert (masks != recorded[f"{job}/mask_grid"]).sum((1, 2)).max() <= 1
            exact = top_mass_masks(recorded[f"{job}/attention_grid"], threshold)
            assert np.array_equal(upsampled(exact, *prepared.size), recorded[f"{job}/mask_maps"])
        if f"{job}/png_img_rgb" in recorded:
            assert np.array_equal(picture_of(prepared.tensor), recorded[f"{job}/png_img_rgb"])
            drawn = np.asarray(Image.open(io.BytesIO(map_png(enlarged[0]))))
            assert np.abs(drawn.astype(int) - recorded[f"{job}/png_head0_rgba"]).max() == 0


def test_mask_holds_its_share_with_the_fewest_patches():
    maps = np.random.default_rng(0).random([2, 7, 9]).astype(np.float32) ** 4
    for threshold in (0.1, 0.6, 1.0):
        masks = top_mass_masks(maps, threshold)
        for one, mask in zip(maps, masks):
            held = one[mask].sum() / one.sum()
            smallest = one[mask].min() / one.sum()
            assert held >= threshold - 1e-5
            assert held - smallest < threshold + 1e-5
            assert mask.all() or one[mask].min() >= one[~mask].max()


def test_the_picture_of_a_mask_shows_exactly_the_mask():
    image = np.random.default_rng(0).integers(0, 30, [64, 96, 3]).astype(np.uint8)
    mask = np.zeros([64, 96], bool)
    mask[16:40, 0:32] = mask[48:56, 64:72] = True
    picture = shaded(image, mask)
    assert np.array_equal((picture != image).any(2), mask)


def a_prepared():
    """Seen at 32 x 48 after a cut from 34 x 50, of an image of 68 x 200."""
    return Prepared(np.zeros([3, 32, 48], np.float32), (34, 50), (68, 200))


def test_boxes():
    mask = np.zeros([4, 6], bool)
    mask[0, 0] = mask[2, 3:6] = mask[3, 3] = True
    mask[1, 2] = True  # touches the large part at a corner only
    found = boxes(mask, a_prepared())
    assert [one["patches"] for one in found] == [4, 1, 1]
    assert found[0]["box"] == [24, 16, 48, 32]
    assert found[0]["original_box"] == [96, 32, 192, 64]
    assert found[0]["share"] == round(4 / 24, 6)
    assert [one["box"] for one in found[1:]] == [[0, 0, 8, 8], [16, 8, 24, 16]]
    assert boxes(np.zeros([4, 6], bool), a_prepared()) == []


def test_the_patch_at_a_place():
    prepared = a_prepared()
    assert prepared.patch_at(0, 0, (4, 6)) == (0, 0)
    assert prepared.patch_at(100, 40, (4, 6)) == (2, 3)
    assert prepared.patch_at(200, 68, (4, 6)) == (3, 5)
    with pytest.raises(ValueError, match="point .201,3. is outside of the image, which is 200 wide and 68 high"):
        prepared.patch_at(201, 3, (4, 6))


def test_similarity_is_the_cosine_of_features():
    paddle.seed(0)
    network = ResNet((1, 1, 1, 1), width=8)
    network.eval()
    rng = np.random.default_rng(0)
    prepared = Prepared(rng.normal(size=[3, 70, 130]).astype(np.float32), (70, 130), (140, 260))
    cosines, patch = similarity(network, prepared, 250, 20, -1)
    features = network.feature_map(paddle.to_tensor(prepared.tensor[None])).numpy()[0].astype(np.float64)
    assert cosines.shape == features.shape[1:]
    assert patch == (0, 4)
    features /= np.linalg.norm(features, axis=0)
    assert_close(cosines, np.tensordot(features[:, 0, 4], features, 1), 1e-5)


def test_heads():
    paddle.seed(0)
    model, x = VisionTransformer(16, 8, 3, 12, 2, 3), paddle.randn([2, 3, 16, 24])
    every, _ = View().maps(model, x)
    mean, names = View(head="mean").maps(model, x)
    assert names == ["mean"]
    assert_close(mean[:, 0], every.mean(1), 1e-7)
    second, names = View(head=1).maps(model, x)
    assert names == ["head1"]
    assert_close(second[:, 0], every[:, 1], 0.0)
    assert View(rollout=True).maps(model, x)[0].shape == (2, 1, 2, 3)
    with pytest.raises(ValueError, match="head .3. must be from 0 to 2, or all, or mean"):
        View(head=3).maps(model, x)


def test_broken_weights_are_named():
    model, x = VisionTransformer(16, 8, 3, 12, 2, 3), np.zeros([3, 16, 16], np.float32)
    model.cls_token.set_value(paddle.full_like(model.cls_token, float("nan")))
    for look in (
        lambda: View().maps(model, paddle.to_tensor(x[None])),
        lambda: View(rollout=True).maps(model, paddle.to_tensor(x[None])),
        lambda: similarity(model, Prepared(x, (16, 16), (16, 16)), 5, 5, -1),
    ):
        with pytest.raises(ValueError, match="the network gives NaN: its weights, or the image, hold values"):
            look()


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12, 16])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (480, 320), (32, 160)])
@pytest.mark.parametrize("with_masks", [False, True])
def test_overview_is_a_sheet_of_sensible_size(heads, height, width, with_masks):
    maps = np.random.default_rng(0).random([heads, height // 16, width // 16]).astype(np.float32)
    image = np.full([height, width, 3], 99, np.uint8)
    sheet = overview(image, maps, maps > 0.5 if with_masks else None)
    assert sheet.mode == "RGB"
    assert 300 <= sheet.width <= 1700
    assert 0.6 <= sheet.width / sheet.height <= 12
    assert (np.asarray(sheet) < 250).any(2).mean() > 0.45  # little of it is blank


def test_overview_says_what_does_not_fit():
    image, maps = np.zeros([16, 16, 3], np.uint8), np.zeros([2, 2, 2])
    with pytest.raises(ValueError, match="must be uint8"):
        overview(image / 255.0, maps)
    with pytest.raises(ValueError, match="expected .heads, h, w."):
        overview(image, maps, maps[:1])
    with pytest.raises(ValueError, match="expected .heads, h, w."):
        overview(image, maps[0])
    overview(image, maps)  # maps of one value are no error


def test_pictures_of_other_channels_and_unknown_colours():
    tensor = np.random.default_rng(0).random([5, 4, 4]).astype(np.float32)
    assert picture_of(tensor).shape == (4, 4, 3)
    grey = picture_of(tensor[:1])
    assert (grey.min(), grey.max()) == (0, 255)
    assert (grey == grey[:, :, :1]).all()
    with pytest.raises(ValueError, match="cmap .'no'. must be a colour map of matplotlib"):
        coloured(np.zeros([1, 1]), "no")


def test_folder_names_differ():
    names = folder_names(["a/x.png", "b/X.jpg", "b/x.png", "c/y.png", "..png", "e/x.png-2"])
    assert len({name.casefold() for name in names}) == 6
    assert names[3] == "y"
    assert all(name and "/" not in name and not name.startswith(".") for name in names)
