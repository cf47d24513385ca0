"""A server of one file on this machine."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Optional

CONTENT = bytes(range(256)) * 10_000


class Server(ThreadingHTTPServer):
    """Answers every GET; its fields say how, `requests` what was asked for, `asked` from which byte on (None: all)."""

    content = CONTENT
    announced: Optional[int] = len(CONTENT)  # Content-Length; None: not given
    status = 200
    delay = 0.0
    ranges = False  # answers to a Range with that part
    cut_after: Optional[int] = None  # bytes of an answer behind which the connection ends

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.asked: list[Optional[int]] = []
        self.awake = threading.Event()

    def address(self, name: str = "weights.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/folder/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.awake.wait(self.server.delay)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.asked.append(int(wanted[1]) if wanted else None)
        if self.server.ranges and wanted:
            self._send_part(int(wanted[1]))
            return
        self.send_response(self.server.status)
        if self.server.announced is not None:
            self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()
        self._write(self.server.content)

    def _send_part(self, start: int) -> None:
        content = self.server.content
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self._write(content[start:])

    def _write(self, content: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # who asked has gone
            self.wfile.write(content[: self.server.cut_after])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.awake.set()
            server.shutdown()
            thread.join()
