"""Image retrieval: the revisited protocol by hand and by counting, and made sets whose answers are known."""

import pickle
import shutil
from typing import ClassVar

import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image

from passl.data.revisited import RetrievalImages, read_ground_truth
from passl.evaluators import ImageRetrieval, evaluate
from passl.evaluators.ranking import average_precision, mean_of_known, revisited_scores
from passl.formats.limits import CheckpointFormatError
from passl.models import VisionTransformer
from tests.evaluators.made_sets import PLAIN, write_retrieval


class MeanColour(nn.Layer):
    def forward(self, images):
        return images.mean([2, 3])


def by_counting(order, positives, junk, kappas):
    """The protocol as its text has it: junk is struck off the list, then precision is counted at each positive."""
    ranking = [image for image in order if image not in junk or image in positives]
    right = [image in positives for image in ranking]
    total = 0.0
    for place, is_right in enumerate(right):
        if is_right:
            before = sum(right[:place]) / place if place else 1.0
            total += (before + sum(right[: place + 1]) / (place + 1)) / 2
    last = max(place for place, is_right in enumerate(right) if is_right) + 1
    return total / len(positives), [sum(right[: min(k, last)]) / min(k, last) for k in kappas]


@pytest.mark.smoke
def test_average_precision_by_hand():
    assert average_precision(np.array([0, 1]), 2) == 1
    assert average_precision(np.array([0, 2]), 2) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision(np.array([3]), 1) == pytest.approx((0 + 1 / 4) / 2)
    assert average_precision(np.array([0]), 2) == 0.5  # the other one was not found
    assert average_precision(np.array([], np.int64), 3) == 0


@pytest.mark.smoke
def test_scores_equal_counting():
    rng = np.random.default_rng(0)
    for _ in range(200):
        order = rng.permutation(rng.integers(3, 40))
        kinds = rng.choice(4, len(order), p=[0.2, 0.2, 0.3, 0.3])
        kinds[rng.integers(len(order))] = 0
        positives, junk = np.flatnonzero(kinds == 0), np.flatnonzero(kinds == 1)
        precision, at_kappas = revisited_scores(order, positives, junk, (1, 5, 10))
        expected = by_counting(order.tolist(), set(positives.tolist()), set(junk.tolist()), (1, 5, 10))
        assert precision == pytest.approx(expected[0])
        np.testing.assert_allclose(at_kappas, expected[1])


def test_a_query_without_positives_is_left_out():
    none = revisited_scores(np.arange(4), np.empty(0, int), np.array([1]), (1, 5))
    assert np.isnan(none[0])
    assert np.isnan(none[1]).all()
    assert mean_of_known(np.array([[np.nan, 1.0], [0.5, 3.0]])).tolist() == [0.5, 2.0]


@pytest.mark.smoke
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_set_with_a_known_answer(tmp_path, protocol):
    # Query 0 (0 degrees) ranks 0 1 2 3 4 5; query 1 (90 degrees) the other way round.
    root = write_retrieval(
        tmp_path,
        [5, 15, 25, 40, 60, 80],
        [0, 90],
        [
            {"easy": np.array([0]), "hard": np.array([3]), "junk": np.array([1])},
            {"easy": [5, 4], "hard": [], "junk": []},
        ],
        protocol=protocol,
    )
    found = evaluate(ImageRetrieval(root, **PLAIN), MeanColour(), tmp_path)
    # Medium, query 0: without junk 0 2 3 4 5, right at places 0 and 2. Query 1: perfect.
    first = (1 + (1 / 2 + 2 / 3) / 2) / 2
    assert found["mAP_medium"] == pytest.approx(100 * (first + 1) / 2)
    assert found["mP@1_medium"] == 100
    assert found["mP@5_medium"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert found["mP@10_medium"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    # Hard, query 0: without junk and easy 2 3 4 5, right at place 1. Query 1 has none.
    assert found["mAP_hard"] == pytest.approx(100 * (0 + 1 / 2) / 2)
    assert found["mP@1_hard"] == 0
    assert found["mP@5_hard"] == pytest.approx(50)


def test_perfect_retrieval_and_equal_similarities(tmp_path):
    root = write_retrieval(tmp_path, [10, 10, 10, 80], [10], [{"easy": [0], "hard": [1, 2], "junk": []}])
    evaluator = ImageRetrieval(root, prefix="oxford_", **PLAIN)
    found = evaluate(evaluator, MeanColour(), tmp_path)
    assert evaluator.key_metric == "oxford_mAP_medium"
    assert set(found.values()) == {100.0}

    class Blind(nn.Layer):
        def forward(self, images):
            return paddle.ones([len(images), 3])

    # All are equally similar: they stay in the order of the list.
    assert evaluate(evaluator, Blind(), tmp_path)["oxford_mAP_medium"] == 100


def test_one_image_and_no_right_images_at_all(tmp_path, caplog):
    root = write_retrieval(tmp_path, [10], [20], [{"easy": [0], "hard": [], "junk": []}])
    with caplog.at_level("WARNING", "passl"):
        found = evaluate(ImageRetrieval(root, **PLAIN), MeanColour(), tmp_path)
    assert found["mAP_medium"] == 100
    assert np.isnan(found["mAP_hard"])
    assert "no query has right images by the hard protocol" in caplog.text


def test_a_pickle_of_python_2(tmp_path):
    class OldPickler(pickle._Pickler):
        """Writes text as Python 2 wrote its strings of bytes."""

        dispatch: ClassVar = dict(pickle._Pickler.dispatch)

        def save_str(self, value):
            self.write(b"U" + bytes([len(value)]) + value.encode())
            self.memoize(value)

        dispatch[str] = save_str

    root = write_retrieval(tmp_path, [10, 80], [20], [{"easy": [0], "hard": [1], "junk": []}])
    path = tmp_path / "roxford5k" / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    with path.open("wb") as file:
        OldPickler(file, 2).dump(content)
    assert b"U\x06imlist" in path.read_bytes()
    assert evaluate(ImageRetrieval(root, **PLAIN), MeanColour(), tmp_path)["mAP_medium"] == 100


@pytest.mark.smoke
def test_a_pickle_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))

    root = write_retrieval(tmp_path, [10], [20], [{"easy": [0], "hard": [], "junk": Hostile()}])
    with pytest.raises(CheckpointFormatError, match=r"gnd_roxford5k.pkl: the file asks for .*open, .*nothing"):
        ImageRetrieval(root)
    assert not (tmp_path / "was_here").exists()


def test_sizes_boxes_and_scales(tmp_path):
    root = write_retrieval(tmp_path, [10, 20], [20], [{"easy": [0], "hard": [], "junk": []}], size=(300, 120))
    plain = ImageRetrieval(root, image_size=64)
    assert plain.database.sample(0, None)["image"].shape == (3, 26, 64)
    assert plain.queries.sample(0, None)["image"].shape == (3, 26, 64)
    assert ImageRetrieval(root, crop_queries=True).queries.sample(0, None)["image"].shape == (3, 20, 20)
    assert ImageRetrieval(root, image_size=None).database.sample(0, None)["image"].shape == (3, 120, 300)

    paddle.seed(0)
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, init_std=0.3)
    backbone.eval()
    several = ImageRetrieval(root, image_size=64, multiscale=True)
    with paddle.no_grad():
        found = several._features(backbone, several.queries, "queries")[0]
        image = paddle.to_tensor(several.queries.sample(0, None)["image"][None])
        expected = []
        for height, width in ((26, 64), (18, 45), (13, 32)):
            scaled = image
            if height != 26:
                scaled = nn.functional.interpolate(
                    image, scale_factor=(2**-0.5 if height == 18 else 0.5), mode="bilinear"
                )
            assert scaled.shape[2:] == [height, width]
            expected.append(backbone(scaled[:, :, : height // 8 * 8, : width // 8 * 8]).numpy()[0])
    expected = np.mean(expected, axis=0)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


def test_the_thumbnail_is_pillows(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = Image.fromarray(pixels)
    expected.thumbnail((40, 40), Image.Resampling.LANCZOS)
    images = RetrievalImages([str(tmp_path / "image.png")], lambda image, rng: np.asarray(image), 40)
    np.testing.assert_array_equal(images.sample(0, None)["image"], np.asarray(expected))


def test_files_that_are_not_there_or_not_right(tmp_path):
    gnd = [{"easy": [0], "hard": [], "junk": [1]}]
    with pytest.raises(FileNotFoundError, match=r"gnd_rparis6k.pkl: root must hold"):
        ImageRetrieval(str(tmp_path), "rparis6k")
    root = write_retrieval(tmp_path, [10, 20], [20], gnd)
    path = tmp_path / "roxford5k" / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    for change, message in (
        ({"gnd": content["gnd"] * 2}, r"gnd has 2 entries for 1 queries"),
        ({"imlist": []}, r"imlist must be a list that is not empty"),
        (
            {"gnd": [{"easy": [2], "hard": [], "junk": [], "bbx": [0, 0, 1, 1]}]},
            r"gnd\[0\]\['easy'\] .* 0 to 1",
        ),
        ({"gnd": [{"easy": [0.5], "hard": [], "junk": [], "bbx": [0, 0, 1, 1]}]}, r"must be a list of whole numbers"),
        ({"gnd": [{"easy": [0], "hard": [], "bbx": [0, 0, 1, 1]}]}, r"gnd\[0\] has no 'junk'"),
        ({"gnd": [{"easy": [0], "hard": [], "junk": [], "bbx": [0, 0]}]}, r"\['bbx'\] must be four numbers"),
        ({"gnd": [{"easy": [0], "hard": [], "junk": [], "bbx": [0, 0, 9, np.inf]}]}, r"\['bbx'\] must be four numbers"),
        ({"gnd": [{"easy": [0, [1]], "hard": [], "junk": []}]}, r"\['easy'\] must be a list of whole numbers"),
        ({"gnd": [{"easy": [np.nan], "hard": [], "junk": []}]}, r"\['easy'\] must be a list of whole numbers"),
        ({"gnd": np.array(1)}, r"gnd must be a list that is not empty"),
        ({"imlist": ["../image0", "image1"]}, r"no name inside a folder"),
        ({"imlist": np.array([["image0"], ["image1"]])}, r"imlist holds \['image0'\], which is no name"),
        ({"imlist": [None, "image1"]}, r"imlist holds None, which is no name"),
    ):
        path.write_bytes(pickle.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            read_ground_truth(root, "roxford5k")
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="must be a dict with 'imlist', not a list"):
        read_ground_truth(root, "roxford5k")
    path.write_bytes(b"no pickle")
    with pytest.raises(CheckpointFormatError, match=r"gnd_roxford5k.pkl"):
        read_ground_truth(root, "roxford5k")
    path.write_bytes(pickle.dumps(content))
    (tmp_path / "roxford5k" / "jpg" / "image1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"names images that are missing: .*image1.jpg"):
        read_ground_truth(root, "roxford5k")


def test_damaged_images(tmp_path, caplog):
    root = write_retrieval(tmp_path, [10, 80], [20], [{"easy": [0], "hard": [1], "junk": []}], size=(400, 300))
    damaged = tmp_path / "roxford5k" / "jpg" / "image1.jpg"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) - 200])
    with caplog.at_level("WARNING", "passl"):
        assert evaluate(ImageRetrieval(root, **PLAIN), MeanColour(), tmp_path)["mAP_medium"] == 100
    assert f"{damaged}" in caplog.text
    assert "used as far as it goes" in caplog.text
    damaged.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"every image of a benchmark counts, and this cannot be read: .*image1.jpg: "):
        evaluate(ImageRetrieval(root, **PLAIN), MeanColour(), tmp_path)
    shutil.copy(tmp_path / "roxford5k" / "jpg" / "image0.jpg", damaged)

    class Broken(nn.Layer):
        def forward(self, images):
            return images.mean([2, 3]) * float("nan")

    with pytest.raises(ValueError, match="features of database are not finite"):
        evaluate(ImageRetrieval(root, **PLAIN), Broken(), tmp_path)


def test_boxes_are_needed_only_to_crop(tmp_path):
    root = write_retrieval(tmp_path, [10, 80], [20], [{"easy": [0], "hard": [1], "junk": []}])
    path = tmp_path / "roxford5k" / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    del content["gnd"][0]["bbx"]
    path.write_bytes(pickle.dumps(content))
    assert evaluate(ImageRetrieval(root, **PLAIN), MeanColour(), tmp_path)["mAP_medium"] == 100
    with pytest.raises(ValueError, match=r"crop_queries needs a box of each query: gnd\[0\] has no 'bbx'"):
        ImageRetrieval(root, crop_queries=True)


@pytest.mark.parametrize(("multiscale", "least"), [(False, 8), (True, 16)])
def test_images_smaller_than_a_patch_are_named(tmp_path, multiscale, least):
    root = write_retrieval(tmp_path, [10, 80], [20], [{"easy": [0], "hard": [1], "junk": []}], size=(20, least))
    network = MeanColour()
    network.patch_size = 8
    assert evaluate(ImageRetrieval(root, multiscale=multiscale, **PLAIN), network, tmp_path)["mAP_medium"] == 100
    small = tmp_path / "roxford5k" / "jpg" / "query0.jpg"
    Image.new("RGB", (20, least - 1)).save(small)
    with pytest.raises(ValueError, match=rf"{small}: 20 x {least - 1} pixels, .* sides must be at least {least}"):
        evaluate(ImageRetrieval(root, multiscale=multiscale, **PLAIN), network, tmp_path)


def test_arguments():
    with pytest.raises(ValueError, match=r"image_size \(0\) must be at least 1"):
        ImageRetrieval("anywhere", image_size=0)
    with pytest.raises(ValueError, match=r"benchmark \('../x'\) must be the name"):
        ImageRetrieval("anywhere", "../x")
