# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub with one data set on this machine, as far as its libraries ask for it.

``/sent`` tells how many bytes of files it sent since it was last asked.
"""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.hf_sets import COMMIT

REPOSITORY = "someone/clips"


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Serve ``folder`` as the repository; yields the address."""
    server = _Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.sent = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/"
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            return self._file(name) if revision in ("main", COMMIT) else self._missing("Revision")
        if path == "/sent":
            sent, self.server.sent = self.server.sent, 0
            return self._json(sent)
        if not path.startswith(api):
            return self._missing("Repo")
        kind, _, rest = path.removeprefix(api).strip("/").partition("/")
        revision, _, name = rest.partition("/")
        if revision not in ("", "main", COMMIT):
            return self._missing("Revision")
        if kind in ("", "revision"):
            files = [{"rfilename": entry["path"]} for entry in self._entries("", recursive=True)]
            return self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": files, "tags": []})
        if kind == "tree":
            recursive = "recursive=true" in self.path.lower()
            return self._json(self._entries(name, recursive=recursive))
        if kind == "paths-info":
            return self._json(self._paths_info())
        return self._missing("Entry")

    def _entries(self, name: str, *, recursive: bool) -> list[dict[str, Any]]:
        folder = self.server.folder / name
        found = sorted(folder.rglob("*") if recursive else folder.glob("*"))
        return [self._entry(path) for path in found]

    def _entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.server.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        digest = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "oid": digest, "size": path.stat().st_size}

    def _paths_info(self) -> list[dict[str, Any]]:
        asked = (
            urllib.parse.parse_qs(self._body.decode()).get("paths")
            or json.loads(self._body)["paths"]
        )
        paths = (self.server.folder / name for name in asked)
        return [self._entry(path) for path in paths if path.exists()]

    def _file(self, name: str) -> None:
        path = self.server.folder / name
        if not path.is_file():
            return self._missing("Entry")
        data = path.read_bytes()
        begin, end, total = 0, len(data), len(data)
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(total, int(last or total - 1) + 1)
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
            **({"Content-Range": f"bytes {begin}-{end - 1}/{total}"} if asked else {}),
        }
        if self.command == "GET":
            self.server.sent += end - begin
        self._send(206 if asked else 200, data[begin:end], headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, kind: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": f"{kind}NotFound"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
