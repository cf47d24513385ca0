"""Images in all the forms that a loop has them, and what is said of others."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.data.batch_views import BatchMultiCrop
from passl.data.multi_crop import MultiCrop
from passl.wrapper.images import Views
from tests.wrapper.small import SmallNet, batch, small_conf, small_wrapper

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(3)]
FORMS = {
    "uint8 tensor": lambda: paddle.to_tensor(np.stack(PICTURES).transpose(0, 3, 1, 2)),
    "float tensor": lambda: paddle.to_tensor((np.stack(PICTURES) / 255).astype(np.float32).transpose(0, 3, 1, 2)),
    "arrays": lambda: PICTURES,
    "float arrays": lambda: [picture / 255 for picture in PICTURES],
    "pictures": lambda: tuple(Image.fromarray(picture) for picture in PICTURES),
}


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_views_of_multi_crop(form):
    conf = small_conf()
    found = Views(conf).crops(FORMS[form](), np.random.default_rng(7))
    rng = np.random.default_rng(7)
    samples = [MultiCrop(**conf.view_arguments())(picture, rng) for picture in PICTURES]
    for name, views in found.items():
        expected = np.concatenate([np.stack(one) for one in zip(*(sample[name] for sample in samples))])
        np.testing.assert_array_equal(views.numpy(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_images_for_validation(form):
    found = Views(small_conf()).whole(FORMS[form]())
    mean, std = (np.array(x, np.float32)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (np.stack(PICTURES).transpose(0, 3, 1, 2) / np.float32(255) - mean) / std
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_batches_on_a_device_are_augmented_there(monkeypatch):
    views = Views(small_conf())
    monkeypatch.setattr("passl.wrapper.images._is_on_cpu", lambda images: False)
    found = views.crops(batch(), np.random.default_rng(7))
    expected = BatchMultiCrop(**small_conf().view_arguments())(batch(), np.random.default_rng(7))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), array.numpy())


def test_pictures_of_several_sizes():
    pictures = [PICTURES[0], PICTURES[1][:24], Image.fromarray(PICTURES[2][:, :30])]
    views = Views(small_conf(global_crop_size=(16, 24)))
    assert views.crops(pictures, np.random.default_rng(0))["global_crops"].shape == [6, 3, 16, 24]
    assert views.whole(pictures).shape == [3, 3, 16, 24]


def test_pictures_in_other_modes_are_made_rgb():
    pictures = [Image.fromarray(PICTURES[0]).convert(mode) for mode in ("L", "RGBA", "P")] + [PICTURES[0][..., 0]]
    assert Views(small_conf()).whole(pictures).shape == [4, 3, 40, 40]


def test_views_of_other_channels():
    conf = small_conf(mean=(0.5,) * 5, std=(0.5,) * 5)
    images = paddle.rand([2, 5, 40, 40])
    assert Views(conf).crops(images, np.random.default_rng(0))["global_crops"].shape == [4, 5, 32, 32]
    grey = small_conf(mean=(0.5,), std=(0.5,))
    for image in (Image.fromarray(PICTURES[0]), PICTURES[0][..., 0], PICTURES[0][..., :1]):
        assert Views(grey).whole([image, image]).shape == [2, 1, 40, 40]


def test_views_that_workers_made_are_taken_as_they_are():
    wrapper = small_wrapper()
    transform = MultiCrop(**small_conf().view_arguments())
    output, _ = wrapper(transform(PICTURES[0], np.random.default_rng(0)))
    assert output.shape == [1, 12]
    assert isinstance(wrapper.model, SmallNet)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (lambda: batch()[0], "images ([3, 40, 40]) must be [B, C, H, W]; of a single image images.unsqueeze(0)"),
        (lambda: batch(channels=4), "have 4 channels, and mean and std 3 values"),
        (lambda: batch().transpose([0, 2, 3, 1]), "these look like [B, H, W, C]: images.transpose([0, 3, 1, 2])"),
        (lambda: paddle.randn([2, 3, 40, 40]), "these look normalised already; give images in 0..1"),
        (lambda: batch().astype("float32"), "give uint8, or divide by 255"),
        (lambda: paddle.full([2, 3, 8, 8], float("nan")), "some are NaN or infinite"),
        (lambda: batch()[:0], "none of them 0"),
        (lambda: batch().astype("int64"), "must be uint8, or floats in 0..1"),
        (lambda: batch().numpy(), "images is one array (4, 3, 40, 40): give paddle.to_tensor(images)"),
        (lambda: [], "not an empty list"),
        (
            lambda: "cat.jpg",
            "images must be a Tensor [B, C, H, W], a list of arrays [H, W, C] or of Pillow images, not 'str'",
        ),
        (
            lambda: [batch()],
            "of which number 0 is a Tensor [4, 3, 40, 40]: take the images out of what the data loader",
        ),
        (lambda: list(batch()), "make one batch of them: paddle.stack(images)"),
        (lambda: [*PICTURES, "cat.jpg"], "image 3 of the list is a str: give arrays [H, W, C] or Pillow images"),
        (lambda: [PICTURES[0].transpose(2, 0, 1)], "these look like [C, H, W], give image.transpose(1, 2, 0)"),
        (lambda: [PICTURES[0][..., :2]], "image 0 of the list is [40, 40, 2], and must be [H, W, 3]"),
        (
            lambda: [PICTURES[0] / 100 - 1],
            "images have values from -1 to 1.55; floats must be in [0, 1], not normalised",
        ),
        (lambda: [PICTURES[0] * 1.0], "floats must be in [0, 1]: divide by 255, or give uint8"),
        (lambda: [PICTURES[0].astype(np.int64)], "image 0 of the list is int64: give uint8 (0 to 255) or floats"),
        (lambda: {"views": batch()}, "images is a dict of views: views are 'global_crops' [2*B, C, H, W]"),
        (lambda: None, "not 'NoneType'"),
    ],
)
@pytest.mark.parametrize("mode", ["crops", "whole"])
def test_other_images_are_errors_that_say_what_to_give(images, message, mode):
    views = Views(small_conf())
    with pytest.raises((TypeError, ValueError)) as caught:
        views.crops(images(), np.random.default_rng(0)) if mode == "crops" else views.whole(images())
    if mode == "whole" and isinstance(images(), dict):
        message = "mode='val' takes images, not views"
    assert message in str(caught.value)


def test_of_not_a_number_the_error_does_not_say_normalised():
    with pytest.raises(ValueError, match="some are NaN or infinite$"):
        small_wrapper()([np.full([8, 8, 3], np.nan)] * 2)
