"""Video segmentation: J and F by hand and by brute force, and made videos in the public layout."""

import csv
import tracemalloc

import cv2
import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image

from passl.data.davis import PALETTE, find_sequences, frame_size, read_mask, write_mask
from passl.evaluators import VideoSegmentation, evaluate
from passl.evaluators.davis_metrics import boundary, boundary_accuracy, disk, region_similarity, statistics
from passl.evaluators.label_propagation import LabelPropagation, segment
from tests.evaluators.made_sets import box_mask, moving, write_video

SIZE = {"image_size": 64}


class Colours(nn.Layer):
    """Features of patches of 8 x 8 pixels: their mean colours."""

    patch_size = 8

    def feature_map(self, images):
        return nn.functional.avg_pool2d(images, 8)

    def forward(self, images):
        return images.mean([2, 3])


# --- measures ---


@pytest.mark.smoke
def test_region_similarity_by_hand():
    first, second = box_mask([(0, 0, 10, 10)]) > 0, box_mask([(5, 0, 15, 10)]) > 0
    assert region_similarity(first, second) == pytest.approx(50 / 150)
    assert region_similarity(first, first) == 1
    assert region_similarity(first, np.zeros_like(first)) == 0
    assert region_similarity(np.zeros_like(first), np.zeros_like(first)) == 1


def brute_boundary(mask):
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            inside = [mask[p] for p in neighbours if p[0] < height and p[1] < width]
            result[y, x] = any(value != mask[y, x] for value in inside)
    return result


def brute_accuracy(mask, truth):
    reach = int(np.ceil(0.008 * np.hypot(*mask.shape)))
    found, wanted = (np.argwhere(brute_boundary(part)) for part in (mask, truth))
    if not len(found) or not len(wanted):
        return float(len(found) == len(wanted))
    near = ((found[:, None] - wanted[None]) ** 2).sum(2) <= reach**2
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(9, 14), (40, 30), (100, 180)])
def test_boundaries_equal_brute_force(shape):
    rng = np.random.default_rng(0)
    for _ in range(2):
        blocks = rng.random((2, *(-(-side // 6) for side in shape))) < 0.4
        mask, truth = (part.repeat(6, 0).repeat(6, 1)[: shape[0], : shape[1]] for part in blocks)
        np.testing.assert_array_equal(boundary(mask), brute_boundary(mask))
        assert boundary_accuracy(mask, truth) == pytest.approx(brute_accuracy(mask, truth))
    empty = np.zeros(shape, bool)
    assert boundary_accuracy(empty, empty) == 1
    assert boundary_accuracy(mask, empty) == boundary_accuracy(empty, mask) == 0
    assert boundary_accuracy(mask, mask) == 1


def test_disks():
    assert disk(0).tolist() == [[1]]
    assert disk(1).tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    assert disk(2).sum() == 13
    assert disk(8).sum() == 197  # that of DAVIS's 480 x 854 pixels


def test_statistics_by_hand():
    mean, recall, decay = statistics(np.array([1.0, 0.8, 0.6, 0.4, 0.2]))
    assert (mean, recall) == (pytest.approx(0.6), pytest.approx(0.6))
    assert decay == pytest.approx(0.9 - 0.3)  # frames 1-2 and 4-5
    assert statistics(np.array([0.5])) == (0.5, 0, 0)
    # 10 frames: the quarters end at 1, 3, 6 (5.5 rounds up), 8, 10.
    values = np.arange(10) / 10
    assert statistics(values)[2] == pytest.approx(values[0:3].mean() - values[7:10].mean())


# --- propagation ---


def propagated(frames, labels, num_frames, radius, topk, temperature):
    """The official formulas, one patch after the other: the labels of all frames but the first."""
    height, width, _ = labels.shape
    unit = [frame / np.linalg.norm(frame, axis=2, keepdims=True) for frame in frames]
    known = [labels]
    for now in range(1, len(frames)):
        asked = sorted({0, *range(max(1, now - num_frames), now)})
        result = np.zeros_like(labels)
        for y in range(height):
            for x in range(width):
                weights, values = [], []
                for frame in asked:
                    for v in range(height):
                        for u in range(width):
                            is_near = not radius or (abs(v - y) <= radius and abs(u - x) <= radius)
                            weights.append(is_near * np.exp(unit[now][y, x] @ unit[frame][v, u] / temperature))
                            values.append(known[frame][v, u])
                weights = np.array(weights)
                weights[weights < np.sort(weights)[-topk]] = 0
                result[y, x] = weights @ np.array(values) / weights.sum()
        known.append(result)
    return known[1:]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(("radius", "num_frames", "tile"), [(2, 2, 16), (0, 3, 2), (1, 0, 3), (12, 1, 4)])
def test_propagation_equals_the_formulas(device, radius, num_frames, tile, monkeypatch):
    monkeypatch.setattr("passl.evaluators.label_propagation._TILE", tile)
    monkeypatch.setattr("paddle.get_device", lambda: f"{device}:0")
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((5, 4, 6, 8)).astype(np.float32)
    labels = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (4, 6))]
    propagation = LabelPropagation(*map(paddle.to_tensor, (frames[0], labels)), num_frames, radius, 5, 0.1)
    for frame, expected in zip(frames[1:], propagated(frames, labels, num_frames, radius, 5, 0.1)):
        np.testing.assert_allclose(propagation.step(paddle.to_tensor(frame)).numpy(), expected, atol=1e-5)


def test_equally_similar_patches_are_all_asked():
    frame = paddle.ones([1, 8, 4])
    labels = np.zeros((1, 8, 2), np.float32)
    labels[0, :2, 1] = labels[0, 2:, 0] = 1
    found = LabelPropagation(frame, paddle.to_tensor(labels), 7, 12, 5, 0.1).step(frame)
    np.testing.assert_allclose(found.numpy()[0, :, 1], 0.25, atol=1e-6)
    # Also where 63 patches make products that come in blocks of several kinds.
    frame = paddle.tile(paddle.to_tensor(np.random.default_rng(0).standard_normal(48), "float32"), [7, 9, 1])
    labels = np.zeros((7, 9, 2), np.float32)
    labels[3:6, ..., 1] = 1
    found = LabelPropagation(frame, paddle.to_tensor(labels), 7, 0, 5, 0.1).step(frame)
    np.testing.assert_allclose(found.numpy()[..., 1], 3 / 7, atol=1e-6)


def test_labels_are_stretched_before_they_compete():
    weak = np.zeros((2, 2, 2), np.float32)
    weak[..., 0] = 0.9
    weak[0, 0] = 0.6, 0.4
    weak[..., 1] = 1 - weak[..., 0]
    assert segment(paddle.to_tensor(weak), 2, 2).tolist() == [[1, 0], [0, 0]]
    everywhere = np.zeros((2, 2, 2), np.float32)
    everywhere[..., 1] = 1
    assert segment(paddle.to_tensor(everywhere), 4, 4).min() == 1


# --- videos ---


@pytest.mark.smoke
def test_moving_objects_are_followed(tmp_path):
    root = write_video(tmp_path / "davis", "two", moving([8, -8], 5))
    write_video(tmp_path / "davis", "one", moving([8], 6))
    found = evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path / "out")
    assert found == {
        "J&F-Mean": 100, "J-Mean": 100, "J-Recall": 100, "J-Decay": 0, "F-Mean": 100, "F-Recall": 100, "F-Decay": 0,
    }  # fmt: skip
    with Image.open(tmp_path / "out" / "two" / "00003.png") as image:
        assert image.mode == "P"
        assert bytes(image.getpalette()) == PALETTE[: len(image.getpalette())]
        np.testing.assert_array_equal(np.asarray(image), moving([8, -8], 5)[3])
    assert sorted(path.name for path in (tmp_path / "out" / "one").iterdir()) == [f"{i:05d}.png" for i in range(6)]
    with (tmp_path / "out" / "global_results-val.csv").open() as file:
        table = list(csv.reader(file))
    assert table == [list(found), ["1.000", "1.000", "1.000", "0.000", "1.000", "1.000", "0.000"]]
    with (tmp_path / "out" / "per-sequence_results-val.csv").open() as file:
        table = list(csv.reader(file))
    assert table == [
        ["Sequence", "J-Mean", "F-Mean"],
        ["two_1", "1.000", "1.000"],
        ["two_2", "1.000", "1.000"],
        ["one_1", "1.000", "1.000"],
    ]


def test_an_answer_that_is_known_and_not_perfect(tmp_path):
    # What is seen stays where it was; the annotation moves on by 8 pixels a frame. First and last do not count.
    masks = moving([8], length=5)
    root = write_video(tmp_path / "davis", "still", masks, frames=[masks[0]] * 5)
    found = evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path)
    regions = [(24 - 8 * i) / (24 + 8 * i) for i in (1, 2, 3)]
    accuracies = [brute_accuracy(masks[0] > 0, mask > 0) for mask in masks[1:4]]
    assert found["J-Mean"] == pytest.approx(100 * np.mean(regions))
    assert found["J-Recall"] == 0
    # Three frames: the quarters' ends are 1, 1.5, 2, 2.5 and 3, rounded to 1, 2, 2, 3 and 3.
    assert found["J-Decay"] == pytest.approx(100 * (np.mean(regions[:2]) - regions[2]))
    assert found["F-Mean"] == pytest.approx(100 * np.mean(accuracies))
    assert found["J&F-Mean"] == pytest.approx((found["J-Mean"] + found["F-Mean"]) / 2)


def test_void_is_background_and_an_object_that_comes_later_does_not_count(tmp_path):
    masks = moving([8])
    annotated = [mask.copy() for mask in masks]
    for mask in annotated:
        mask[:8, 100:] = 255
    annotated[2][40:48, 104:112] = 2
    root = write_video(tmp_path / "davis", "void", annotated, frames=masks)
    found = evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path)
    assert found["J&F-Mean"] == 100
    with (tmp_path / "per-sequence_results-val.csv").open() as file:
        assert len(file.readlines()) == 2


def test_sizes(tmp_path):
    assert frame_size(480, 854, 480) == (480, 832)
    assert frame_size(854, 480, 480) == (832, 480)
    assert frame_size(480, 910, 480) == (480, 896)
    assert frame_size(100, 100, 480) == (480, 448)  # as officially: the width is rounded down
    with pytest.raises(ValueError, match="needs a shorter side of at least 64"):
        frame_size(50, 50, 40)
    # Odd, upright and square frames: masks have the frames' sizes.
    for height, width in ((131, 71), (65, 65)):
        masks = [box_mask([(8, 8, 40, 40)], height, width)] * 3
        root = write_video(tmp_path / f"{height}", "odd", masks)
        found = evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path / "out")
        assert read_mask(str(tmp_path / "out" / "odd" / "00001.png"))[0].shape == (height, width)
        assert found["J-Mean"] > 70


def test_the_palette_of_the_first_mask_is_kept(tmp_path):
    root = write_video(tmp_path / "davis", "own", moving([8], 3))
    first = tmp_path / "davis" / "Annotations" / "480p" / "own" / "00000.png"
    colours = bytes(range(255, -1, -1)) * 3
    write_mask(first, moving([8], 3)[0], colours)
    evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path)
    assert read_mask(str(tmp_path / "own" / "00002.png"))[1] == colours
    assert PALETTE[:12] == bytes([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    assert PALETTE[24:30] == bytes([64, 0, 0, 191, 0, 0])
    assert PALETTE[66:72] == bytes([22, 22, 22, 23, 23, 23])


def test_memory_does_not_grow_with_the_video(tmp_path):
    def peak(length):
        masks = [moving([8], 1)[0]] * length
        root = write_video(tmp_path / str(length), "long", masks)
        evaluator = VideoSegmentation(root, num_frames=2, **SIZE)
        tracemalloc.start()
        evaluate(evaluator, Colours(), tmp_path / "out")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(5)  # imports and caches
    assert peak(60) < peak(10) + (1 << 18)


def test_files_that_are_not_there_or_not_right(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"val.txt: root must hold JPEGImages, Annotations and ImageSets"):
        VideoSegmentation(str(tmp_path))
    root = write_video(tmp_path / "davis", "video", moving([8], 4))
    folder = tmp_path / "davis"
    listing = folder / "ImageSets" / "2017" / "val.txt"
    for text, message in (
        ("", "names no sequences"),
        ("video\nvideo\n", "occurs twice"),
        ("../video", "no name of"),
        ("..", "no name of"),
    ):
        listing.write_text(text)
        with pytest.raises(ValueError, match=message):
            find_sequences(root)
    listing.write_text("other")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*JPEGImages.*other"):
        find_sequences(root)
    listing.write_text("video")
    masks = folder / "Annotations" / "480p" / "video"
    frames = folder / "JPEGImages" / "480p" / "video"
    (masks / "._00000.png").write_bytes(b"of another system")
    assert list(find_sequences(root)[0].masks) == [f"{number:05d}" for number in range(4)]
    for number in (0, 1, 3):
        for file, message in (
            (masks / f"{number:05d}.png", rf"{number:05d}.jpg has no mask {number:05d}.png"),
            (frames / f"{number:05d}.jpg", rf"{number:05d}.png has no frame {number:05d}.jpg"),
        ):
            content = file.read_bytes()
            file.unlink()
            with pytest.raises(FileNotFoundError, match=message):
                find_sequences(root)
            file.write_bytes(content)
    for number in (3, 2):
        (masks / f"{number:05d}.png").unlink()
        (frames / f"{number:05d}.jpg").unlink()
    with pytest.raises(ValueError, match=r"has too few frames \(2\): it takes 3"):
        find_sequences(root)
    listing.write_bytes(b"\xff")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_sequences(root)


def test_damaged_files_and_others(tmp_path):
    root = write_video(tmp_path / "davis", "video", moving([8], 4))
    frame = tmp_path / "davis" / "JPEGImages" / "480p" / "video" / "00002.jpg"
    mask = tmp_path / "davis" / "Annotations" / "480p" / "video" / "00001.png"
    whole, numbers = frame.read_bytes(), mask.read_bytes()
    frame.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"00002.jpg: empty, damaged or not an image"):
        evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path)
    Image.new("RGB", (128, 72)).save(frame)
    with pytest.raises(ValueError, match=r"00002.jpg has 128 x 72 pixels, and its sequence's first mask 128 x 64"):
        evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path)
    frame.write_bytes(whole)
    Image.new("RGB", (128, 64)).save(mask)
    with pytest.raises(ValueError, match=r"00001.png: a mask must be a palette or grey image, not RGB"):
        evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path)
    write_mask(mask, np.zeros((60, 128), np.uint8))
    with pytest.raises(ValueError, match=r"00001.png has 128 x 60 pixels, and its frame 128 x 64"):
        evaluate(VideoSegmentation(root, **SIZE), Colours(), tmp_path)
    mask.write_bytes(numbers)

    class Broken(Colours):
        def feature_map(self, images):
            return super().feature_map(images) * float("nan")

    with pytest.raises(ValueError, match=r"features of .*00000.jpg are not finite"):
        evaluate(VideoSegmentation(root, **SIZE), Broken(), tmp_path)
    with pytest.raises(ValueError, match=r"shows no features of patches"):
        evaluate(VideoSegmentation(root, **SIZE), nn.Linear(3, 3), tmp_path)
    empty = write_video(tmp_path / "empty", "video", [np.zeros((64, 128), np.uint8)] * 3)
    with pytest.raises(ValueError, match="no first frame has an object"):
        evaluate(VideoSegmentation(empty, **SIZE), Colours(), tmp_path)
    assert cv2.imread(str(tmp_path / "video" / "00001.png")) is not None


def test_arguments():
    for arguments, message in (
        ({"image_size": 32}, r"image_size \(32\) must be at least 64"),
        ({"topk": 0}, r"topk \(0\) at least 1"),
        ({"folder": "../x"}, "must not lead out"),
        ({"temperature": 0.01}, r"temperature \(0.01\) at least 0.02"),  # exp(1 / 0.01) is infinite
        ({"split": "../val"}, r"split \('../val'\) must be the name of a list"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoSegmentation("anywhere", **arguments)
