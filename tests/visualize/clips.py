"""Videos for tests."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

NTSC = Fraction(30000, 1001)


def drawn(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square that moves to the right over dark green, its top left corner marked in blue."""
    image = np.zeros([height, width, 3], np.uint8)
    image[..., 1] = 40
    image[:16, :16] = (0, 0, 255)
    left = 3 * index % (width - 16)
    image[24:40, left : left + 16] = (255, 200, 30)
    return image


def write(
    path: Path,
    count: int,
    size: tuple[int, int] = (48, 64),
    rate: Fraction = NTSC,
    times=None,
    sound: bool = False,
    options=None,
) -> Path:
    """``times``: of the frames, in milliseconds, in place of a rate."""
    import av

    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("aac", rate=8000) if sound else None
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(drawn(index, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            tone = av.AudioFrame.from_ndarray(np.zeros([1, 8000], np.float32), format="fltp", layout="mono")
            tone.rate = 8000
            container.mux(audio.encode(tone))
            container.mux(audio.encode())
    return path


def turn(path: Path) -> None:
    """Ask for a quarter turn clockwise in the header of an mp4."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd")
    one, quarter = 1 << 16, 1 << 30
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, quarter)
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, quarter)
    at = data.index(identity, start)
    data[at : at + 36] = matrix
    path.write_bytes(bytes(data))


def read(path: Path) -> tuple[list[np.ndarray], Fraction, list[Fraction]]:
    """Frames, average rate and times of frames."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        images = [frame.to_ndarray(format="rgb24") for frame in frames]
        return images, stream.average_rate, [frame.pts * frame.time_base for frame in frames]
