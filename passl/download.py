"""Files from the network into a folder: whole or not at all, and afterwards known by their checksum.

`fetch` is for files that are small enough to be asked for again, and have no published checksum: weights. `fetch_known`
is for archives with one: what has arrived of them is kept, and the next try asks for the rest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, BinaryIO, Optional
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
_PAUSE = 1.0  # seconds before a connection that was cut is made anew
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")  # PyTorch's custom: resnet50-0676ba61.pth

logger = logging.getLogger("passl")


class DownloadError(OSError):
    """A file that cannot be fetched, or is not what it should be; the text says why and what to do."""


class _Redirects(HTTPRedirectHandler):
    """Follows a server to another address over HTTPS; over HTTP only from HTTP, and never to anything else."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Optional[Request]:
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and not scheme == req.type == "http":
            raise HTTPError(req.full_url, code, f"it leads to {newurl}, which is not HTTPS: refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opened(address: str, headers: dict[str, str]) -> HTTPResponse:
    """The answer of the server.

    Raises:
        ValueError: an address that is not of the web.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"{address}: only http and https addresses are fetched")
    # Some servers refuse urllib's own name.
    request = Request(address, headers={"User-Agent": "passl", **headers})
    return build_opener(_Redirects).open(request, timeout=_TIMEOUT)


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
    with _opened(address, {}) as response, partial.open("wb") as file:
        _copy(response, file, _name(address), _length(response.headers.get("Content-Length")))


def _copy(response: HTTPResponse, file: BinaryIO, title: str, total: Optional[int]) -> None:
    """Append the answer to ``file``, onto the disk.

    Args:
        total: bytes that the file has at the end, those before included; None if the server does not say.

    Raises:
        OSError: fewer or more bytes came.
    """
    with tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc=title) as bar:
        while chunk := response.read1(_CHUNK):  # what has arrived: after a cut it is not lost
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


# --- archives with a published checksum -----------------------------------------------------------------------------


def fetch_known(addresses: Sequence[str], file: Path, md5: str) -> Path:
    """`file` with the MD5 `md5`, downloaded from the first of `addresses` that has it, where it is not there yet.

    What has arrived stays in `{file}.partial` until the rest has, now or in another process: the rest is asked for with
    a Range; a server that knows none sends everything again. A connection that is cut is made anew as long as
    something comes. The file appears under its name only with the right MD5.

    Raises:
        DownloadError: no server has it, the checksum is wrong, another process is downloading it, or `file` is there
            already with another MD5.
        OSError: the disk is full.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        with _alone(partial):
            # Another process may have finished it before this one got the lock.
            return file if file.is_file() else _from_any(addresses, partial, file, md5)
    digest = md5_of(file)
    if digest != md5:
        raise DownloadError(
            f"{file} is damaged or another file: its MD5 is {digest}, the published one {md5}. Delete it to download "
            "it again"
        )
    return file


def md5_of(file: Path) -> str:
    """In hexadecimal; with a progress bar where it takes longer than a moment."""
    digest = hashlib.md5(usedforsecurity=False)
    size = file.stat().st_size
    with (
        file.open("rb") as content,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"MD5 of {file.name}", delay=1, leave=False) as bar,
    ):
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Nobody else writes to `partial` meanwhile; it is gone afterwards if it is empty."""
    with partial.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{partial}: another process is downloading it; wait for its end") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if not partial.stat().st_size:
                    partial.unlink()


def _from_any(addresses: Sequence[str], partial: Path, file: Path, md5: str) -> Path:
    problems = []
    for address in addresses:
        try:
            _complete(address, partial, md5)
        except (OSError, HTTPException, ValueError) as error:
            if getattr(error, "errno", None) in _FULL:
                advice = f"{error.strerror}; make room and try again: it goes on where it ended"
                raise OSError(error.errno, advice, str(partial)) from None
            problems.append(f"{address} could not be downloaded ({_reason(error)})")
        else:
            os.replace(partial, file)
            return file
    received = partial.stat().st_size if partial.is_file() else 0
    kept = f" {received} bytes are kept in {partial}, and the next try goes on there." if received else ""
    raise DownloadError(f"{'; '.join(problems)}.{kept}")


def _complete(address: str, partial: Path, md5: str) -> None:
    """All of the file in `partial`, whatever part of it is there.

    Raises:
        DownloadError: it has another checksum; nothing is left of it then.
    """
    resumed = partial.stat().st_size > 0
    while True:
        before = partial.stat().st_size
        try:
            _receive_rest(address, partial)
        except HTTPError:
            raise
        except (OSError, HTTPException) as error:
            if getattr(error, "errno", None) in _FULL or partial.stat().st_size <= before:
                raise
            logger.warning("%s: %s; connecting again", address, _reason(error))
            time.sleep(_PAUSE)
            continue
        digest = md5_of(partial)
        if digest == md5:
            return
        os.truncate(partial, 0)
        if not resumed:
            raise DownloadError(f"what arrived has the MD5 {digest}, the published file {md5}")
        # What was there may have been of another version: once more from the start.
        logger.warning("%s: the parts do not fit together (MD5 %s); downloading anew", address, digest)
        resumed = False


def _receive_rest(address: str, partial: Path) -> None:
    """Append what is missing; nothing if the server says that there is no more."""
    start = partial.stat().st_size
    try:
        response = _opened(address, {"Range": f"bytes={start}-"} if start else {})
    except HTTPError as error:
        if error.code == 416 and start:  # Range Not Satisfiable: it is complete, as the checksum will tell, or wrong
            return
        raise
    with response, partial.open("r+b") as file:
        if not (response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")):
            if response.status == 206:
                os.truncate(partial, 0)
                raise OSError(f"the server answered with {response.headers.get('Content-Range')}")
            start = 0
        file.truncate(start)
        file.seek(start)
        rest = _length(response.headers.get("Content-Length"))
        _check_room(partial, rest)
        _copy(response, file, _name(address), None if rest is None else start + rest)


def _check_room(partial: Path, needed: Optional[int]) -> None:
    free = shutil.disk_usage(partial.parent).free
    if needed is not None and needed > free:
        raise OSError(
            errno.ENOSPC, f"No space left on device: {needed} bytes are needed, {free} are free", str(partial)
        )
