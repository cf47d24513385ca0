"""The one file that ``passl-export`` writes: its description, its preprocessing, and how it is read and run.

``.passl`` is an uncompressed zip of Paddle's inference program (``model.json``, of Paddle 2 ``model.pdmodel``), its
weights ``model.pdiparams`` and the description ``meta.json``. ``.onnx`` has the description in its metadata, under the
key ``passl``. Running an ``.onnx`` needs no Paddle.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
from PIL import Image

from passl.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    Normalize,
    Resize,
    ToTensor,
)

SUFFIXES = {"paddle": ".passl", "onnx": ".onnx"}
PROGRAMS = ("model.json", "model.pdmodel")
WEIGHTS, META = "model.pdiparams", "meta.json"
ONNX_KEY = "passl"
_VERSION = 2  # 2: channels
_MAX_META_BYTES = 1 << 26
_TRANSFORMS = {kind.__name__: kind for kind in (Resize, CenterCrop, ToTensor, Normalize)}

Engine = Callable[[np.ndarray], list[np.ndarray]]
PathLike = Union[str, Path]


class ExportError(ValueError):
    """An export that cannot be made, read or run; the text says why and what to do."""


@dataclass
class Meta:
    """What is known about an exported network.

    Attributes:
        input_shape: of ``images``, float32, normalised: [None, C, H, W]; None is any (H and W: any multiple of
            ``multiple_of``).
        outputs: ``features`` [B, D] and, with a classifier, ``probabilities`` [B, C] (a linear one: ``logits`` too).
        preprocessing: from an image to one input: ``[{"Resize": {"size": 256}}, ...]``, as in a configuration.
        channels: how images are read: None is 8-bit RGB, a number as they are stored (see ``ImageSource``).
        class_names: of the C classes; empty without a classifier.
        classifier: ``{"kind": "linear"}``, ``{"kind": "knn", "k": 20, ...}`` or None.
        comparison: what the comparison at export found, a row for each input.
    """

    architecture: dict[str, Any]
    input_shape: list[Optional[int]]
    multiple_of: int
    outputs: list[str]
    preprocessing: list[dict[str, Any]]
    class_names: list[str] = field(default_factory=list)
    classifier: Optional[dict[str, Any]] = None
    channels: Optional[int] = None
    comparison: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"passl_export": _VERSION, **asdict(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: Union[str, bytes]) -> Meta:
        """Raises ExportError for anything that :meth:`to_json` of this or an earlier version does not write."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ExportError(f"its description is no JSON ({error})") from error
        if not isinstance(values, dict) or not isinstance(values.get("passl_export"), int):
            raise ExportError("it was not written by passl-export")
        if values.pop("passl_export") > _VERSION:
            raise ExportError("it was written by a newer passl: upgrade this one")
        values.setdefault("channels", None)
        names = {one.name for one in fields(cls)}
        if set(values) != names:
            raise ExportError(f"its description has the keys {sorted(values)}, not {sorted(names)}")
        meta = cls(**values)
        meta._check()
        return meta

    def _check(self) -> None:
        shape = self.input_shape
        sides_fit = isinstance(shape, list) and len(shape) == 4 and all(s is None or _is_size(s) for s in shape)
        if not sides_fit or shape[1] is None or not _is_size(self.multiple_of):
            raise ExportError(f"its input shape is {shape}, in multiples of {self.multiple_of}")
        if self.channels is not None and (not _is_size(self.channels) or self.channels != shape[1]):
            raise ExportError(f"its images have {self.channels!r} channels, and its input shape is {shape}")
        for name in ("outputs", "class_names"):
            if not all(isinstance(one, str) for one in _listed(getattr(self, name), name)):
                raise ExportError(f"its {name} are no list of texts")
        if self.outputs[:1] != ["features"] or (self.class_names and "probabilities" not in self.outputs):
            raise ExportError(f"its outputs are {self.outputs}")
        transform(self.preprocessing)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _listed(value: Any, name: str) -> list:
    if not isinstance(value, list):
        raise ExportError(f"its {name} are no list")
    return value


# --- preprocessing ---------------------------------------------------------------------------------------------------


def transform(preprocessing: Sequence[Mapping[str, Any]]) -> Compose:
    """``preprocessing`` as a function from an image to a float32 array [C, H, W].

    Raises:
        ExportError: a step is not one of Resize, CenterCrop, ToTensor, Normalize, or refuses its arguments.
    """
    steps = []
    for spec in _listed(preprocessing, "preprocessing steps"):
        if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in _TRANSFORMS:
            raise ExportError(
                f"the preprocessing step {spec} is not one of {', '.join(_TRANSFORMS)}: an exported network needs "
                "those of validation"
            )
        ((name, arguments),) = spec.items()
        try:
            steps.append(_TRANSFORMS[name](**(arguments or {})))
        except (TypeError, ValueError) as error:
            raise ExportError(f"the preprocessing step {name} refuses {arguments}: {error}") from error
    return Compose(steps)


def standard_preprocessing(
    height: int, width: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> list[dict[str, Any]]:
    """The official evaluation's for a square (the shorter side to 8/7 of it, the centre); else a plain resize."""
    geometry: list[dict[str, Any]] = [{"Resize": {"size": [height, width], "interpolation": "bicubic"}}]
    if height == width:
        geometry = [
            {"Resize": {"size": round(height * 256 / 224), "interpolation": "bicubic"}},
            {"CenterCrop": {"size": height}},
        ]
    return [*geometry, {"ToTensor": {}}, {"Normalize": {"mean": list(mean), "std": list(std)}}]


def at_size(preprocessing: Sequence[Mapping[str, Any]], height: int, width: int) -> list[dict[str, Any]]:
    """``preprocessing`` with its Normalize, and the standard way to ``height`` x ``width`` in place of its own."""
    standard = standard_preprocessing(height, width)
    return [*standard[:-1], *[dict(step) for step in preprocessing if "Normalize" in step]]


def output_size(
    preprocessing: Sequence[Mapping[str, Any]], channels: Optional[int] = None
) -> tuple[Optional[int], Optional[int]]:
    """Height and width that all images have after ``preprocessing``; None: they differ."""
    steps = transform(preprocessing)
    sizes = ((311, 457), (523, 359))
    if channels in (None, 3):
        arrays = [np.asarray(steps(Image.new("RGB", size))) for size in sizes]
    else:
        arrays = [np.asarray(steps(np.zeros((*size, channels), np.float32))) for size in sizes]
    if any(array.ndim != 3 or array.dtype != np.float32 for array in arrays):
        raise ExportError("the preprocessing must end in ToTensor and Normalize")
    (height, width), other = arrays[0].shape[1:], arrays[1].shape[1:]
    return (height if height == other[0] else None, width if width == other[1] else None)


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes ``path`` once everything went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def program_in(folder: Path) -> Path:
    """The program among Paddle's files in ``folder``; version 3 writes another kind than version 2."""
    return next(folder / name for name in PROGRAMS if (folder / name).is_file())


def pack(folder: Path, path: Path) -> None:
    """Program, weights and description in ``folder`` as one ``.passl``."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for file in (folder / META, program_in(folder), folder / WEIGHTS):
            # A fixed date: equal exports are equal files.
            with file.open("rb") as source, archive.open(zipfile.ZipInfo(file.name), "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 22)


# --- reading ---------------------------------------------------------------------------------------------------------


class ExportedNetwork:
    """A file of ``passl-export``, ready to run.

    Args:
        device: "cpu", "gpu", or "auto", the GPU where the installed Paddle or onnxruntime finds one.

    Raises:
        ExportError: no such file, not of ``passl-export``, damaged, or made for another Paddle.
    """

    def __init__(self, path: PathLike, device: str = "auto") -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ExportError(f"{self.path}: no such file")
        open_file = _open_onnx if self.path.suffix == SUFFIXES["onnx"] else _open_paddle
        try:
            self.meta, self._engine = open_file(self.path, device)
        except ExportError as error:
            raise ExportError(f"{self.path}: {error}") from error

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """images: [B, C, H, W] float32, preprocessed -> arrays by the names in ``meta.outputs``."""
        _, channels, *sides = self.meta.input_shape
        given = images.shape[2:] if images.ndim == 4 and images.shape[1] == channels else ()
        unit = self.meta.multiple_of
        if len(given) != 2 or any(side % unit if want is None else side != want for side, want in zip(given, sides)):
            size = " x ".join(f"any multiple of {unit}" if side is None else str(side) for side in sides)
            raise ExportError(f"{self.path} takes images [B, {channels}, {size}], not {list(images.shape)}")
        try:
            results = self._engine(np.ascontiguousarray(images, dtype=np.float32))
        # Neither Paddle's nor onnxruntime's errors have a common class below Exception.
        except Exception as error:
            raise ExportError(f"{self.path} fails on images {list(images.shape)}: {error}") from error
        found = dict(zip(self.meta.outputs, results))
        if len(results) != len(self.meta.outputs) or any(rows.ndim != 2 for rows in results):
            raise ExportError(f"{self.path}: damaged, its outputs are not {', '.join(self.meta.outputs)}")
        num_classes = found["probabilities"].shape[1] if "probabilities" in found else 0
        if num_classes != len(self.meta.class_names):
            raise ExportError(
                f"{self.path}: damaged, it has {num_classes} classes and {len(self.meta.class_names)} names for them"
            )
        return found


def _open_paddle(path: Path, device: str) -> tuple[Meta, Engine]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            meta = unpack(path, Path(folder))
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise ExportError(f"damaged, or not a file of passl-export ({error})") from error
        return meta, paddle_engine(Path(folder), device)


def unpack(path: Path, folder: Path) -> Meta:
    """Write the members of a ``.passl`` to ``folder``, under the names that they always have; returns the description.

    Raises:
        ExportError: it has other members, or compressed ones.
        zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError: damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        program = next((name for name in PROGRAMS if name in names), PROGRAMS[0])
        if sorted(names) != sorted([program, WEIGHTS, META]):
            raise ExportError(f"not a file of passl-export: it contains {', '.join(sorted(names)[:5]) or 'nothing'}")
        # Nothing is unpacked to a size that only the file claims.
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ExportError("its members are compressed, as passl-export never does: refused")
        if archive.getinfo(META).file_size > _MAX_META_BYTES:
            raise ExportError(f"its description is larger than {_MAX_META_BYTES >> 20} MB: refused")
        meta = Meta.from_json(archive.read(META))
        for name in names:
            with archive.open(name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
    return meta


def paddle_engine(folder: Path, device: str = "cpu") -> Engine:
    """Paddle's inference on the program in ``folder``, which is not needed afterwards."""
    paddle = require("paddle", "cpu")
    from paddle import inference

    program = program_in(folder)
    if program.name == PROGRAMS[0] and 0 < int(paddle.__version__.split(".")[0]) < 3:  # 0: a nightly build
        # Its reader would crash the process.
        raise ExportError(f"the program was written by Paddle 3, and this is Paddle {paddle.__version__}: upgrade it")
    config = inference.Config(str(program), str(folder / WEIGHTS))
    config.disable_glog_info()
    # Paddle 3.3's overwrites values that are still needed, such as an output.
    config.delete_pass("inplace_pass")
    config.switch_ir_optim(False)
    if device != "cpu" and paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        config.enable_use_gpu(256, 0)
    elif device == "gpu":
        raise ExportError("this Paddle finds no GPU: use --device cpu")
    else:
        config.set_cpu_math_library_num_threads(_num_cores())
    try:
        predictor = inference.create_predictor(config)
    # Its errors have no common class below Exception.
    except Exception as error:
        raise ExportError(f"damaged: Paddle cannot open its program or weights ({error})") from error
    handle = predictor.get_input_handle(predictor.get_input_names()[0])

    def run(images: np.ndarray) -> list[np.ndarray]:
        handle.copy_from_cpu(images)
        predictor.run()
        return [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]

    return run


def _open_onnx(path: Path, device: str) -> tuple[Meta, Engine]:
    session = _onnx_session(path, device)
    text = session.get_modelmeta().custom_metadata_map.get(ONNX_KEY)
    if text is None:
        raise ExportError("not a file of passl-export: its metadata has no key 'passl'")
    return Meta.from_json(text), _onnx_engine(session)


def onnx_engine(path: Path) -> Engine:
    """onnxruntime on the CPU."""
    return _onnx_engine(_onnx_session(path, "cpu"))


def _onnx_engine(session: Any) -> Engine:
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _onnx_session(path: Path, device: str) -> Any:
    onnxruntime = require("onnxruntime", "onnx")
    on_gpu = device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "gpu" and not on_gpu:
        raise ExportError("this onnxruntime has no GPU: pip install onnxruntime-gpu, or use --device cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = _num_cores()
    providers = ["CUDAExecutionProvider"] * on_gpu + ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    # Its errors have no common class below Exception.
    except Exception as error:
        raise ExportError(f"onnxruntime cannot open it: {error}") from error


def require(module: str, extra: str) -> Any:
    """The optional ``module``, or ExportError that names passl's extra."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f'{module} is not installed: pip install "passl[{extra}]"') from error


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
