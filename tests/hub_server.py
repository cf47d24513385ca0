"""A server on this machine that answers as the Hugging Face hub does, for one data set."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "ILSVRC/imagenet-1k"
TOKEN = "hf_0123456789abcdef"
_COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """`files` by name; `status`: of the answer to whoever asks for a file, 0 for what the token deserves."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.status = 0
        self.downloaded: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status = self.server.status
        if not status and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if path.startswith(f"/api/datasets/{REPOSITORY}") and status != 401:
            self._answer(json.dumps(self._description()).encode(), {"Content-Type": "application/json"})
            return
        name = path.partition("/resolve/main/")[2]
        if status:
            self._answer(b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, status)
        elif name in self.server.files:
            content = self.server.files[name]
            if self.command == "GET":
                self.server.downloaded.append(name)
            etag = hashlib.sha256(content).hexdigest()
            self._answer(content, {"ETag": f'"{etag}"', "X-Repo-Commit": _COMMIT})
        else:
            self._answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)

    def _description(self) -> dict:
        counts = {"downloads": 0, "likes": 0}  # older libraries want them
        files = [{"rfilename": name, "size": len(content)} for name, content in self.server.files.items()]
        return {
            "id": REPOSITORY,
            "sha": _COMMIT,
            "siblings": files,
            "private": False,
            "gated": "auto",
            "tags": [],
            **counts,
        }

    def _answer(self, content: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
