"""passl.download: whole files or none, and none that changed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import shutil
from pathlib import Path

import pytest

from passl import download
from passl.download import DownloadError, fetch, fetch_known
from tests.file_server import CONTENT, serving

pytestmark = pytest.mark.smoke

MD5 = hashlib.md5(CONTENT).hexdigest()


def accept(file: Path) -> None:
    """The check of a file that is always right."""


def refuse(file: Path) -> None:
    raise ValueError(f"{file.read_bytes()[:6]!r} is no beginning of weights")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("announced", [len(CONTENT), None])
def test_a_file_is_downloaded_once(server, tmp_path, capsys, announced):
    server.announced = announced
    folder = tmp_path / "a" / "b"
    file = fetch(server.address(), folder, accept)
    assert file == folder / "weights.pth"
    assert file.read_bytes() == CONTENT
    progress = capsys.readouterr().err
    assert "weights.pth" in progress
    assert "2.56M" in progress
    assert names(folder) == ["weights.pth", "weights.pth.sha256"]
    record = (folder / "weights.pth.sha256").read_text()
    assert record == f"{hashlib.sha256(CONTENT).hexdigest()}  weights.pth\n"
    # The second time neither the network nor the check is needed.
    assert fetch(server.address(), folder, refuse) == file
    assert server.requests == ["/folder/weights.pth"]


def test_a_name_may_be_quoted_and_have_a_query(server, tmp_path):
    assert fetch(server.address("my%20weights.pth?download=1"), tmp_path, accept).name == "my weights.pth"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"announced": len(CONTENT) + 1}, f"the connection ended after {len(CONTENT)} of {len(CONTENT) + 1} bytes"),
        ({"content": b"", "announced": 7}, "the connection ended after 0 of 7 bytes"),
        ({"status": 404}, "HTTP Error 404: Not Found"),
        ({"status": 503}, "HTTP Error 503: Service Unavailable"),
        ({"delay": 10.0}, "timed out"),
        ({"content": b"<html>", "announced": 6}, "b'<html>' is no beginning of weights"),
    ],
)
def test_a_download_that_fails_leaves_nothing(server, tmp_path, monkeypatch, fault, reason):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    for name, value in fault.items():
        setattr(server, name, value)
    with pytest.raises(DownloadError) as caught:
        fetch(server.address(), tmp_path, refuse)
    assert str(caught.value) == (
        f"{server.address()} could not be downloaded ({reason}). Fetch it where there is a network, and put it at "
        f"{tmp_path / 'weights.pth'}"
    )
    assert caught.value.__suppress_context__
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(server, tmp_path):
    def interrupt(file: Path) -> None:
        assert file.read_bytes() == CONTENT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server.address(), tmp_path, interrupt)
    assert names(tmp_path) == []


def test_nobody_answers(tmp_path):
    with serving() as server:
        address = server.address()
    with pytest.raises(DownloadError, match="could not be downloaded \\(.*Connection refused"):
        fetch(address, tmp_path, accept)


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="File exists|Not a directory"):
        fetch(server.address(), tmp_path / "file", accept)


def test_a_file_that_changed_is_found(server, tmp_path):
    file = fetch(server.address(), tmp_path, accept)
    damaged = bytearray(CONTENT)
    damaged[12345] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DownloadError, match="damaged or was replaced: its SHA-256 is") as caught:
        fetch(server.address(), tmp_path, accept)
    assert hashlib.sha256(damaged).hexdigest() in str(caught.value)
    assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)
    assert "Delete it and weights.pth.sha256 to download it again" in str(caught.value)
    assert file.read_bytes() == damaged
    file.unlink()
    (tmp_path / "weights.pth.sha256").unlink()
    assert fetch(server.address(), tmp_path, accept).read_bytes() == CONTENT


def test_a_file_put_there_by_hand_is_checked_at_its_first_use(server, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="is no beginning of weights"):
        fetch(server.address(), tmp_path, refuse)
    assert names(tmp_path) == ["weights.pth"]
    file.write_bytes(b"mine")
    assert fetch(server.address(), tmp_path, accept) == file
    assert (tmp_path / "weights.pth.sha256").read_text().startswith(hashlib.sha256(b"mine").hexdigest())
    assert server.requests == []


def test_a_record_that_cannot_be_written_stops_nothing(server, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("passl"), "propagate", True)
    (tmp_path / "weights.pth.sha256").mkdir()
    assert fetch(server.address(), tmp_path, accept).read_bytes() == CONTENT
    assert "weights.pth.sha256 cannot be written" in caplog.text
    assert names(tmp_path) == ["weights.pth", "weights.pth.sha256"]


def test_the_checksum_in_a_name_is_compared(server, tmp_path):
    right = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"
    assert fetch(server.address(right), tmp_path, accept).name == right
    wrong = "net-00c0ffee.pth"
    with pytest.raises(DownloadError, match=f"{wrong}: its SHA-256 is .*, and should start with 00c0ffee"):
        fetch(server.address(wrong), tmp_path, accept)
    assert names(tmp_path) == [right, f"{right}.sha256"]
    (tmp_path / wrong).write_bytes(CONTENT)
    with pytest.raises(DownloadError, match="should start with 00c0ffee"):
        fetch(server.address(wrong), tmp_path, accept)


# --- archives with a published checksum ---


@pytest.fixture
def archive(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    return tmp_path / "archives" / "a.tar.gz"


def test_an_archive_is_downloaded_once(server, archive, capsys):
    assert fetch_known([server.address()], archive, MD5) == archive
    assert archive.read_bytes() == CONTENT
    assert "2.56M" in capsys.readouterr().err
    assert names(archive.parent) == ["a.tar.gz"]
    fetch_known([server.address()], archive, MD5)
    assert len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_partial_archive_goes_on_where_it_ended(server, archive, ranges):
    server.ranges = ranges
    archive.parent.mkdir()
    (archive.parent / "a.tar.gz.partial").write_bytes(CONTENT[:1000])
    fetch_known([server.address()], archive, MD5)
    assert server.asked == [1000]
    assert archive.read_bytes() == CONTENT
    assert names(archive.parent) == ["a.tar.gz"]


def test_a_connection_that_is_cut_is_made_anew(server, archive):
    server.ranges, server.cut_after = True, 1_000_000
    fetch_known([server.address()], archive, MD5)
    assert server.asked == [None, 1_000_000, 2_000_000]
    assert archive.read_bytes() == CONTENT


def test_what_arrived_is_kept_and_said(server, archive):
    server.cut_after = 1_000_000
    with pytest.raises(DownloadError) as caught:
        fetch_known([server.address()], archive, MD5)
    partial = archive.with_name("a.tar.gz.partial")
    assert str(caught.value) == (
        f"{server.address()} could not be downloaded (the connection ended after 1000000 of {len(CONTENT)} bytes). "
        f"1000000 bytes are kept in {partial}, and the next try goes on there."
    )
    assert partial.read_bytes() == CONTENT[:1_000_000]
    assert not archive.exists()


@pytest.mark.parametrize("partial", [b"other" * 100, CONTENT + b"more", CONTENT])
def test_a_partial_archive_that_does_not_fit_is_replaced(server, archive, partial):
    server.ranges = True
    archive.parent.mkdir()
    (archive.parent / "a.tar.gz.partial").write_bytes(partial)
    fetch_known([server.address()], archive, MD5)
    assert archive.read_bytes() == CONTENT
    assert server.asked == [len(partial)] + ([] if partial == CONTENT else [None])


def test_an_archive_with_another_checksum_is_refused(server, archive):
    with pytest.raises(DownloadError, match=f"what arrived has the MD5 {MD5}, the published file {'0' * 32}"):
        fetch_known([server.address()], archive, "0" * 32)
    assert names(archive.parent) == []
    archive.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="is damaged or another file: its MD5 is .* Delete it to download it again"):
        fetch_known([server.address()], archive, MD5)
    assert archive.read_bytes() == b"mine"


def test_the_next_server_is_asked(server, archive):
    with serving() as silent:
        address = silent.address()
    fetch_known([address, server.address()], archive, MD5)
    assert archive.read_bytes() == CONTENT


def test_a_full_disk_stops_a_download_before_it_starts(server, archive, monkeypatch):
    usage = shutil.disk_usage(archive.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=f"{len(CONTENT)} bytes are needed, 1000 are free; make room") as caught:
        fetch_known([server.address(), server.address()], archive, MD5)
    assert caught.value.errno == errno.ENOSPC
    assert len(server.requests) == 1
    assert names(archive.parent) == []


def test_two_downloads_of_one_archive_exclude_each_other(server, archive):
    archive.parent.mkdir()
    with archive.with_name("a.tar.gz.partial").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading it"):
            fetch_known([server.address()], archive, MD5)
