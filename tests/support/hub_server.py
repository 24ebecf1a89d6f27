"""A small Hugging Face Hub on 127.0.0.1, for tests: enough of its API for huggingface_hub 1 and 2.

It serves folders as model repositories, with sizes, hashes, files without redirects, and byte ranges. It
counts what it sends, and can be set to be gated or slow, to pause sending, or to cut connections.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".model"}
BLOCK = 16 * 1024


@dataclass
class Repo:
    """A repository: its folder, and its behaviour, which tests may change at any time."""

    repo_id: str
    folder: Path
    gated: bool = False
    """Files need the header `Authorization: Bearer good-token`; the listing does not, as on the real Hub."""
    hidden: bool = False
    """Whether the Hub answers as if there were no such repository."""
    _hashes: dict[tuple[str, int], tuple[str, str]] = field(default_factory=dict)

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())

    def hashes(self, name: str) -> tuple[str, str]:
        """(git blob id, sha256) of a file."""
        path = self.folder / name
        key = (name, path.stat().st_mtime_ns)
        if key not in self._hashes:
            content = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self._hashes[key] = (git, hashlib.sha256(content).hexdigest())
        return self._hashes[key]

    @property
    def commit(self) -> str:
        return hashlib.sha1("".join(n + self.hashes(n)[0] for n in self.files()).encode()).hexdigest()

    def etag(self, name: str) -> str:
        git, sha256 = self.hashes(name)
        return sha256 if Path(name).suffix in LFS_SUFFIXES else git


class HubServer:
    """The server. `requests` counts requests by "METHOD path"; `sent` counts the body bytes of each file."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.bytes_per_second: float | None = None
        """Speed of each connection; None: unlimited."""
        self.hold_after: int | None = None
        """Pause sending after this many bytes of all files together, until `hold` changes this."""
        self.cut_after: int | None = None
        """Close the connection after this many bytes of a file, once for each file."""
        self.held_at: int | None = None
        """Pause sending each file at this byte, until this is None again."""
        self.ranges = True
        """Whether requests for a byte range get that range instead of the whole file."""
        self.unavailable = 0
        """How many of the next requests for files are answered with 503."""
        self._cut: set[str] = set()
        self._lock = threading.Lock()
        self._connections = 0
        self._changed = threading.Condition(self._lock)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def add_repo(self, repo_id: str, folder: Path, **behaviour: bool) -> Repo:
        self.repos[repo_id] = Repo(repo_id, folder, **behaviour)
        return self.repos[repo_id]

    def env(self, home: Path) -> dict[str, str]:
        """Environment variables that send the Hub library here, with its cache below `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_OFFLINE": "0",
            # Time-outs in seconds (default 10), since this server may pause with the whole machine.
            "HF_HUB_ETAG_TIMEOUT": "120",
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",
        }

    def count(self, name: str, sent: int) -> None:
        with self._lock:
            self.sent[name] += sent

    def hold(self, after: int | None) -> None:
        """Pause sending after this many bytes in all; None: continue."""
        with self._changed:
            self.hold_after = after
            self._changed.notify_all()

    def wait_while_held(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.hold_after is None or self.sent.total() < self.hold_after)

    def note(self, request: str) -> None:
        with self._lock:
            self.requests[request] += 1

    def cut_here(self, name: str, sent: int) -> bool:
        """Whether to drop the connection now."""
        with self._lock:
            if self.cut_after is None or sent < self.cut_after or name in self._cut:
                return False
            self._cut.add(name)
            return True

    def busy(self) -> bool:
        """Whether to answer 503 now."""
        with self._lock:
            self.unavailable -= 1
            return self.unavailable >= 0

    @contextmanager
    def connection(self) -> Iterator[None]:
        """Count a connection as open inside the block."""
        with self._lock:
            self._connections += 1
        try:
            yield
        finally:
            with self._changed:
                self._connections -= 1
                self._changed.notify_all()

    def settle(self) -> None:
        """Block until every connection is closed; the server goes on sending for a while to a client that
        died."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._connections == 0, 60)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer waits 40 ms for an acknowledgement
    server_hub: HubServer

    def handle(self) -> None:
        with self.server_hub.connection(), suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self._answer()

    def do_HEAD(self) -> None:
        with suppress(ConnectionError):
            self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Do not log."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.note(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path.rstrip("/"))
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repo = self.server_hub.repos.get(match[1]) if match else None
        if repo is None or repo.hidden:
            # The real Hub also answers 401 without a login, so as not to reveal which repositories exist.
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif file:
            self._file(repo, file[3])
        elif api and api[2] == "tree":
            self._json([_tree_entry(repo, name) for name in repo.files()])
        else:
            self._json(_model_info(repo))

    def _file(self, repo: Repo, name: str) -> None:
        if repo.gated and self.headers.get("Authorization") != "Bearer good-token":
            status = 403 if "Authorization" in self.headers else 401
            self._error(status, "GatedRepo", f"Access to model {repo.repo_id} is restricted.")
            return
        if name not in repo.files():
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})
            return
        if self.command == "GET" and self.server_hub.busy():
            self._error(503, "Busy", "Try again")
            return
        content = (repo.folder / name).read_bytes()
        start, status = 0, 200
        headers = {
            "ETag": f'"{repo.etag(name)}"',
            "X-Repo-Commit": repo.commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if Path(name).suffix in LFS_SUFFIXES:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{repo.etag(name)}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.server_hub.ranges:
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(status, len(content) - start, headers)
        if self.command == "GET":
            self._send(name, content[start:], start)

    def _send(self, name: str, content: bytes, start: int) -> None:
        hub, sent = self.server_hub, 0
        while sent < len(content):
            if hub.cut_here(name, sent):
                self.close_connection = True
                return
            while hub.held_at is not None and start + sent >= hub.held_at:
                time.sleep(0.005)
            hub.wait_while_held()
            block = content[sent : sent + BLOCK]
            self.wfile.write(block)
            sent += len(block)
            hub.count(name, len(block))
            if hub.bytes_per_second:
                time.sleep(len(block) / hub.bytes_per_second)

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(200, len(body), {"Content-Type": "application/json"})
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        self._head(status, len(body), {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _model_info(repo: Repo) -> dict[str, object]:
    siblings = []
    for name in repo.files():
        entry = _tree_entry(repo, name)
        sibling = {"rfilename": name, "size": entry["size"], "blobId": entry["oid"]}
        if "lfs" in entry:
            sibling["lfs"] = {"sha256": repo.etag(name), "size": entry["size"], "pointerSize": 130}
        siblings.append(sibling)
    return {
        "_id": "0",
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "sha": repo.commit,
        "private": False,
        "gated": "auto" if repo.gated else False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


def _tree_entry(repo: Repo, name: str) -> dict[str, object]:
    git, sha256 = repo.hashes(name)
    size = (repo.folder / name).stat().st_size
    entry: dict[str, object] = {"type": "file", "oid": git, "size": size, "path": name}
    if Path(name).suffix in LFS_SUFFIXES:
        entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 130}
    return entry


@contextmanager
def running() -> Iterator[HubServer]:
    """A server that runs inside a with statement."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()
