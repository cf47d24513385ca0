"""Videos in and out: rates, sizes, times, rotation, damage; how maps are drawn."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import paddle
import pytest
from PIL import Image

from passl.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from passl.models import VisionTransformer
from passl.visualize.attention_maps import coloured, top_mass_masks, upsampled
from passl.visualize.attention_view import View
from passl.visualize.video import Look, attention_frames, frames_as_they_are
from passl.visualize.video_source import Frame, VideoError, natural, open_source
from passl.visualize.video_writer import writing
from tests.visualize import clips

av = pytest.importorskip("av")
pytestmark = pytest.mark.smoke


def write_frames(path, images, rate=clips.NTSC, times=None, video_format=None):
    with writing(path, video_format or path.suffix[1:], rate) as video:
        for index, image in enumerate(images):
            video.write(image, None if times is None else times[index])
    return path


@pytest.mark.parametrize("video_format", ["mp4", "avi"])
@pytest.mark.parametrize("size", [(48, 64), (47, 63), (17, 8)])
@pytest.mark.parametrize("rate", [clips.NTSC, Fraction(25), Fraction(15, 2)])
def test_what_is_written_can_be_read(tmp_path, video_format, size, rate):
    images = [clips.drawn(index, *size) if min(size) > 40 else np.full([*size, 3], 90, np.uint8) for index in range(12)]
    path = write_frames(tmp_path / f"v.{video_format}", images, rate)
    found, found_rate, _ = clips.read(path)
    assert len(found) == 12
    assert found_rate == rate
    height, width = size
    assert found[0].shape == (height + height % 2, width + width % 2, 3)
    assert np.abs(found[5][:height, :width].astype(int) - images[5]).mean() < 8
    if height % 2:
        assert np.abs(found[5][-1].astype(int) - found[5][-2]).mean() < 4  # repeated, not black
    if video_format == "mp4":
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")  # it can be played while it is loaded


def test_opencv_reads_it_too(tmp_path):
    cv2 = pytest.importorskip("cv2")
    capture = cv2.VideoCapture(str(write_frames(tmp_path / "v.mp4", map(clips.drawn, range(300)))))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 300
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(30000 / 1001)
    assert sum(1 for _ in iter(lambda: capture.read()[0], False)) == 300


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("v.avi", Fraction(2997003, 100007)),
        ("v.mp4", Fraction(2997002997, 10**8)),
        ("v.avi", Fraction(1, 10**6)),
    ],
)
def test_a_rate_that_a_file_cannot_hold_is_the_nearest(tmp_path, name, rate):
    _, found, _ = clips.read(write_frames(tmp_path / name, map(clips.drawn, range(5)), rate))
    assert float(found) == pytest.approx(float(rate), rel=1e-4, abs=2e-5)


def test_nothing_is_left_after_an_error(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"of before")
    with pytest.raises(VideoError, match="of another size"):
        write_frames(path, [clips.drawn(0), clips.drawn(0, 50, 50)])
    with pytest.raises(VideoError, match="there is no frame to write"), writing(path, "mp4", clips.NTSC):
        pass
    assert path.read_bytes() == b"of before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_keeps_rate_number_and_pictures(tmp_path):
    path = clips.write(tmp_path / "v.mp4", 20, sound=True)
    source = open_source(str(path))
    assert source.rate == clips.NTSC
    assert source.total == 20
    assert source.remarks == [f"{path}: its sound is left out"]
    frames = list(source)
    assert len(frames) == 20
    assert source.problems == []
    assert np.abs(frames[7].image.astype(int) - clips.drawn(7)).mean() < 8
    assert [frame.time for frame in frames] == [index / clips.NTSC for index in range(20)]


def test_rotation(tmp_path):
    path = clips.write(tmp_path / "v.mp4", 3)
    clips.turn(path)
    image = next(iter(open_source(str(path)))).image
    assert image.shape == (64, 48, 3)
    assert np.abs(image.astype(int) - np.rot90(clips.drawn(0), -1)).mean() < 8


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_irregular_times_are_kept(tmp_path, suffix):
    times = [0, 40, 80, 300, 340, 700, 740, 780, 1500]
    path = clips.write(tmp_path / f"v.{suffix}", len(times), times=times)
    source = open_source(str(path))
    frames = list(source)
    images, _, found = clips.read(
        write_frames(tmp_path / "out.mp4", [f.image for f in frames], source.rate, [f.time for f in frames])
    )
    assert len(images) == len(times)
    assert np.allclose([float(t) for t in found], np.array(times) / 1000, atol=0.5 / float(source.rate))


def test_times_rounded_to_milliseconds_become_regular(tmp_path):
    path = clips.write(tmp_path / "v.mkv", 40)  # mkv has milliseconds
    source = open_source(str(path))
    assert source.rate == clips.NTSC
    frames = list(source)
    _, rate, _ = clips.read(
        write_frames(tmp_path / "out.mp4", [f.image for f in frames], source.rate, [f.time for f in frames])
    )
    assert rate == clips.NTSC


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_a_truncated_file_what_is_there_is_read(tmp_path, suffix):
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = clips.write(tmp_path / f"v.{suffix}", 120, options=options)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 7 // 10])
    source = open_source(str(path))
    count = sum(1 for _ in source)
    assert 20 < count < 120
    assert len(source.problems) == 1
    assert "the file is damaged or ends early" in source.problems[0]
    assert f"{count}" in source.problems[0]


def test_what_is_no_video(tmp_path):
    with pytest.raises(VideoError, match="no such file or folder"):
        open_source(str(tmp_path / "none.mp4"))
    (tmp_path / "v.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(VideoError, match="not a video that can be read"):
        open_source(str(tmp_path / "v.mp4"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        tone = av.AudioFrame.from_ndarray(np.zeros([1, 8000], np.float32), format="fltp", layout="mono")
        tone.rate = 8000
        container.mux(stream.encode(tone))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="it has no pictures"):
        open_source(str(tmp_path / "sound.mp4"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="contains no images"):
        open_source(str(tmp_path / "empty"))


def test_a_folder_of_frames(tmp_path):
    for number in (10, 9, 1, 2):
        Image.fromarray(np.full([4, 4, 3], number, np.uint8)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "frame3.png").write_bytes(b"no image")
    Image.new("RGB", (5, 4)).save(tmp_path / "frame4.png")
    (tmp_path / "notes.txt").write_text("no frame")
    source = open_source(str(tmp_path))
    assert source.rate == 30
    assert [frame.image[0, 0, 0] for frame in source] == [1, 2, 9, 10]
    assert [problem.count("frame3.png") + problem.count("4 x 5 pixels") for problem in source.problems] == [1, 1]


def test_natural_order():
    names = ["a10", "a2", "b", "a2b", "2", "10", "²"]
    assert sorted(names, key=natural) == ["2", "10", "a2", "a2b", "a10", "b", "²"]


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    paddle.seed(0)
    model = VisionTransformer(32, 8, 3, 12, 2, 3, init_std=0.3)
    model.eval()
    return model


def draw(network, look, images, size=None, head="mean"):
    frames = [Frame(image, None) for image in images]
    return list(attention_frames(frames, network, View(head=head), look, IMAGENET_MEAN, IMAGENET_STD, size))


def level_of(network, image):
    """The mean map of an image, in 0..1, and the map itself."""
    pixels = (image.astype(np.float32) / 255 - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    maps, _ = View(head="mean").maps(network, paddle.to_tensor(pixels.transpose(2, 0, 1)[None]))
    one = maps[0, 0]
    return (one - one.min()) / (one.max() - one.min()), one


def nearly(actual, expected):
    return np.abs(actual.astype(int) - expected.astype(int)).max() <= 4


def test_layouts(network):
    image = clips.drawn(3)
    level, _ = level_of(network, image)
    colours = coloured(upsampled(level, 48, 64), "magma")
    drawn = draw(network, Look(cmap="magma"), [image])[0]
    assert nearly(drawn.picture, colours)
    overlay = draw(network, Look("overlay", alpha=0.25, cmap="magma"), [image])[0].picture
    assert nearly(overlay, image * 0.75 + colours * 0.25)
    both = draw(network, Look("side-by-side", cmap="magma"), [image])[0].picture
    assert np.array_equal(both, np.concatenate([image, drawn.attention], axis=1))


def test_the_threshold_masks(network):
    image = clips.drawn(3)
    level, one = level_of(network, image)
    mask = upsampled(top_mass_masks(one[None], 0.5)[0], 48, 64)
    picture = draw(network, Look(threshold=0.5), [image])[0].picture
    assert 0 < mask.mean() < 1
    assert not picture[~mask].any()
    assert nearly(picture[mask], coloured(upsampled(level, 48, 64), "inferno")[mask])
    overlay = draw(network, Look("overlay", threshold=0.5), [image])[0].picture
    assert np.abs(overlay[~mask] - 0.2 * image[~mask]).max() <= 1
    assert np.abs(overlay[mask].astype(int) - image[mask]).mean() > 5


def test_smooth_colours_do_not_flicker(network):
    """A frame unlike the others changes the colours of the next ones by little; by itself it would be stretched."""
    rng = np.random.default_rng(0)
    images = [clips.drawn(0)] * 20 + [rng.integers(0, 255, [48, 64, 3]).astype(np.uint8)] + [clips.drawn(0)]
    smooth = [drawn.picture for drawn in draw(network, Look(), images)]
    assert np.array_equal(smooth[0], smooth[19])
    assert np.abs(smooth[21].astype(int) - smooth[19]).mean() < 12
    alone = [drawn.picture for drawn in draw(network, Look(scale="frame"), images)]
    assert np.array_equal(alone[21], alone[19])
    assert nearly(alone[20], coloured(upsampled(level_of(network, images[20])[0], 48, 64), "inferno"))


def test_sizes(network, caplog):
    assert draw(network, Look(), [clips.drawn(0, 51, 71)])[0].picture.shape == (48, 64, 3)
    assert draw(network, Look(), [clips.drawn(0)], 32)[0].picture.shape == (32, 40, 3)
    assert draw(network, Look(), [clips.drawn(0)], [24, 80])[0].picture.shape == (24, 80, 3)
    with pytest.raises(ValueError, match="no whole patch of 8 pixels"):
        draw(network, Look(), [clips.drawn(0)], [4, 80])
    with pytest.raises(ValueError, match="a video shows one map: say which of head0, head1, head2"):
        draw(network, Look(), [clips.drawn(0)], head="all")


def test_frames_are_drawn_while_they_come(network):
    taken = []

    def frames():
        for index in range(200):
            taken.append(index)
            yield Frame(clips.drawn(index), None)

    pictures = attention_frames(frames(), network, View(head="mean"), Look(), IMAGENET_MEAN, IMAGENET_STD)
    for index, _ in enumerate(pictures):
        assert len(taken) <= index + 16


def test_large_frames_are_made_smaller(network, monkeypatch):
    monkeypatch.setattr("passl.visualize.video._MAX_PATCHES", 40)
    monkeypatch.setattr("passl.visualize.video._FEWER_PATCHES", 12)
    assert [one.picture.shape for one in draw(network, Look(), [clips.drawn(0)] * 2)] == [(24, 32, 3)] * 2


def test_maps_that_are_there_already():
    frames = [Frame(clips.drawn(index), None) for index in range(3)]
    assert np.array_equal([one.picture for one in frames_as_they_are(frames)], [frame.image for frame in frames])
    assert [one.picture.shape for one in frames_as_they_are(frames, 24)] == [(24, 32, 3)] * 3
