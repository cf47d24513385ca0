"""ImageNet-1k from the Hugging Face hub: parquet files whose rows are an encoded image, its name and its label."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from passl.data.public.output import PublicImage, SplitSource, Unit

REPOSITORY = "ILSVRC/imagenet-1k"
PAGE = f"https://huggingface.co/datasets/{REPOSITORY}"
_ROWS = 64  # at a time; an image of ImageNet has 110 kB on average, 15 MB at most
# data/train-00000-of-00294.parquet; what the hub converts by itself is in folders, train/0000.parquet
_SPLIT_OF = re.compile(r"(?:^|/)(train|validation|valid|val)(?=[-_./])[^/]*(?:/[^/]*)?\.parquet$")
_WNID = re.compile(r"n\d{8}")
# The hub's names have the class behind the name in the official archives: ILSVRC2012_val_00000001_n01751748.JPEG
_NAME = re.compile(r"(.+)_(n\d{8})")
_MAGIC = {b"\xff\xd8\xff": ".JPEG", b"\x89PNG": ".png", b"RIFF": ".webp"}


class HubError(OSError):
    """The hub cannot be reached, or refuses; the text says what to do."""


class Hub:
    """The files of the data set on the hub.

    Args:
        token: of a user who accepted the data set's licence; None: the one that `hf auth login` stored.
        folder: where downloaded files go.
        endpoint: of another server than huggingface.co, as the library's HF_ENDPOINT.
    """

    def __init__(self, folder: Path, token: Optional[str] = None, endpoint: Optional[str] = None) -> None:
        self._library = _library("huggingface_hub")
        self._folder, self._token, self._endpoint = folder, token or self._library.get_token(), endpoint
        if not self._token:
            raise HubError(f"the hub gives ImageNet only to users that are known to it. {_ADVICE}")
        if not re.fullmatch(r"[!-~]+", self._token):
            raise HubError("HF_TOKEN has characters that no token has (spaces, line ends, quotes?): copy it again")

    def files(self) -> dict[str, int]:
        """Name and size in bytes of each parquet file."""
        api = self._library.HfApi(endpoint=self._endpoint, token=self._token)
        info = self._asked(lambda: api.dataset_info(REPOSITORY, files_metadata=True))
        return {file.rfilename: file.size or 0 for file in info.siblings if file.rfilename.endswith(".parquet")}

    def fetch(self, name: str) -> Path:
        """Download one file; what arrived of it before is kept, and known by the hub's library.

        Raises:
            HubError: also for a name that leads out of the folder.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise HubError(f"{PAGE} names a file {name!r}, which leads out of {self._folder}: refused")
        arguments = {"repo_type": "dataset", "token": self._token, "local_dir": self._folder}
        if self._endpoint:
            arguments["endpoint"] = self._endpoint
        return Path(self._asked(lambda: self._library.hf_hub_download(REPOSITORY, name, **arguments)))

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:
            # What the library raises depends on its version, and is not always an OSError.
            if getattr(error, "errno", None) is not None:
                raise
            raise HubError(_explained(error, self._token)) from None


_ADVICE = (
    f"Log in there, accept the licence at {PAGE}, make a token that may read at "
    "https://huggingface.co/settings/tokens, and set it: HF_TOKEN=hf_... in the environment, or in a file "
    ".env in this folder. Parquet files that are here already need none: passl-data imagenet-hf --from FOLDER"
)


def _explained(error: Exception, token: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split()).replace(token, "***")
    if status in (401, 403):
        return f"the hub refuses (HTTP {status}): the token is wrong, or its user did not accept the licence. {_ADVICE}"
    return (
        f"{PAGE} could not be read ({type(error).__name__}: {text[:300]}). Where there is a network: hf "
        f"download {REPOSITORY} --repo-type dataset --local-dir FOLDER; then here: passl-data imagenet-hf --from FOLDER"
    )


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise
        raise HubError(f'{name.split(".")[0]} is not installed: pip install "passl[hf]"') from None


# --- the splits -----------------------------------------------------------------------------------------------------


def hub_splits(hub: Hub, keep: bool) -> dict[str, SplitSource]:
    """The splits on the hub; each parquet file is downloaded when its turn comes, and deleted afterwards unless `keep`.

    Raises:
        HubError: see :class:`Hub`.
    """
    sizes = hub.files()

    def unit(name: str) -> Unit:
        path: list[Path] = []

        def images(before: int) -> Iterator[PublicImage]:
            path[:] = [hub.fetch(name)]
            yield from parquet_images(path[0], before)

        return Unit(name, images, finished=lambda: None if keep else path[0].unlink())

    return _splits(f"{PAGE}", sizes, unit)


def folder_splits(folder: Path) -> dict[str, SplitSource]:
    """The splits in parquet files that are there: a copy of the repository, or of its folder `data`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.parquet")}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    return _splits(str(folder), sizes, lambda name: Unit(name, lambda before: parquet_images(files[name], before)))


def _splits(where: str, sizes: Mapping[str, int], unit: Callable[[str], Unit]) -> dict[str, SplitSource]:
    _library("pyarrow.parquet")  # before anything is downloaded
    names: dict[str, list[str]] = {}
    for name in sorted(sizes):
        found = _SPLIT_OF.search(name)
        if found:
            names.setdefault("train" if found[1] == "train" else "val", []).append(name)
    if not names:
        raise FileNotFoundError(f"{where} has no parquet files such as train-00000-of-00294.parquet")
    return {
        split: SplitSource(where, [unit(name) for name in files], sum(sizes[name] for name in files), _part(files))
        for split, files in sorted(names.items())
    }


def _part(files: list[str]) -> str:
    """How many of the files of a split are there, if their names (`-of-00294`) tell that some are not."""
    counts = {int(found[1]) for name in files for found in [re.search(r"-of-(\d+)\.parquet$", name)] if found}
    return f"{len(files)} of {max(counts)} files" if counts and max(counts) > len(files) else ""


def parquet_images(path: Path, before: int) -> Iterator[PublicImage]:
    """The images of a parquet file, a few rows in memory at a time.

    Raises:
        ValueError: the file is damaged, or of another layout.
    """
    parquet, arrow = _library("pyarrow.parquet"), _library("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            columns = set(file.schema_arrow.names)
            if not {"image", "label"} <= columns:
                raise ValueError(f"{path}: its columns are {', '.join(sorted(columns))}, and must be image and label")
            names = _label_names(file.schema_arrow.metadata or {})
            number = before
            for batch in file.iter_batches(batch_size=_ROWS, columns=["image", "label"]):
                for image, label in zip(batch.column("image").to_pylist(), batch.column("label").to_pylist()):
                    yield _image(image, label, names, number, path)
                    number += 1
    except (arrow.ArrowException, EOFError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the system, not of the file's format
            raise
        raise ValueError(f"{path}: damaged, or not a parquet file ({error})") from None


def _label_names(metadata: Mapping[bytes, bytes]) -> list[str]:
    """The names of classes that the `datasets` library writes into a file, in the order of the labels."""
    try:
        described = json.loads(metadata.get(b"huggingface", b"{}"))
        names = described["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name).replace("/", "_") for name in names]


def _image(image: Any, label: Any, names: list[str], number: int, path: Path) -> PublicImage:
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise ValueError(f"{path}: row for image {number}: there are no bytes of an image")
    full_name = (image.get("path") or "") if isinstance(image, dict) else ""
    wnids = _WNID.findall(full_name)
    name = full_name.rpartition("/")[2]
    stem, dot, extension = name.rpartition(".")
    official = _NAME.fullmatch(stem)
    if official and wnids:
        name = f"{official[1]}{dot}{extension}"
    if not name or not wnids:
        name = f"{number:08d}{_extension(content)}"
    return PublicImage(wnids[-1] if wnids else _class_of(label, names, number, path), name, content)


def _class_of(label: Any, names: list[str], number: int, path: Path) -> str:
    """For files whose images have no names: the class's name or number."""
    if not isinstance(label, int) or label < 0 or (names and label >= len(names)):
        raise ValueError(f"{path}: row for image {number}: label {label!r} is that of no class")
    return names[label] if names else f"{label:04d}"


def _extension(content: bytes) -> str:
    found = [extension for magic, extension in _MAGIC.items() if content.startswith(magic)]
    return found[0] if found else ".JPEG"
