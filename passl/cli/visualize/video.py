"""``passl-visualize video``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Callable

from passl.cli import subject
from passl.cli.common import RUN_ERROR, stop
from passl.cli.visualize.attention import add_view, share, view_of

_HELP = """\
The attention of [CLS] on each frame of a video:

  passl-visualize video --input clip.mp4 --pretrained_model dino_deitsmall8_pretrain.pth --output_path out/
  passl-visualize video --input frames/ --resize 360 --layout side-by-side --pretrained_model X
  passl-visualize video --input out/attention/ --video_only --fps 24

It writes video.mp4 (H.264, without sound) into the output folder, at the frame rate of the input. A side that is odd
is made even by repeating its last row or column. Memory does not grow with the length of a video. Of a damaged one
what can be read is written; that is said, and the exit code is then 1. Needs pip install "passl[video]".
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "video",
        help="attention maps of a video",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--input", "--input_path", "--input-path", required=True, metavar="PATH",
        help="a video, or a folder of frames (frame2 comes before frame10)",
    )  # fmt: skip
    add("--output", "--output_path", "--output-path", default=".", metavar="DIR", help="default: the current folder")
    add("--fps", type=_rate, metavar="N", help="frames a second: 24, 29.97, 30000/1001 (default: the video's; else 30)")
    add(
        "--resize", nargs="+", type=_side, metavar="H [W]",
        help="of the shorter side, or height and width (default: as it is; large videos are made smaller)",
    )  # fmt: skip
    add("--video_only", "--video-only", action="store_true", help="the frames are maps already: only make the video")
    add("--video_format", "--video-format", choices=("mp4", "avi"), default="mp4", help="default: %(default)s")
    add("--threshold", type=share, metavar="T", help="show only the patches that hold this share of the attention")
    add(
        "--layout", choices=("map", "overlay", "side-by-side"), default="map",
        help="the map alone, over the frame, or at its right (default: %(default)s)",
    )  # fmt: skip
    add("--alpha", type=share, default=0.6, metavar="A", help="the map's share in an overlay (default: %(default)s)")
    add("--cmap", default="inferno", metavar="NAME", help="colours, of matplotlib (default: %(default)s)")
    add(
        "--scale", choices=("smooth", "frame"), default="smooth",
        help="colours from the smallest to the largest value: averaged over half a second, or of each frame by itself, "
        "as the official code does, which flickers (default: %(default)s)",
    )  # fmt: skip
    add("--save_frames", "--save-frames", action="store_true", help="also write frames/ and attention/ as PNG files")
    add_view(parser, head="mean")
    subject.add_options(parser)
    parser.set_defaults(run=_run)


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text).limit_denominator(1001)  # 23.976023976 is 24000/1001
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} must be frames a second, such as 24, 29.97 or 30000/1001")
    return rate


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of pixels from 1")
    return int(text)


def _run(options: argparse.Namespace) -> None:
    from passl.visualize.video_source import VideoError, open_source

    _check(options)
    try:
        source = open_source(options.input)
        rate = options.fps or source.rate
        draw = _drawing(options, rate)
        _say(source.remarks)
    except VideoError as error:
        stop(error, RUN_ERROR)
    try:
        _write(options, source, rate, draw)
    except VideoError as error:
        stop(VideoError("\n  ".join([str(error), *source.problems])), RUN_ERROR)
    if source.problems:
        _say([f"{len(source.problems)} could not be read:", *(f"  {problem}" for problem in source.problems)])
        sys.exit(RUN_ERROR)


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that contradict each other."""
    from passl.config import ConfigError
    from passl.visualize.attention_maps import coloured

    if options.resize is not None and len(options.resize) > 2:
        raise ConfigError([f"--resize {' '.join(map(str, options.resize))}: one number, or height and width"])
    about_attention = [
        name
        for name, value, default in (
            ("--head", options.head, None),
            ("--rollout", options.rollout, False),
            ("--threshold", options.threshold, None),
            ("--layout", options.layout, "map"),
            ("--save_frames", options.save_frames, False),
        )
        if value != default
    ]
    if options.video_only and about_attention:
        raise ConfigError([f"{', '.join(about_attention)}: of attention, and --video_only takes frames as they are"])
    source, folder = Path(options.input).expanduser().resolve(), Path(options.output).expanduser().resolve()
    written = [folder / f"video.{options.video_format}"]
    written += [folder / "frames", folder / "attention"] if options.save_frames else []
    if source in written:
        raise ConfigError([f"--output {options.output}: that would overwrite the input, choose another folder"])
    if options.head == "all":
        raise ConfigError(["--head all: a video shows one map, say the number of a head, or mean"])
    try:
        coloured([[0.0]], options.cmap)
    except ValueError as error:
        raise ConfigError([f"--cmap: {error}"]) from error


def _drawing(options: argparse.Namespace, rate: Fraction) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """What makes drawn frames of frames. Raises ConfigError or CheckpointError, of the network."""
    from passl.visualize.video import Look, attention_frames, frames_as_they_are

    resize = options.resize
    size = resize[0] if resize is not None and len(resize) == 1 else resize
    if options.video_only:
        return lambda frames: frames_as_they_are(frames, size)
    from passl.config import ConfigError
    from passl.engine.subject import load

    view = view_of(options, head="mean")
    look = Look(options.layout, options.alpha, options.threshold, options.cmap, options.scale)
    network = load(subject.config_of(options), "looking at")
    if network.channels not in (None, 3):
        raise ConfigError([f"a video has 3 channels, and the network takes {network.channels}"])
    return lambda frames: attention_frames(frames, network.backbone, view, look, network.mean, network.std, size, rate)


def _write(options: argparse.Namespace, source: Any, rate: Fraction, draw: Callable[..., Iterator[Any]]) -> None:
    from tqdm import tqdm

    from passl.log import harmless
    from passl.visualize.attention_files import write_png
    from passl.visualize.video_writer import writing

    folder = Path(options.output).expanduser()
    names = (("frames", "frame"), ("attention", "attn-frame")) if options.save_frames else ()
    for subfolder in ("", *(name for name, _ in names)):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    path = folder / f"video.{options.video_format}"
    frames = tqdm(source, total=source.total, unit="frame", disable=None)
    with writing(path, options.video_format, rate) as video:
        for index, drawn in enumerate(_of_the_network(draw(frames))):
            # At another rate it is faster or slower: the frames' own times are no longer theirs.
            video.write(drawn.picture, drawn.time if options.fps is None else None)
            for (subfolder, name), image in zip(names, (drawn.frame, drawn.attention)):
                write_png(folder / subfolder / f"{name}-{index:06d}.png", image)
    print(harmless(f"{path}: {video.count} frames, {rate} a second"))


def _of_the_network(frames: Iterator[Any]) -> Iterator[Any]:
    """Drawn frames. Raises ConfigError where the network has no such attention, or the memory does not suffice."""
    from passl.config import ConfigError
    from passl.visualize.video_source import VideoError

    try:
        yield from frames
    except VideoError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    except MemoryError as error:
        raise ConfigError(["--resize: the memory does not suffice for such frames, give a smaller size"]) from error


def _say(lines: list[str]) -> None:
    from passl.log import harmless

    for line in lines:
        print(harmless(line), file=sys.stderr)
