"""passl-visualize video: videos and folders in, a video out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.cli import visualize_main
from passl.predict import pictures
from tests.visualize import clips

pytest.importorskip("av")

NETWORK = ("--arch", "VisionTransformer", "--set", "embed_dim=12", "--set", "depth=2", "--set", "num_heads=2",
           "--patch_size", "8", "--set", "img_size=32", "--device", "cpu")  # fmt: skip


def video(*arguments):
    visualize_main(["video", *map(str, arguments)])


def error_of(capsys, code, *arguments):
    with pytest.raises(SystemExit) as stopped:
        video(*arguments)
    assert stopped.value.code == code
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clips.write(tmp_path_factory.mktemp("clips") / "clip.mp4", 10, sound=True)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ((), (48, 64)),
        (("--layout", "overlay", "--alpha", "0.5", "--threshold", "0.6"), (48, 64)),
        (("--layout", "side-by-side", "--head", "1", "--layer", "0", "--resize", "30", "50"), (24, 96)),
        (("--resize", "32", "--rollout", "--scale", "frame", "--cmap", "gray"), (32, 40)),
        (("--video_format", "avi"), (48, 64)),
    ],
)
def test_a_video(clip, tmp_path, capsys, options, size):
    video("--input_path", clip, "--output_path", tmp_path / "out", *NETWORK, *options)
    path = tmp_path / "out" / ("video.avi" if "avi" in options else "video.mp4")
    assert list(path.parent.iterdir()) == [path]
    frames, rate, _ = clips.read(path)
    assert len(frames) == 10
    assert rate == clips.NTSC
    assert frames[0].shape[:2] == size
    printed = capsys.readouterr()
    assert f"{path}: 10 frames, 30000/1001 a second" in printed.out
    assert "its sound is left out" in printed.err


@pytest.mark.smoke
def test_frames_maps_and_the_way_back(clip, tmp_path):
    """--save_frames writes what the official code leaves; --video_only makes a video of it, at any rate."""
    video("--input", clip, "--output", tmp_path, "--save_frames", *NETWORK)
    names = [f"attn-frame-{index:06d}.png" for index in range(10)]
    assert sorted(path.name for path in (tmp_path / "attention").iterdir()) == names
    frame = np.asarray(Image.open(tmp_path / "frames/frame-000007.png")).astype(int)
    assert np.abs(frame - clips.drawn(7)).mean() < 8
    first, _, _ = clips.read(tmp_path / "video.mp4")
    video("--input", tmp_path / "attention", "--video_only", "--fps", "12.5", "--output", tmp_path / "again")
    again, rate, _ = clips.read(tmp_path / "again/video.mp4")
    assert rate == 12.5
    assert np.abs(np.array(first).astype(int) - np.array(again)).mean() < 2
    video("--input", tmp_path / "frames", "--output", tmp_path / "folder", *NETWORK)
    folder, rate, _ = clips.read(tmp_path / "folder/video.mp4")
    assert rate == 30
    assert np.abs(np.array(folder).astype(int) - np.array(first)).mean() < 1


@pytest.mark.smoke
def test_another_rate_keeps_all_frames(clip, tmp_path):
    video("--input", clip, "--output", tmp_path, "--fps", "30000/2002", "--video_only")
    frames, rate, times = clips.read(tmp_path / "video.mp4")
    assert len(frames) == 10
    assert rate == clips.NTSC / 2
    assert times[-1] == 9 / rate


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--layer", "2"), 2, "layer (2) must be from -2 to 1: there are 2 blocks"),
        (("--head", "2"), 2, "head (2) must be from 0 to 1"),
        (("--head", "all"), 2, "a video shows one map, say the number of a head, or mean"),
        (("--fps", "0"), 2, "'0' must be frames a second, such as 24, 29.97 or 30000/1001"),
        (("--resize", "1", "2", "3"), 2, "--resize 1 2 3: one number, or height and width"),
        (("--resize", "4"), 2, "no whole patch of 8 pixels"),
        (("--resize", "9000"), 2, "48 x 64 pixels, resized to 9000, would be 1.08e+08 pixels: give a smaller size"),
        (("--resize", "2", "20000", "--video_only"), 1, "video.mp4: cannot be encoded"),
        (("--resize", "2", "20000", "--video_only", "--video_format", "avi"), 1, "video.avi: cannot be encoded"),
        (("--threshold", "0"), 2, "'0' must be above 0 and at most 1"),
        (("--video_only", "--threshold", "0.5", "--layout", "overlay"), 2, "--threshold, --layout: of attention"),
        (("--cmap", "no"), 2, "--cmap: cmap ('no') must be a colour map of matplotlib"),
    ],
)
def test_errors(clip, tmp_path, capsys, arguments, code, message):
    error = error_of(capsys, code, "--input", clip, "--output", tmp_path / "out", *NETWORK, *arguments)
    assert message in error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.smoke
@pytest.mark.parametrize("video_format", ["mp4", "avi"])
def test_a_rate_with_many_digits(clip, tmp_path, video_format):
    video("--input", clip, "--output", tmp_path, "--video_only", "--fps", "29.970029970029970", "--video_format",
          video_format)  # fmt: skip
    assert clips.read(tmp_path / f"video.{video_format}")[1] == clips.NTSC


@pytest.mark.smoke
def test_names_that_could_be_addresses(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file:12:30.mp4").write_bytes(clip.read_bytes())
    video("--input", "file:12:30.mp4", "--output", "file:out", "--video_only")
    assert len(clips.read(tmp_path / "file:out" / "video.mp4")[0]) == 10
    assert len(list(pictures(["file:12:30.mp4"]))) == 10


@pytest.mark.smoke
def test_a_title_in_another_encoding(clip, tmp_path):
    path = tmp_path / "old.mp4"
    path.write_bytes(clip.read_bytes().replace(b"Lavf", b"\xe9t\xe9 "))
    video("--input", path, "--output", tmp_path / "out", "--video_only")
    assert len(clips.read(tmp_path / "out" / "video.mp4")[0]) == 10
    assert len(list(pictures([str(path)]))) == 10


@pytest.mark.smoke
def test_too_little_memory(clip, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise MemoryError("(ResourceExhausted) Fail to alloc memory")

    monkeypatch.setattr("passl.models.functional.attention_weights", full)
    error = error_of(capsys, 2, "--input", clip, "--output", tmp_path, *NETWORK)
    assert "--resize: the memory does not suffice for such frames, give a smaller size" in error


@pytest.mark.smoke
def test_the_input_is_not_overwritten(tmp_path, capsys):
    path = clips.write(tmp_path / "video.mp4", 3)
    before = path.read_bytes()
    assert "that would overwrite the input" in error_of(capsys, 2, "--input", path, "--output", tmp_path, *NETWORK)
    assert path.read_bytes() == before


@pytest.mark.smoke
def test_a_moving_gif_and_a_single_picture(tmp_path):
    images = [Image.fromarray(clips.drawn(index)) for index in range(4)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    images[0].save(tmp_path / "b.png")
    for name, count in (("a.gif", 4), ("b.png", 1)):
        video("--input", tmp_path / name, "--output", tmp_path / name[0], *NETWORK)
        frames, rate, _ = clips.read(tmp_path / name[0] / "video.mp4")
        assert len(frames) == count
        assert count == 1 or rate == 10


@pytest.mark.smoke
def test_what_is_no_video(tmp_path, capsys):
    assert "no such file or folder" in error_of(capsys, 1, "--input", tmp_path / "none.mp4", *NETWORK)
    (tmp_path / "v.mp4").write_bytes(b"no video" * 99)
    assert "not a video that can be read" in error_of(capsys, 1, "--input", tmp_path / "v.mp4", *NETWORK)
    (tmp_path / "frames").mkdir()
    assert "contains no images" in error_of(capsys, 1, "--input", tmp_path / "frames", *NETWORK)
    (tmp_path / "frames/1.png").write_bytes(b"no image")
    error = error_of(capsys, 1, "--input", tmp_path / "frames", "--output", tmp_path / "out", *NETWORK)
    assert "there is no frame to write" in error
    assert "1.png" in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.smoke
def test_of_a_truncated_video_what_is_there_is_written(tmp_path, capsys):
    path = clips.write(tmp_path / "v.mp4", 120, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    error = error_of(capsys, 1, "--input", path, "--output", tmp_path / "out", "--video_only")
    assert "v.mp4: the file is damaged or ends early" in error
    assert f"{len(clips.read(tmp_path / 'out/video.mp4')[0])} of 120 frames could be read" in error


@pytest.mark.smoke
def test_without_pyav_the_extra_is_named(clip, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert 'av is not installed: pip install "passl[video]"' in error_of(capsys, 1, "--input", clip, *NETWORK)


@pytest.mark.smoke
def test_a_network_without_attention(clip, tmp_path, capsys):
    error = error_of(capsys, 2, "--input", clip, "--output", tmp_path / "out", "--arch", "resnet18")
    assert "ResNet has no [CLS] token that attends to patches" in error
    assert not list((tmp_path / "out").iterdir())


COMMAND = "import sys; from passl.cli import visualize_main; visualize_main(sys.argv[1:])"
PEAK = f"{COMMAND}; import json, resource; print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))"


def started(code, *arguments, **more):
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", code, "video", *map(str, arguments)], env=environment, cwd=root, text=True, **more
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_frames(tmp_path):
    """Of 700 frames of 240 x 320 another 600 would be 138 MB, without the tensors and maps of each."""
    peaks = []
    for count in (100, 700):
        path = clips.write(tmp_path / f"{count}.mp4", count, (240, 320))
        process = started(PEAK, "--input", path, "--output", tmp_path / "out", *NETWORK, stdout=subprocess.PIPE)
        peaks.append(json.loads(process.communicate()[0].splitlines()[-1]) / 1024)
        assert process.returncode == 0
        assert len(clips.read(tmp_path / "out/video.mp4")[0]) == count
    assert peaks[1] - peaks[0] < 100, f"MB: {peaks}"  # equal runs differ by some 40, now and then


def test_a_killed_run_leaves_no_half_video(tmp_path):
    path = clips.write(tmp_path / "v.mp4", 300, (240, 320))
    output = tmp_path / "out"
    process = started(COMMAND, "--input", path, "--output", output, *NETWORK)
    deadline = time.time() + 120
    while not any(one.stat().st_size for one in output.glob("*.partial")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(output.glob("*.partial"))
    assert not (output / "video.mp4").exists()
