"""Frames of a video file or of a folder of images, one after the other: memory does not grow with their number."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np

from passl.data.image_io import UnreadableImageError, image_extensions, read_rgb
from passl.exported import require

FOLDER_RATE = Fraction(30)


class VideoError(ValueError):
    """A video that cannot be read or written; the text names it."""


class Frame(NamedTuple):
    """image: uint8 RGB [H, W, 3], upright; time: seconds since the first frame, None where there is but a rate."""

    image: np.ndarray
    time: Optional[Fraction]


class Source(Protocol):
    """Where frames come from.

    Attributes:
        rate: frames a second.
        total: number of frames; an estimate, or None where the container does not tell.
        remarks: what a user should know beforehand.
        problems: what could not be read; complete when the frames have been iterated.
    """

    rate: Fraction
    total: Optional[int]
    remarks: list[str]
    problems: list[str]

    def __iter__(self) -> Iterator[Frame]: ...


def open_source(path: str) -> Source:
    """The frames of a video file, or of a folder of images in natural order (frame2 before frame10).

    Raises:
        VideoError: there is nothing at ``path``, or nothing to see.
        ExportError: PyAV is not installed.
    """
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file or folder")
    return FolderSource(path) if os.path.isdir(path) else FileSource(path)


class FolderSource:
    """The images of a folder, not of those in it. An image that is damaged or of another size than the first is left
    out."""

    def __init__(self, path: str) -> None:
        extensions = image_extensions()
        names = [name for name in os.listdir(path) if os.path.splitext(name)[1].lower() in extensions]
        self._paths = [os.path.join(path, name) for name in sorted(names, key=natural) if not name.startswith(".")]
        if not self._paths:
            raise VideoError(f"{path} contains no images")
        self.rate, self.total = FOLDER_RATE, len(self._paths)
        self.remarks: list[str] = []
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[Frame]:
        size = None
        for path in self._paths:
            try:
                image = np.asarray(read_rgb(path))
            except UnreadableImageError as error:
                self.problems.append(str(error))
                continue
            size = size or image.shape
            if image.shape == size:
                yield Frame(image, None)
            else:
                sizes = [" x ".join(map(str, shape[:2])) for shape in (image.shape, size)]
                self.problems.append(f"{path}: {sizes[0]} pixels, and the first frame has {sizes[1]}")


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


class FileSource:
    """The pictures of a video file; its sound is left out."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._av = require("av", "video")
        with self._opened() as container:
            if not container.streams.video:
                raise VideoError(f"{path}: it has no pictures")
            stream = container.streams.video[0]
            self.rate = _rate_of(stream)
            self._duration = Fraction(container.duration, self._av.time_base) if container.duration else None
            self._told = stream.frames
            estimate = round(self._duration * self.rate) if self._duration else None
            self.total = self._told or estimate
            # Other containers without a number of frames guess their duration from the size of the file.
            self._is_matroska = "matroska" in container.format.name
            # Sound may be longer than the pictures.
            self._margin = 1 if container.streams.audio and not self._told else 2 / self.rate
            self.remarks = [f"{path}: its sound is left out"] if container.streams.audio else []
        self.problems: list[str] = []

    def _opened(self) -> Any:
        try:
            # A relative 9:30.mp4 would be of a protocol 9. Titles may be in another encoding than UTF-8.
            return self._av.open(os.path.abspath(self._path), metadata_errors="replace")
        except (self._av.error.FFmpegError, OSError) as error:
            raise VideoError(f"{self._path}: not a video that can be read ({error})") from error

    def __iter__(self) -> Iterator[Frame]:
        count, damaged, end, first, size = 0, 0, Fraction(0), None, None
        with self._opened() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in self._decoded(container, stream):
                if frame is None:
                    damaged += 1
                    continue
                time = None if frame.pts is None else frame.pts * frame.time_base
                size = size or (frame.width, frame.height)  # streams may change it
                count += 1
                if time is None:
                    end += 1 / self.rate
                else:
                    first = time if first is None else first
                    end = max(end, time - first + 1 / self.rate)
                yield Frame(_upright(frame, stream, *size), None if time is None else time - first)
        self._note_what_is_missing(count, damaged, end)

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        """Frames; None for a packet that is damaged."""
        packets, packet = container.demux(stream), None
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except self._av.error.EOFError:
                return
            except self._av.error.FFmpegError:
                frames = [None]
                if packet is None:
                    yield None
                    return
            yield from frames
            if packet is None:
                return

    def _note_what_is_missing(self, count: int, damaged: int, end: Fraction) -> None:
        is_short = self._duration is not None and end < self._duration - self._margin
        # An edit list, which cuts frames away, makes the duration shorter too.
        is_cut = is_short and (count + 1 < self._told if self._told else self._is_matroska)
        if damaged or is_cut:
            of = f" of {self._told}" if self._told else ""
            self.problems.append(f"{self._path}: the file is damaged or ends early, {count}{of} frames could be read")


def _rate_of(stream: Any) -> Fraction:
    """Frames a second: the smallest rate that all times fit, if it is about that of the frames there are."""
    average, guessed = stream.average_rate, stream.guessed_rate
    if average and guessed and abs(guessed / average - 1) < Fraction(1, 100):
        return Fraction(guessed)
    rate = Fraction(average or guessed or 0)
    return rate if 0 < rate <= 1000 else Fraction(25)


def _upright(frame: Any, stream: Any, width: int, height: int) -> np.ndarray:
    image = frame.reformat(width, height, "rgb24").to_ndarray()
    # Counter-clockwise, as the file asks to be shown. PyAV before 13 has it elsewhere.
    degrees = getattr(frame, "rotation", None)
    if degrees is None:
        degrees = (getattr(stream, "side_data", None) or {}).get("DISPLAYMATRIX", 0)
    quarters = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarters)) if quarters else image
