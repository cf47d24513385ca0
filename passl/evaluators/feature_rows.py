"""Features of a data set, streamed to .npy files: memory does not grow with the images."""

from __future__ import annotations

import csv
import glob
import io
import logging
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Optional

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from passl import distributed
from passl.data.loader import Loader
from passl.data.samples import Samples
from passl.evaluators.evaluator import warn_of_missing
from passl.evaluators.names import relative_names
from passl.formats.atomic import replacing
from passl.models.tokens import patch_features
from passl.models.vision_transformer import TokenTransformer

logger = logging.getLogger("passl")

KINDS = ("cls", "patch", "mean")
_HEADER = 192  # bytes, for any number of rows: a multiple of 64


def check_kinds(what: Sequence[str], dtype: str) -> None:
    if not what or set(what) - set(KINDS) or len(set(what)) < len(what):
        raise ValueError(f"what ({', '.join(what)}) must be one or more of {', '.join(KINDS)}, each once")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype ({dtype}) must be float16 or float32")


def image_features(model: nn.Layer, images: Tensor, what: Sequence[str], layer: int = -1) -> dict[str, Tensor]:
    """Features of images [B, C, H, W], by one pass where the network is a vision transformer.

    Args:
        what: cls, the output of the network [B, D], which is a transformer's normalised [CLS]; patch [B, h, w, D];
            mean, that of the patches [B, D].
        layer: number of the block, from 0; negative from the end.

    Raises:
        ValueError: there is no such block, or the network shows no patches, or its output is of its last block alone.
    """
    found: dict[str, Tensor] = {}
    if isinstance(model, TokenTransformer) and "cls" in what and (len(what) > 1 or layer != -1):
        depth = len(model.blocks)
        if not -depth <= layer < depth:
            raise ValueError(f"layer ({layer}) must be from {-depth} to {depth - 1}: there are {depth} blocks")
        x = model.prepare_tokens(images)
        for block in model.blocks[: layer % depth + 1]:
            x = block(x)
        x = model.norm(x)
        grid = [side // model.patch_size for side in images.shape[2:]]
        found = {"cls": x[:, 0], "patch": x[:, model.num_prefix_tokens :].reshape([x.shape[0], *grid, x.shape[2]])}
    elif "cls" in what:
        if layer != -1:
            raise ValueError(
                f"layer ({layer}) must be -1 for cls: the output of {type(model).__name__} is that of its last block; "
                "or ask for patch and mean alone"
            )
        found["cls"] = model(images)
    if "patch" not in found and set(what) & {"patch", "mean"}:
        found["patch"] = patch_features(model, images, layer)
    if "mean" in what:
        found["mean"] = found["patch"].mean(axis=[1, 2])
    return {kind: found[kind].astype("float32") for kind in what}


def write_rows(
    model: nn.Layer,
    dataset: Samples,
    targets: Mapping[str, Path],
    index: Path,
    layer: int = -1,
    dtype: str = "float32",
    batch_size: int = 64,
    num_workers: int = 0,
    numbered: bool = False,
    others: Sequence[Path] = (),
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Write the features of all samples, in their order, without those that cannot be read.

    Each process computes a share and writes it beside the first target as it comes; the first one joins the shares.
    All files take their names at the end, ``index`` last: where it is, the others are whole and belong to it.

    Args:
        model: in eval mode.
        targets: where the rows of each kind (see `image_features`) go, as .npy [N, ...].
        index: csv with a line for each row: its sample's path, and with labels, label and class.
        numbered: the index has a column ``row`` too.
        others: arrays that an earlier index listed, which go if that was another one.

    Returns:
        The number of rows, and for each kind the shape of one.

    Raises:
        ValueError: on all processes: features are not finite, do not fit ``dtype``, or differ in shape, or ``layer`` is
            none of the network's.
        BadSamplesError: more samples cannot be read than the data set allows, or all.
    """
    share = _Share(len(dataset), batch_size, distributed.rank(), distributed.world_size())
    loader = Loader(dataset, share, num_workers)
    kept: list[int] = []
    title = "features" if numbered else index.stem
    problem = None
    index.parent.mkdir(parents=True, exist_ok=True)
    with _RowFiles(targets, dtype) as files:
        try:
            for numbers, images, places in _readable(_batches(loader, share, title)):
                for kind, rows in image_features(model, images, list(targets), layer).items():
                    files.add(kind, rows.numpy()[places])
                kept += numbers.tolist()
        except ValueError as error:
            problem = str(error)
        _agree(problem)
        loader.share_bad_samples(distributed.gather_objects)
        numbers = distributed.gather_rows(np.asarray(kept, np.int64))
        warn_of_missing(title, len(numbers), len(dataset))
        shapes = files.shapes()
        if distributed.is_main():
            # Names in other encodings than the system's cannot be written as they are.
            text = _index(dataset, numbers, numbered).encode(errors="backslashreplace")
            _remove_old(index, text, others)
            files.join()
            with replacing(index) as file:
                file.write(text)
        distributed.barrier()
        return len(numbers), shapes


def _readable(batches: Iterable[tuple[np.ndarray, dict[str, Any]]]) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """Of each batch the numbers of the samples that could be read, all its images, and the places of those samples."""
    for wanted, batch in batches:
        # A sample that cannot be read is another one in the batch.
        places = np.flatnonzero(np.asarray(batch["index"]) == wanted)
        if len(places):
            images = batch["image"] if isinstance(batch["image"], Tensor) else paddle.to_tensor(batch["image"])
            yield wanted[places], images, places


def _remove_old(index: Path, text: bytes, others: Sequence[Path]) -> None:
    """The index that is not ``text``'s any more, and the arrays that would not fit the new one."""
    if not index.is_file() or index.read_bytes() != text:
        for path in others:
            if path.exists():
                logger.warning("%s is removed: it has the rows of other images", path)
                path.unlink()
    index.unlink(missing_ok=True)


def _agree(problem: Optional[str]) -> None:
    """Raises what is wrong on one process on all of them."""
    problems = [text for text in distributed.gather_objects(problem) if text is not None]
    if problems:
        raise ValueError(problems[0])


class _Share:
    """The samples of one process, a contiguous part of them in order, in batches. What a Loader needs of a sampler."""

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int) -> None:
        own = np.array_split(np.arange(length), world_size)[rank]
        self.parts = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        self.steps_per_epoch = len(self.parts)
        self.world_size = world_size

    def batches(self, start_step: int = 0, stop_step: Optional[int] = None) -> Iterator[list[tuple[int, int]]]:
        for part in self.parts[start_step:stop_step]:
            yield [(0, int(index)) for index in part]


def _batches(loader: Loader, share: _Share, title: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Each batch, and the indices of the samples that should be in it."""
    if not share.parts:  # more processes than images
        return
    hidden = None if distributed.is_main() else True  # None: shown on a terminal only
    batches = loader.iterate(0, share.steps_per_epoch)
    with tqdm(total=len(share.parts), desc=title, unit="batch", leave=False, disable=hidden) as bar:
        for part, batch in zip(share.parts, batches):
            yield part, batch
            bar.update()


class _RowFiles:
    """The rows that one process has of each kind, in files of their own until `join` makes whole ones of them.

    They have fixed names, so that what a killed run left is overwritten, or removed, by the next one.
    """

    def __init__(self, targets: Mapping[str, Path], dtype: str) -> None:
        self.targets = targets
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._files: dict[str, BinaryIO] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._counts = dict.fromkeys(targets, 0)
        self._total = 0

    def __enter__(self) -> _RowFiles:
        if distributed.is_main():
            for target in self.targets.values():
                for left in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):
                    left.unlink()
        distributed.barrier()
        try:
            for kind in self.targets:
                self._files[kind] = self._partial(kind).open("wb+")
                if distributed.is_main():
                    self._files[kind].write(bytes(_HEADER))
        except OSError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for name, file in self._files.items():
            file.close()
            self._partial(name).unlink(missing_ok=True)

    def add(self, kind: str, rows: np.ndarray) -> None:
        """rows: [n, ...] float32"""
        if not np.isfinite(rows).all():
            raise ValueError("features are not finite: the weights are damaged, or of another network")
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(rows, self.dtype)
        if not np.isfinite(cast).all():
            raise ValueError(f"features up to {np.abs(rows).max():.3g} do not fit {self.dtype.name}: take float32")
        before = self._shapes.setdefault(kind, rows.shape[1:])
        if before != rows.shape[1:]:
            raise ValueError(_different(kind, before, rows.shape[1:]))
        self._files[kind].write(cast.data)
        self._counts[kind] += len(rows)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one row of each kind. To be called by all processes, once all rows are written."""
        for file in self._files.values():
            file.flush()
        self._total = sum(distributed.gather_objects(self._counts[next(iter(self.targets))]))
        shapes: dict[str, tuple[int, ...]] = {}
        for others in distributed.gather_objects(self._shapes):
            for kind, shape in others.items():
                if shapes.setdefault(kind, shape) != shape:
                    raise ValueError(_different(kind, shapes[kind], shape))
        self._shapes = shapes
        return shapes

    def join(self) -> None:
        """Append the other processes' rows to those of this one, the first, and give the files their names."""
        for kind in self.targets:
            whole = self._files[kind]
            for rank in range(1, distributed.world_size()):
                with self._partial(kind, rank).open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 22)
            whole.seek(0)
            whole.write(_header(self.dtype, (self._total, *self._shapes[kind])))
            whole.flush()
            os.fsync(whole.fileno())
        for kind, target in self.targets.items():
            os.replace(self._partial(kind), target)

    def _partial(self, kind: str, rank: Optional[int] = None) -> Path:
        target = self.targets[kind]
        return target.with_name(f"{target.name}.{distributed.rank() if rank is None else rank}.partial")


def _different(kind: str, one: Sequence[int], other: Sequence[int]) -> str:
    return (
        f"the {kind} features of two images differ in shape ({list(one)} and {list(other)}): give the data set a "
        "transform that makes sizes equal, such as CenterCrop, or Resize with [height, width]"
    )


def _header(dtype: np.dtype, shape: Sequence[int]) -> bytes:
    """Of an .npy file, version 1.0, in ``_HEADER`` bytes."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    magic = np.lib.format.magic(1, 0)
    length = _HEADER - len(magic) - 2
    return magic + struct.pack("<H", length) + text.ljust(length - 1).encode() + b"\n"


def _index(dataset: Samples, numbers: np.ndarray, numbered: bool) -> str:
    labels, classes = dataset.labels, dataset.class_names
    names = relative_names(dataset)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    optional = [("label", labels is not None), ("class", bool(classes)), ("row", numbered)]
    writer.writerow(["path", *[name for name, given in optional if given]])
    for row, number in enumerate(numbers):
        cells = [names[number]]
        if labels is not None:
            cells.append(str(labels[number]))
        if classes:
            cells.append(classes[labels[number]] if labels[number] >= 0 else "")
        writer.writerow([*cells, str(row)] if numbered else cells)
    return text.getvalue()
