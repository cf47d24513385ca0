"""A video file that appears when it is whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional

import numpy as np

from passl.exported import require
from passl.formats.atomic import replacing
from passl.visualize.video_source import VideoError

_STEPS = 100  # of time, in that of one frame: for frames that do not come at regular times
_LARGEST_PART = {"mp4": (2**31 - 1) // _STEPS, "avi": 65535}  # of a rate's fraction; MPEG-4 has 16 bits for it


class VideoWriter:
    """Frames in, H.264 (mp4) or MPEG-4 (avi) out, without sound.

    The first frame tells the size; where a side is odd, which neither codec has, its last row or column is repeated.
    An mp4 keeps irregular times of frames; an avi has one rate.
    """

    def __init__(self, container: Any, video_format: str, rate: Fraction) -> None:
        self._container = container
        self._format = video_format
        self._rate = _simple(rate, _LARGEST_PART[video_format])
        self._av = require("av", "video")
        self._stream: Any = None
        self._size: tuple[int, int] = (0, 0)
        self._last = Fraction(-1)  # in frames
        self.count = 0

    def write(self, image: np.ndarray, time: Optional[Fraction] = None) -> None:
        """image: uint8 RGB [H, W, 3]; time: in seconds since the first frame, None for regular ones.

        Raises:
            VideoError: the image has another size than the first.
        """
        if self._stream is None:
            self._size = image.shape[:2]
            self._stream = self._new_stream()
        if image.shape[:2] != self._size:
            sizes = [" x ".join(map(str, size)) for size in (image.shape[:2], self._size)]
            raise VideoError(f"a frame of {sizes[0]} pixels is of another size than the first, of {sizes[1]}")
        height, width = self._size
        if height % 2 or width % 2:
            image = np.pad(image, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self._next_time(time), self._time_base
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    @property
    def _time_base(self) -> Fraction:
        return 1 / (self._rate * _STEPS) if self._format == "mp4" else 1 / self._rate

    def _next_time(self, time: Optional[Fraction]) -> int:
        """In units of the time base. Times within half a frame of the regular ones are made regular."""
        regular = self._last + 1
        if self._format == "mp4" and time is not None and abs(time * self._rate - regular) > Fraction(1, 2):
            regular = max(Fraction(round(time * self._rate * _STEPS), _STEPS), self._last + Fraction(1, _STEPS))
        self._last = regular
        return int(regular * _STEPS) if self._format == "mp4" else int(regular)

    def _new_stream(self) -> Any:
        height, width = (side + side % 2 for side in self._size)
        codec = "mpeg4"
        if self._format == "mp4":
            codec = next((name for name in ("libx264", "libopenh264") if name in self._av.codecs_available), "mpeg4")
        stream = self._container.add_stream(codec, rate=self._rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = self._time_base
        if codec == "libx264":
            stream.options = {"crf": "18", "preset": "medium"}
        else:
            # Generous: maps are smooth, but edges of patches are not.
            stream.bit_rate = max(400_000, int(0.35 * width * height * self._rate))
        return stream

    def finish(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())


@contextlib.contextmanager
def writing(path: Path, video_format: str, rate: Fraction) -> Iterator[VideoWriter]:
    """A writer of the video ``path``, which appears at the end if at least one frame was written and nothing failed.

    Raises:
        VideoError: it cannot be encoded, or there was no frame.
        OSError: the folder cannot be written to.
    """
    av = require("av", "video")
    options = {"movflags": "faststart"} if video_format == "mp4" else {}
    with replacing(path) as file:
        try:
            # By its name: to put the index in front, the file is read again. A relative a:b would be of a protocol a.
            with av.open(os.path.abspath(file.name), "w", format=video_format, options=options) as container:
                writer = VideoWriter(container, video_format, rate)
                yield writer
                writer.finish()
                if not writer.count:
                    raise VideoError(f"{path}: there is no frame to write")
        except av.error.FFmpegError as error:
            raise VideoError(f"{path}: cannot be encoded ({error})") from error


def _simple(rate: Fraction, largest: int) -> Fraction:
    """The nearest fraction whose parts are ``largest`` at most."""
    if max(rate.numerator, rate.denominator) <= largest:
        return rate
    return max(rate.limit_denominator(max(1, int(largest / max(rate, 1)) - 1)), Fraction(1, largest))
