"""A hub on 127.0.0.1: as much of the Hugging Face hub's protocol as its client needs to fetch models and datasets.

Repositories are folders `<root>/models/<owner>/<name>` and `<root>/datasets/<owner>/<name>`. A repository's commit is
a hash of its files, so changing one is a new commit on `main`; older commits are gone.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(
    r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info|auth-check)(?:/([^/]+))?)?(?:/(.*))?"
)
_FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """The server's state: the folder of its repositories, the gated ones, and the counts of requests."""

    root: Path
    gated: set[str] = field(default_factory=set)
    broken: bool = False
    requests: Counter[str] = field(default_factory=Counter)
    endpoint: str = ""

    def folder(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def files(self, kind: str, name: str) -> dict[str, Path]:
        folder = self.folder(kind, name)
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, kind: str, name: str) -> str:
        digest = hashlib.sha1(name.encode())
        for path in self.files(kind, name).values():
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _sha(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests[f"{self.command} {unquote(url.path)}"] += 1
        if self.hub.broken:
            self._send(503, {})
        elif match := _API.fullmatch(unquote(url.path)):
            kind, name, what, revision, rest = match.groups()
            if self._there(kind, name, revision or "main"):
                self._api(kind, name, what, rest or "", parse_qs(body.decode()))
        elif match := _FILE.fullmatch(unquote(url.path)):
            kind, name, revision, file = "datasets" if match[1] else "models", match[2], match[3], match[4]
            if self._there(kind, name, revision) and self._allowed(name):
                self._file(kind, name, file)
        else:
            self._send(404, {"X-Error-Code": "EntryNotFound"})

    def _there(self, kind: str, name: str, revision: str) -> bool:
        if not self.hub.folder(kind, name).is_dir():
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commit(kind, name)):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _allowed(self, name: str) -> bool:
        if name in self.hub.gated:
            self._send(401, {"X-Error-Code": "GatedRepo"})
        return name not in self.hub.gated

    def _api(self, kind: str, name: str, what: str | None, rest: str, form: dict[str, list[str]]) -> None:
        files = self.hub.files(kind, name)
        entries = [
            {"type": "file", "path": path, "oid": _sha(file), "size": file.stat().st_size}
            for path, file in files.items()
        ]
        folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
        directories = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        match what:
            case "tree":
                inside = [
                    entry for entry in entries + directories if entry["path"].startswith(f"{rest}/" if rest else "")
                ]
                if "recursive=True" not in self.path and "recursive=true" not in self.path:
                    depth = rest.count("/") + bool(rest)
                    inside = [entry for entry in inside if entry["path"].count("/") == depth]
                self._json(inside)
            case "auth-check":
                if self._allowed(name):
                    self._json({})
            case "paths-info":
                self._json([entry for entry in entries + directories if entry["path"] in form.get("paths", [])])
            case _:
                siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries]
                sha = self.hub.commit(kind, name)
                self._json({"id": name, "sha": sha, "private": False, "gated": False, "tags": [], "siblings": siblings})

    def _file(self, kind: str, name: str, file: str) -> None:
        commit = {"X-Repo-Commit": self.hub.commit(kind, name)}
        path = self.hub.files(kind, name).get(file)
        if path is None:
            self._send(404, {"X-Error-Code": "EntryNotFound"} | commit)
        else:
            self._send(200, {"ETag": f'"{_sha(path)}"'} | commit, path.read_bytes())

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub with the repositories of a folder, until the end of the context."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
