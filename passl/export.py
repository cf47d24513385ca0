"""A network as one file for inference: made static, written for Paddle or ONNX, and compared with what it came from."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import paddle

import passl
from passl import exported
from passl.exported import META, WEIGHTS, Engine, ExportError, Meta
from passl.models.exportable import Exportable, KNNNetwork, multiple_of

TOLERANCE = 1e-4  # largest difference of an output that is accepted
_OPSET = 17
_MAX_ONNX_BYTES = 2 << 30  # a protobuf file cannot be larger


# --- exporting -------------------------------------------------------------------------------------------------------


def export(
    network: Exportable,
    path: exported.PathLike,
    preprocessing: Sequence[dict[str, Any]],
    height: Optional[int] = None,
    width: Optional[int] = None,
    export_type: str = "paddle",
    class_names: Sequence[str] = (),
    architecture: Optional[dict[str, Any]] = None,
    raw: Optional[exported.PathLike] = None,
    channels: Optional[int] = None,
) -> Meta:
    """Write ``network`` (moved to the CPU, in eval mode) to the one file ``path``, for any batch size.

    Args:
        preprocessing: from an image to an input, in the form of a configuration's ``transform``.
        height, width: of the images in pixels; both None: any multiples of the patch size.
        raw: folder for program, weights and description as separate files too (Paddle only), for C++.
        channels: of the images, which are read as they are stored; None is 8-bit RGB.

    Returns:
        The description in the file, with the largest differences between the network and what was written.

    Raises:
        ExportError: the network cannot be exported, a size does not fit, the outputs differ by more than 1e-4 or are
            not finite; nothing is written then.
    """
    path = Path(path).expanduser()
    check_target(path, export_type, raw)
    exported.transform(preprocessing)
    if len(class_names) != network.num_classes:
        raise ExportError(f"class_names has {len(class_names)} names, and the network {network.num_classes} classes")
    paddle.set_device("cpu")
    network.to("cpu")
    network.eval()
    meta = Meta(
        architecture=dict(architecture or {}),
        input_shape=[None, channels or 3, height, width],
        multiple_of=multiple_of(network.backbone),
        outputs=list(network.outputs),
        preprocessing=[dict(step) for step in preprocessing],
        class_names=[str(name) for name in class_names],
        classifier=network.classifier,
        channels=channels,
        versions={"passl": passl.__version__, "paddle": paddle.__version__},
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        meta.comparison = _write_and_compare(network, folder, meta.input_shape[1:], export_type)
        if export_type == "onnx":
            _finish_onnx(folder / "model.onnx", path, meta)
            return meta
        (folder / META).write_text(meta.to_json(), encoding="utf-8")
        exported.pack(folder, path)
        if raw is not None:
            _copy_files(folder, Path(raw).expanduser())
    return meta


def check_target(path: Path, export_type: str, raw: Optional[exported.PathLike] = None) -> None:
    """Raises ExportError for a file that :func:`export` cannot write here."""
    if export_type not in exported.SUFFIXES:
        raise ExportError(f"export_type ({export_type!r}) must be one of {', '.join(exported.SUFFIXES)}")
    if path.suffix != exported.SUFFIXES[export_type]:
        raise ExportError(f"{path}: a file of type {export_type} must end in {exported.SUFFIXES[export_type]}")
    if raw is not None and export_type != "paddle":
        raise ExportError("separate files (raw) are for the type paddle: an .onnx is one file")
    if export_type == "onnx":
        check_onnx()


def _write_and_compare(
    network: Exportable, folder: Path, image: Sequence[Optional[int]], export_type: str
) -> list[dict[str, Any]]:
    """The files of Paddle, and ``model.onnx`` of the type onnx, in ``folder``; returns the rows of the comparison.

    image: [C, H, W] of an input.
    """
    channels, height, width = image
    shapes = comparison_shapes(height, width, multiple_of(network.backbone))
    batch, *sides = shapes[0]
    _outputs(network, np.zeros((batch, channels, *sides), np.float32))  # its own error, before one of making it static
    _save_program(network, folder, image)
    rows = compare(network, exported.paddle_engine(folder), shapes, "Paddle inference", channels)
    if export_type == "onnx":
        _save_onnx(folder)
        rows += compare(network, exported.onnx_engine(folder / "model.onnx"), shapes, "onnxruntime", channels)
    check_differences(rows)
    return rows


def _save_program(network: Exportable, folder: Path, image: Sequence[Optional[int]]) -> None:
    spec = paddle.static.InputSpec([None, *image], "float32", "images")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paddle.jit.save(network, str(folder / "model"), input_spec=[spec])
    # A layer of the user's own may fail in any way when it is made static.
    except Exception as error:
        # Paddle wraps the error in its own listing of the source.
        reasons = re.findall(r"^\s*(\w+(?:Error|Exception): .*)$", str(error), re.MULTILINE) or [repr(error)]
        _, height, width = image
        size = "for any image size (try a fixed one: --image-size 224)" if height is None else f"at {height} x {width}"
        raise ExportError(
            f"{type(network.backbone).__name__} cannot be made a static program {size}: {reasons[-1]}"
        ) from error


def _copy_files(folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in (exported.program_in(folder), folder / WEIGHTS, folder / META):
        with exported.replacing(target / file.name) as partial:
            shutil.copyfile(file, partial)


# --- ONNX ------------------------------------------------------------------------------------------------------------


def check_onnx() -> None:
    """Raises ExportError where this installation cannot write ONNX."""
    if 0 < int(paddle.__version__.split(".")[0]) < 3:
        raise ExportError(f"ONNX needs Paddle 3, and this is {paddle.__version__}: upgrade it, or use --format paddle")
    for module in ("paddle2onnx", "onnx", "onnxruntime"):
        exported.require(module, "onnx")


def _save_onnx(folder: Path) -> None:
    """``model.onnx`` from the program in ``folder``."""
    import paddle2onnx

    size = (folder / WEIGHTS).stat().st_size
    if size > _MAX_ONNX_BYTES:
        raise ExportError(f"{size / 1e9:.1f} GB of weights do not fit an .onnx (2 GB): use --format paddle")
    target = folder / "model.onnx"
    problem: Optional[BaseException] = None
    with _captured_output(folder / "log.txt"):
        try:
            paddle2onnx.export(
                str(exported.program_in(folder)),
                str(folder / WEIGHTS),
                str(target),
                opset_version=_OPSET,
                optimize_tool="none",  # the default one installs packages from the network by itself
            )
        # It ends the process when it fails.
        except (Exception, SystemExit) as error:
            problem = error
    if problem is not None or not target.is_file():
        said = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-5:]
        raise ExportError("\n".join(["paddle2onnx cannot convert this network:", *said])) from problem


@contextlib.contextmanager
def _captured_output(file: Path) -> Iterator[None]:
    """Sends what is printed, by Python and by C++, to ``file``."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    try:
        with file.open("w", encoding="utf-8", errors="replace") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
    finally:
        for number, copy in enumerate(saved, 1):
            os.dup2(copy, number)
            os.close(copy)


def _finish_onnx(source: Path, path: Path, meta: Meta) -> None:
    """``source`` under ``path``, with names for its outputs and the description."""
    import onnx

    model = onnx.load(str(source))
    new_names = {old.name: new for old, new in zip(model.graph.output, meta.outputs)}
    for value in model.graph.output:
        value.name = new_names[value.name]
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for node in model.graph.node:
        node.input[:] = [new_names.get(name, name) for name in node.input]
        node.output[:] = [new_names.get(name, name) for name in node.output]
    onnx.helper.set_model_props(model, {exported.ONNX_KEY: meta.to_json()})
    with exported.replacing(path) as partial:
        onnx.save(model, str(partial))


# --- comparing -------------------------------------------------------------------------------------------------------


def comparison_shapes(height: Optional[int], width: Optional[int], unit: int) -> list[tuple[int, int, int]]:
    """(batch, height, width) of the inputs to compare on: three batches and, without a fixed size, four sizes."""
    if height is not None and width is not None:
        return [(batch, height, width) for batch in (1, 2, 5)]
    side = max(unit, 224 // unit * unit)
    wide, low = side + max(unit, side // 4 // unit * unit), max(unit, side // 2 // unit * unit)
    return [(1, side, side), (3, side, side), (2, low, wide), (1, wide, low), (1, wide, wide)]


def compare(
    network: Exportable, engine: Engine, shapes: Sequence[tuple[int, int, int]], name: str, channels: int = 3
) -> list[dict[str, Any]]:
    """Run network and engine on the same random images; a row of largest absolute differences for each shape."""
    rng = np.random.default_rng(0)
    rows = []
    for batch, *sides in shapes:
        images = rng.standard_normal((batch, channels, *sides)).astype(np.float32)
        expected = _outputs(network, images)
        results = engine(images)
        if isinstance(network, KNNNetwork):
            # A rounding error may change who is the last neighbour, a jump: compared on the same features.
            with paddle.no_grad():
                expected[1] = network.votes(paddle.to_tensor(results[0])).numpy()
        row: dict[str, Any] = {"engine": name, "shape": list(images.shape), "difference": {}, "largest": {}}
        for output, one, other in zip(network.outputs, expected, results):
            if one.shape != other.shape:
                raise ExportError(f"{name} gives {output} {list(other.shape)} in place of {list(one.shape)}")
            row["difference"][output] = float(np.abs(one - other).max())
            row["largest"][output] = float(np.abs(one).max())
        rows.append(row)
    return rows


def _outputs(network: Exportable, images: np.ndarray) -> list[np.ndarray]:
    name = type(network.backbone).__name__
    try:
        with paddle.no_grad():
            outputs = [output.numpy() for output in network(paddle.to_tensor(images))]
    # A backbone of the user's own may fail in any way.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip()
        raise ExportError(f"{name} gives no features for images {list(images.shape)}: {reason}") from error
    if outputs[0].ndim != 2:
        raise ExportError(f"{name} must give features [B, D], and gives {list(outputs[0].shape)}")
    return outputs


def check_differences(rows: Sequence[dict[str, Any]]) -> None:
    """Raises ExportError for a difference that is no number, or above 1e-4 (times the output's largest value where that
    is above 1: float32 has 7 digits).
    """
    bad = [
        f"{row['engine']}, images {row['shape']}: {output} (up to {row['largest'][output]:.1e}) differs by {value:.1e}"
        for row in rows
        for output, value in row["difference"].items()
        if not value <= TOLERANCE * max(1.0, row["largest"][output])
    ]
    if bad:
        raise ExportError(
            f"the exported network is not the same, nothing is written (allowed {TOLERANCE:.0e}): {'; '.join(bad)}"
        )


def comparison_table(meta: Meta) -> str:
    """The comparison as text: a line for each input, a column for each output."""
    lines = [f"{'largest difference':<20}{'images':<20}" + "".join(f"{name:>16}" for name in meta.outputs)]
    for row in meta.comparison:
        numbers = "".join(f"{row['difference'][name]:>16.1e}" for name in meta.outputs)
        lines.append(f"{row['engine']:<20}{' x '.join(map(str, row['shape'])):<20}{numbers}")
    largest = [max(row["largest"][name] for row in meta.comparison) for name in meta.outputs]
    differences = [max(row["difference"][name] for row in meta.comparison) for name in meta.outputs]
    relative = [difference / (value or 1.0) for difference, value in zip(differences, largest)]
    for title, values in (("largest value", largest), ("largest difference, relative to it", relative)):
        lines.append(f"{title:<40}" + "".join(f"{value:>16.1e}" for value in values))
    return "\n".join(lines)
