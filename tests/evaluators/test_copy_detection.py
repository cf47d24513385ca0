"""Copy detection: pooling and whitening by formulas of their own, and made sets whose answers are known."""

import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image

from passl.data.loader import BadSamplesError
from passl.evaluators import CopyDetection, evaluate
from passl.evaluators.copy_detection import copy_features, generalised_mean, learn_whitening
from passl.models import VisionTransformer, XCiT, resnet18
from tests.evaluators.made_sets import PLAIN, write_block, write_copydays

SMALL = {**PLAIN, "image_size": 16}


class Colours(nn.Layer):
    """A convolutional network whose features are the colours of the pixels."""

    def feature_map(self, images):
        return images

    def forward(self, images):
        return images.mean([2, 3])


ORIGINALS = {"200000": 5, "200100": 25, "200200": 60, "200300": 85}


@pytest.mark.smoke
def test_a_set_with_a_known_answer(tmp_path):
    # Copies of 200100: the nearest original of the first is its own, of the second it comes second after 200200.
    root = write_copydays(tmp_path, ORIGINALS, {"200101": 22, "200102": 50, "200301": 84})
    write_block(tmp_path / "jpegqual" / "3", {name: angle + 1 for name, angle in ORIGINALS.items()})
    write_block(tmp_path / "crops" / "80", {"a": 25, "b": 25, "c": 60, "d": 85})
    evaluator = CopyDetection(root, **SMALL)
    assert evaluator.key_metric == "copydays_mAP_strong"
    found = evaluate(evaluator, Colours(), tmp_path)
    second = (0 + 1 / 2) / 2
    assert found == pytest.approx(
        {
            "copydays_mAP_original": 100.0,
            "copydays_mAP_strong": 100 * (1 + second + 1) / 3,
            "copydays_mAP_jpegqual_3": 100.0,
            "copydays_mAP_crops_80": 100 * (second + 3) / 4,
        }
    )


def test_distractors_stand_in_the_ranking_and_twenty_count(tmp_path):
    root = write_copydays(tmp_path / "set", ORIGINALS, {"200101": 30})
    write_block(tmp_path / "few", {"x": 30, "y": 31})
    found = evaluate(CopyDetection(root, distractors=str(tmp_path / "few"), **SMALL), Colours(), tmp_path)
    assert found["copydays_mAP_strong"] == pytest.approx(100 * (0 + 1 / 3) / 2)
    write_block(tmp_path / "many", {f"x{i}": 30 for i in range(19)})
    found = evaluate(CopyDetection(root, distractors=str(tmp_path / "many"), **SMALL), Colours(), tmp_path)
    assert found["copydays_mAP_strong"] == pytest.approx(100 * (0 + 1 / 20) / 2)
    write_block(tmp_path / "many", {"x19": 30})
    found = evaluate(CopyDetection(root, distractors=str(tmp_path / "many"), **SMALL), Colours(), tmp_path)
    assert found["copydays_mAP_strong"] == 0


def test_several_originals_of_one_copy(tmp_path):
    root = write_copydays(tmp_path, {"2000a": 0, "2000b": 40, "2001a": 20}, {"2000c": 2})
    expected = (1 + (1 / 2 + 2 / 3) / 2) / 2  # at places 0 and 2
    assert evaluate(CopyDetection(root, **SMALL), Colours(), tmp_path)["copydays_mAP_strong"] == pytest.approx(
        100 * expected
    )


@pytest.mark.smoke
def test_generalised_mean_and_cls():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 5, 4)).astype(np.float32)
    expected = [[np.mean([max(v, 1e-6) ** 4 for v in image[:, d]]) ** 0.25 for d in range(4)] for image in features]
    np.testing.assert_allclose(generalised_mean(paddle.to_tensor(features)).numpy(), expected, rtol=1e-5)

    paddle.seed(0)
    backbone = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, init_std=0.3, num_register_tokens=2)
    backbone.eval()
    images = paddle.to_tensor(rng.standard_normal((2, 3, 32, 40)).astype(np.float32))
    tokens = backbone.get_intermediate_layers(images)[0]
    found = copy_features(backbone, images)
    assert found.shape == [2, 32]
    np.testing.assert_allclose(found[:, :16].numpy(), backbone(images).numpy(), atol=1e-6)
    np.testing.assert_allclose(found[:, 16:].numpy(), generalised_mean(tokens[:, 1:]).numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["xcit", "resnet"])
def test_other_backbones(kind):
    paddle.seed(0)
    images = paddle.randn([2, 3, 64, 64])
    if kind == "resnet":
        backbone, width = resnet18(), 512
    else:
        backbone, width = XCiT(patch_size=16, embed_dim=16, depth=1, num_heads=2), 32
    backbone.eval()
    found = copy_features(backbone, images)
    assert found.shape == [2, width]
    if kind == "xcit":
        np.testing.assert_allclose(found[:, :16].numpy(), backbone(images).numpy(), atol=1e-6)


def test_a_backbone_without_patches(tmp_path):
    class Plain(nn.Layer):
        def forward(self, images):
            return images.mean([2, 3])

    root = write_copydays(tmp_path, ORIGINALS, {"200101": 30})
    with pytest.raises(ValueError, match=r"Plain shows no features of patches: give it a method feature_map"):
        evaluate(CopyDetection(root, **SMALL), Plain(), tmp_path)


@pytest.mark.smoke
def test_whitening():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6)) + 3
    mean, matrix = learn_whitening(features)
    np.testing.assert_allclose(mean, features.mean(0))
    white = features @ matrix
    np.testing.assert_allclose(white.T @ white / 200, np.eye(6), atol=1e-8)
    # Of fewer images than numbers: directions without any variance count as 1e-5 of the largest.
    few = rng.standard_normal((3, 6))
    _, matrix = learn_whitening(few)
    _, values, directions = np.linalg.svd(few)
    largest = values[0] ** 2 / 3
    kept = np.concatenate([values**2 / 3, np.full(3, 1e-5 * largest)])
    other = few @ matrix
    np.testing.assert_allclose(other @ other.T, few @ directions.T @ np.diag(1 / kept) @ directions @ few.T, atol=1e-8)
    outside = directions[5:6] @ matrix
    assert np.linalg.norm(outside) == pytest.approx(1 / np.sqrt(1e-5 * largest))
    with pytest.raises(ValueError, match="features of all images are 0"):
        learn_whitening(np.zeros((2, 3)))


def test_whitening_is_used(tmp_path):
    originals, strong = {"200000": 10, "200100": 12, "200200": 80}, {"200001": 13, "200101": 11}
    root = write_copydays(tmp_path / "set", originals, strong)
    write_block(tmp_path / "white", {str(angle): angle for angle in range(0, 90, 10)})
    found = evaluate(CopyDetection(root, whitening=str(tmp_path / "white"), **SMALL), Colours(), tmp_path)

    def rows(folder):
        images = [np.asarray(Image.open(path)) / 255 for path in sorted(folder.glob("*.jpg"))]
        return np.maximum([image[0, 0] for image in images], 1e-6)

    white = rows(tmp_path / "white")
    values, directions = np.linalg.eigh(white.T @ white / len(white))
    scaled = directions / np.sqrt(np.maximum(values, values.max() * 1e-5))
    database, queries = ((rows(tmp_path / "set" / name) - white.mean(0)) @ scaled for name in ("original", "strong"))
    database, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (database, queries))
    places = [list(np.argsort(-query @ database.T)).index(right) for query, right in zip(queries, (0, 1))]
    expected = [1 if place == 0 else 1 / (place + 1) / 2 for place in places]
    assert found["copydays_mAP_strong"] == pytest.approx(100 * np.mean(expected))


def test_folders_that_are_not_there_or_not_right(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        CopyDetection(str(tmp_path / "none"))
    write_block(tmp_path / "a" / "original", ORIGINALS)
    with pytest.raises(FileNotFoundError, match="has no folder strong: Copydays has original and strong"):
        CopyDetection(str(tmp_path / "a"))
    (tmp_path / "a" / "strong").mkdir()
    with pytest.raises(FileNotFoundError, match=r"strong contains no .jpg files"):
        CopyDetection(str(tmp_path / "a"))
    write_block(tmp_path / "a" / "strong", {"999900": 3})
    with pytest.raises(ValueError, match=r"999900.jpg is a copy of nothing"):
        CopyDetection(str(tmp_path / "a"))
    root = write_copydays(tmp_path / "b", ORIGINALS, {"200001": 3})
    write_block(tmp_path / "b" / "crops" / "10", {"200000": 3})
    with pytest.raises(ValueError, match=r"has 1 .jpg files, and original has 4"):
        CopyDetection(root)
    root = write_copydays(tmp_path / "c", ORIGINALS, {"200001": 3})
    (tmp_path / "c" / "original" / "._200000.jpg").write_bytes(b"of another system")
    assert len(CopyDetection(root, root + "/original").blocks["original"]) == len(ORIGINALS)
    assert len(CopyDetection(root, root + "/original").distractors) == len(ORIGINALS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty contains no images directly"):
        CopyDetection(root, whitening=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"image_size \(0\)"):
        CopyDetection(root, image_size=0)


def test_unreadable_images(tmp_path):
    root = write_copydays(tmp_path / "set", ORIGINALS, {"200101": 30})
    write_block(tmp_path / "few", {"x": 30, "y": 31})
    (tmp_path / "few" / "y.jpg").write_bytes(b"")
    distractors = str(tmp_path / "few")
    with pytest.raises(ValueError, match=r"y.jpg: the file is empty"):
        evaluate(CopyDetection(root, distractors, **SMALL), Colours(), tmp_path)
    found = evaluate(CopyDetection(root, distractors, max_bad_samples=1, **SMALL), Colours(), tmp_path)
    assert found["copydays_mAP_strong"] == pytest.approx(100 * (0 + 1 / 2) / 2)
    (tmp_path / "few" / "z.jpg").write_bytes(b"")
    with pytest.raises(BadSamplesError, match=r"more than max_bad_samples \(1\)"):
        evaluate(CopyDetection(root, distractors, max_bad_samples=1, **SMALL), Colours(), tmp_path)
    (tmp_path / "set" / "original" / "200000.jpg").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"every image of a benchmark counts, .*200000.jpg"):
        evaluate(CopyDetection(root, distractors, max_bad_samples=5, **SMALL), Colours(), tmp_path)
