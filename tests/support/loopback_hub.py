"""The hub on loopback: a small server that speaks the parts of its protocol that are used here.

This module reads: it answers what a download of a snapshot asks for. What an upload asks for stands
in `loopback_uploads`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, OLDER = "a" * 40, "b" * 40
TOKEN = "hf_" + "secretSecretSecret" * 2
ID = "owner/tiny-llama"


@dataclass
class Repository:
    """What the server serves under `ID`, and how it behaves."""

    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLDER})
    status: int = 200
    error_code: str | None = None
    refuse_files: bool = False
    """Refuse only the files: so gated repositories do, whose description is public."""

    token: str | None = None
    """What a private repository wants to see."""

    claimed_size: int | None = None
    asked: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """The parts of the hub's protocol that a download of a snapshot uses."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer in one packet: each of two waits for the other
    repository: Repository

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: pytest's output is not a log."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        repository = self.repository
        path = unquote(urlsplit(self.path).path)
        repository.asked.append(f"{self.command} {path}")
        repository.tokens.append(self.headers.get("authorization"))
        is_file = "/resolve/" in path
        if repository.status != 200 and (is_file or not repository.refuse_files):
            return self.send(repository.status, {}, error=repository.error_code)
        if repository.token and self.headers.get("authorization") != f"Bearer {repository.token}":
            return self.send(401, {}, error="RepoNotFound")
        if path.startswith(f"/api/models/{ID}"):
            return self.describe(path.removeprefix(f"/api/models/{ID}"))
        if path.startswith(f"/{ID}/resolve/"):
            revision, _, name = path.removeprefix(f"/{ID}/resolve/").partition("/")
            return self.file(revision, name)
        return self.send(404, {}, error="RepoNotFound")

    def commit(self, revision: str) -> str | None:
        known = self.repository.revisions
        return revision if revision in known.values() else known.get(revision)

    def describe(self, rest: str) -> None:
        kind, _, revision = rest.strip("/").partition("/")
        commit = self.commit(revision.split("/")[0] or "main")
        if commit is None:
            return self.send(404, {}, error="RevisionNotFound")
        sizes = {
            name: self.repository.claimed_size or len(content)
            for name, content in self.repository.files.items()
        }
        if kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": size, "oid": oid(name)}
                for name, size in sizes.items()
            ]
            return self.send(200, tree)
        siblings = [
            {"rfilename": name, "size": size, "blobId": oid(name)} for name, size in sizes.items()
        ]
        return self.send(200, {"id": ID, "modelId": ID, "sha": commit, "siblings": siblings})

    def file(self, revision: str, name: str) -> None:
        content = self.repository.files.get(name)
        commit = self.commit(revision)
        if commit is None or content is None:
            self.send(404, {}, error="EntryNotFound" if commit else "RevisionNotFound")
            return
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        self.send(200, content, headers=headers)

    def send(
        self,
        status: int,
        body: Any,
        *,
        headers: dict[str, str] | None = None,
        error: str | None = None,
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Code", error)
            said = self.headers.get("authorization") or "of this test"
            self.send_header("X-Error-Message", f"{error}: {said}")
            content = json.dumps({"error": said}).encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def oid(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Hub:
    """A server with its repository, and a fresh home for the client."""

    repository: Repository
    endpoint: str
    home: Path

    def python(
        self, code: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run code in a new process that knows this hub and nothing of the machine's own login."""
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            cwd=self.home,
            env=self.environment(**environment),
        )

    def environment(self, **more: str) -> dict[str, str]:
        """That of a process that knows this hub and nothing of the machine's own login."""
        return environment_of(self.endpoint, self.home, **more)


@contextlib.contextmanager
def served(handler: type[BaseHTTPRequestHandler], **attributes: Any) -> Iterator[str]:
    """The address of a server on loopback, which answers with a handler of these attributes."""
    made = type("Served", (handler,), attributes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def environment_of(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """That of a process that knows this hub and nothing of the machine's own login."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and "proxy" not in name.lower()
    }
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), **more}
