"""Small stand-ins of the archives of public data sets, in the formats of the real ones."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from PIL import Image

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    """An archive of files; a name that ends with a slash is a folder."""
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def tar_bytes(files: Mapping[str, bytes]) -> bytes:
    """An archive of files, in memory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def jpeg(seed: int, side: int = 8) -> bytes:
    """A picture of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


# --- pickles of Python 2 ---


def python2_pickle(value: Any) -> bytes:
    """As cPickle of Python 2 wrote it with protocol 2: every text is a string of bytes."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, str):
        value = value.encode("latin1")
    if isinstance(value, bytes):
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, (list, tuple)):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(entry) for key, entry in value.items()) + b"u"
    assert value.dtype == np.uint8
    shape = b"".join(b"J" + struct.pack("<i", size) for size in value.shape)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"  # an empty array
        b"(K\x01(" + shape + b"t"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + _python2(value.tobytes()) + b"tb"
    )


# --- CIFAR ---


class Cifar10:
    """Random images and labels: `images` [N, 32, 32, 3] and `labels` [N] of each batch."""

    def __init__(self, per_batch: int = 4, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.images = {name: _pixels(rng, per_batch) for name in CIFAR10_BATCHES}
        self.labels = {name: rng.permutation(10)[:per_batch].tolist() for name in CIFAR10_BATCHES}

    def pickled(self) -> dict[str, bytes]:
        """The files of the pickled version, in an order like that of the real archive."""
        files = {
            f"cifar-10-batches-py/{name}": python2_pickle(
                {"batch_label": name, "labels": self.labels[name], "data": _rows(images), "filenames": ["a.png"]}
            )
            for name, images in reversed(self.images.items())
        }
        meta = {"num_cases_per_batch": 4, "label_names": CIFAR10_NAMES, "num_vis": 3072}
        return {"cifar-10-batches-py/": b"", **files, "cifar-10-batches-py/batches.meta": python2_pickle(meta)}

    def binary(self) -> dict[str, bytes]:
        """The files of the binary version."""
        files = {
            f"cifar-10-batches-bin/{name}.bin": np.hstack(
                [np.array(self.labels[name], np.uint8)[:, None], _rows(images)]
            ).tobytes()
            for name, images in self.images.items()
        }
        return {**files, "cifar-10-batches-bin/batches.meta.txt": "\n".join([*CIFAR10_NAMES, "", ""]).encode()}

    def expected(self, split: str) -> dict[str, np.ndarray]:
        """The images by the paths they should have in the split's folder."""
        batches = CIFAR10_BATCHES[:5] if split == "train" else CIFAR10_BATCHES[5:]
        images = np.concatenate([self.images[name] for name in batches])
        labels = [label for name in batches for label in self.labels[name]]
        return {f"{CIFAR10_NAMES[label]}/{number:05d}.png": images[number] for number, label in enumerate(labels)}


def _pixels(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def _rows(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


class Cifar100:
    """Three training and two test images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.images = {"train": _pixels(rng, 3), "test": _pixels(rng, 2)}
        self.fine = {"train": [2, 0, 1], "test": [1, 1]}
        self.coarse = {"train": [1, 0, 0], "test": [0, 0]}
        self.fine_names, self.coarse_names = ["apple", "aquarium_fish", "baby"], ["fruit_and_vegetables", "people"]

    def pickled(self) -> dict[str, bytes]:
        """The files of the pickled version."""
        files = {
            f"cifar-100-python/{name}": python2_pickle(
                {"fine_labels": self.fine[name], "coarse_labels": self.coarse[name], "data": _rows(images)}
            )
            for name, images in self.images.items()
        }
        meta = {"fine_label_names": self.fine_names, "coarse_label_names": self.coarse_names}
        return {**files, "cifar-100-python/meta": python2_pickle(meta)}

    def binary(self) -> dict[str, bytes]:
        """The files of the binary version."""
        files = {}
        for name, images in self.images.items():
            labels = np.array([self.coarse[name], self.fine[name]], np.uint8).T
            files[f"cifar-100-binary/{name}.bin"] = np.hstack([labels, _rows(images)]).tobytes()
        return {
            **files,
            "cifar-100-binary/fine_label_names.txt": "\n".join(self.fine_names).encode(),
            "cifar-100-binary/coarse_label_names.txt": "\n".join(self.coarse_names).encode(),
        }


# --- ImageNet ---

WNIDS = ["n01440764", "n01443537", "n02119789"]
VAL_LABELS = [2, 0, 1, 0]  # of image 1, 2, ... as positions in WNIDS
# The numbers in the development kit are in another order than the ids.
KIT_NUMBERS = {"n01440764": 449, "n01443537": 2, "n02119789": 1}


def val_name(number: int) -> str:
    """Of a validation image, from 1."""
    return f"ILSVRC2012_val_{number:08d}.JPEG"


class ImageNet:
    """Two or three images of three classes, and four validation images."""

    def __init__(self) -> None:
        self.train = {
            wnid: {f"{wnid}_{10 + image}.JPEG": jpeg(10 * number + image) for image in range(2 + number % 2)}
            for number, wnid in enumerate(WNIDS)
        }
        self.val = {val_name(number): jpeg(100 + number) for number in range(1, len(VAL_LABELS) + 1)}

    def expected(self, split: str) -> dict[str, bytes]:
        """The images by the paths they should have in the split's folder."""
        if split == "train":
            return {f"{wnid}/{name}": data for wnid, images in self.train.items() for name, data in images.items()}
        return {f"{WNIDS[label]}/{name}": data for label, (name, data) in zip(VAL_LABELS, self.val.items())}

    def write_archives(self, folder: Path, compressed: bool = True) -> Path:
        """The three official archives."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tar(
            folder / "ILSVRC2012_img_train.tar",
            {f"{wnid}.tar": tar_bytes(images) for wnid, images in self.train.items()},
        )
        write_tar(folder / "ILSVRC2012_img_val.tar", self.val)
        kit = {f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in self.kit(compressed).items()}
        write_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", kit, "w:gz")
        return folder

    def kit(self, compressed: bool = True) -> dict[str, bytes]:
        """The files with the classes of validation images."""
        truth = "".join(f"{KIT_NUMBERS[WNIDS[label]]}\n" for label in VAL_LABELS)
        synsets = [{"ILSVRC2012_ID": KIT_NUMBERS[wnid], "WNID": wnid, "words": "a, b"} for wnid in WNIDS]
        return {"ILSVRC2012_validation_ground_truth.txt": truth.encode(), "meta.mat": meta_mat(synsets, compressed)}

    def write_kaggle(self, folder: Path) -> Path:
        """The unpacked Kaggle edition."""
        root = folder / "ILSVRC/Data/CLS-LOC"
        for name, data in self.expected("train").items():
            (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "train" / name).write_bytes(data)
        (root / "val").mkdir()
        for name, data in self.val.items():
            (root / "val" / name).write_bytes(data)
        rows = [f"{name[:-5]},{WNIDS[label]} 85 1 499 272 " for label, name in zip(VAL_LABELS, self.val)]
        (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))
        return folder


# --- MATLAB ---


def _element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _matrix(kind: int, shape: Sequence[int], name: str, content: bytes) -> bytes:
    head = _element(6, struct.pack("<II", kind, 0)) + _element(5, struct.pack("<ii", *shape))
    return _element(14, head + _element(1, name.encode()) + content)


def _value(value: Union[int, str]) -> bytes:
    if isinstance(value, int):
        # A small element, as MATLAB writes numbers of up to four bytes.
        return _matrix(6, (1, 1), "", struct.pack("<HHH2x", 4, 2, value))
    return _matrix(4, (1, len(value)), "", _element(4, value.encode("utf-16-le")))


def meta_mat(synsets: Sequence[Mapping[str, Any]], compressed: bool = True, name: Optional[str] = None) -> bytes:
    """A MATLAB file of version 5 with one array of structs."""
    fields = list(synsets[0])
    names = struct.pack("<HHi", 5, 4, 32) + _element(1, b"".join(field.encode().ljust(32, b"\0") for field in fields))
    values = b"".join(_value(synset[field]) for synset in synsets for field in fields)
    matrix = _matrix(2, (len(synsets), 1), name or "synsets", names + values)
    if compressed:
        packed = zlib.compress(matrix)
        matrix = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + matrix
