"""Files from the network into a folder: whole or not at all, and afterwards known by their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Optional
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")  # PyTorch's custom: resnet50-0676ba61.pth

logger = logging.getLogger("passl")


class DownloadError(OSError):
    """A file that cannot be fetched, or is not what it should be; the text says why and what to do."""


def fetch(address: str, folder: Path, check: Callable[[Path], object]) -> Path:
    """The file at `address` in `folder`, under its own name: downloaded where it is not there yet.

    It appears under its name only when all of it has arrived and passed `check`, which raises ValueError for a file
    that makes no sense (say, the login page of a network). Its SHA-256 must start with the one in its name, where that
    has one (`-0676ba61.pth`). For most files nobody publishes one, so the SHA-256 of a file's first use is kept beside
    it (`.sha256`, as of sha256sum) and compared at every later use. This finds a file that changed; it cannot tell
    whether the first was the right one.

    Raises:
        DownloadError: no network, an incomplete or refused transfer, a full disk, a wrong checksum.
        ValueError: `check` refuses a file that was in the folder, put there by hand.
    """
    file = folder / _name(address)
    if file.is_file():
        _verify(file, check)
        return file
    try:
        _download(address, file, check)
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(
            f"{address} could not be downloaded ({_reason(error)}). Fetch it where there is a network, and put it at "
            f"{file}"
        ) from None
    return file


def _name(address: str) -> str:
    return unquote(urlsplit(address).path).rsplit("/", 1)[-1]


def _reason(error: Exception) -> str:
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        error = error.reason
    return str(error) or type(error).__name__


def _download(address: str, file: Path, check: Callable[[Path], object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines may share the folder: each has its own temporary file.
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        _receive(address, partial)
        digest = _first_digest(partial, file.name, check)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    _record(file, digest)


def _receive(address: str, partial: Path) -> None:
    # Some servers refuse urllib's own name.
    request = Request(address, headers={"User-Agent": "passl"})
    with urlopen(request, timeout=_TIMEOUT) as response, partial.open("wb") as file:
        total = _length(response.headers.get("Content-Length"))
        with tqdm(total=total, unit="B", unit_scale=True, desc=_name(address)) as bar:
            while chunk := response.read(_CHUNK):
                bar.update(file.write(chunk))
        received = file.tell()
        file.flush()
        os.fsync(file.fileno())
    if total is not None and received != total:
        raise OSError(f"the connection ended after {received} of {total} bytes")


def _length(header: Optional[str]) -> Optional[int]:
    return int(header) if header and header.isdigit() else None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _first_digest(content: Path, name: str, check: Callable[[Path], object]) -> str:
    """The SHA-256 of a file that has not been used before, once it has passed the checks."""
    digest = _sha256(content)
    stated = _HASH_IN_NAME.search(name)
    if stated and not digest.startswith(stated[1]):
        raise DownloadError(f"{name}: its SHA-256 is {digest}, and should start with {stated[1]}")
    check(content)
    return digest


def _verify(file: Path, check: Callable[[Path], object]) -> None:
    record = _record_of(file)
    if not record.is_file():
        _record(file, _first_digest(file, file.name, check))
        return
    digest = _sha256(file)
    recorded = record.read_text(encoding="utf-8", errors="replace").partition(" ")[0]
    if digest != recorded:
        raise DownloadError(
            f"{file} is damaged or was replaced: its SHA-256 is {digest}, and at first use was {recorded}. "
            f"Delete it and {record.name} to download it again"
        )


def _record_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _record(file: Path, digest: str) -> None:
    record = _record_of(file)
    partial = record.with_name(f"{record.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(f"{digest}  {file.name}\n", encoding="utf-8")
        os.replace(partial, record)
    except OSError as error:  # a folder shared by many may be read-only: the file serves all the same
        logger.warning("%s cannot be written (%s): a later change of the file will not be noticed", record, error)
        with contextlib.suppress(OSError):
            partial.unlink()
