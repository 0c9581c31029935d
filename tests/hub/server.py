"""A hub on 127.0.0.1: as much of the Hugging Face hub's protocol as its client needs to fetch models and datasets.

Repositories are folders `<root>/models/<owner>/<name>` and `<root>/datasets/<owner>/<name>`. A repository's commit is
a hash of its files, so changing one is a new commit on `main`; older commits are gone.
"""

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

    def refusal(self, kind: str, name: str, revision: str, reads: bool) -> tuple[int, str] | None:
        """Return the status and the error code of a request that is refused; `reads`: whether it needs access."""
        if not self.folder(kind, name).is_dir():
            return 401, "RepoNotFound"
        if revision not in ("main", self.commit(kind, name)):
            return 404, "RevisionNotFound"
        return (401, "GatedRepo") if reads and name in self.gated else None


def _sha(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests[f"{self.command} {path}"] += 1
        api, file = _API.fullmatch(path), _FILE.fullmatch(path)
        if self.hub.broken:
            self._send(503, {})
        elif api:
            kind, name, what, revision, rest = api.groups()
            refused = self.hub.refusal(kind, name, revision or "main", reads=what == "auth-check")
            if not self._refused(refused):
                value = self._api(kind, name, what, rest or "", parse_qs(body.decode()))
                self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())
        elif file:
            kind, (name, revision) = "datasets" if file[1] else "models", file.group(2, 3)
            if not self._refused(self.hub.refusal(kind, name, revision, reads=True)):
                commit = {"X-Repo-Commit": self.hub.commit(kind, name)}
                if local := self.hub.files(kind, name).get(file[4]):
                    self._send(200, {"ETag": f'"{_sha(local)}"'} | commit, local.read_bytes())
                else:
                    self._send(404, {"X-Error-Code": "EntryNotFound"} | commit)
        else:
            self._send(404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _refused(self, refusal: tuple[int, str] | None) -> bool:
        if refusal:
            self._send(refusal[0], {"X-Error-Code": refusal[1]})
        return refusal is not None

    def _api(self, kind: str, name: str, what: str | None, inside: str, form: dict[str, list[str]]) -> Any:
        files = self.hub.files(kind, name)
        entries = [
            {"type": "file", "path": path, "oid": _sha(file), "size": file.stat().st_size}
            for path, file in files.items()
        ]
        folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
        both = entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        if what == "auth-check":
            return {}
        if what == "paths-info":
            return [entry for entry in both if entry["path"] in form.get("paths", [])]
        if what == "tree":
            prefix = inside and f"{inside}/"
            recursive = "recursive=true" in self.path.lower()
            below = [entry for entry in both if entry["path"].startswith(prefix)]
            return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(prefix)]
        siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries]
        sha = self.hub.commit(kind, name)
        return {"id": name, "sha": sha, "private": False, "gated": False, "tags": [], "siblings": siblings}

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
