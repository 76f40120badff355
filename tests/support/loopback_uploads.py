"""A hub on loopback that is written to: accounts, repositories of models, commits, large files.

Large files are stored by their hashes before the commit that names them, and stay where it never
comes: that is what an upload resumes from. Repositories are read as well, in the way of
`loopback_hub`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import yaml
from loopback_hub import COMMIT, Handler

ACCOUNT: dict[str, Any] = {
    "name": "me",
    "orgs": [{"name": "readers", "roleInOrg": "read"}, {"name": "writers", "roleInOrg": "write"}],
    "auth": {"accessToken": {"displayName": "x", "role": "write"}},
}


@dataclass
class Stored:
    """A repository: who sees it, and its files."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Storage:
    """Everything that the hub holds, and how it behaves."""

    accounts: dict[str, dict[str, Any]]
    """What whoami says, by token."""

    repositories: dict[str, Stored] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""

    drop_from: int | None = None
    """The number of the large file at which connections begin to break off, from 0."""

    on_file: Callable[[], object] | None = None
    """Is called while a large file arrives; the hub is then silent for half a second."""

    lose_commits: bool = False
    asked: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    """The hashes of the large files that were sent whole."""


class UploadHandler(Handler):
    """The parts of the hub's protocol that an upload in one commit uses, without xet."""

    storage: Storage

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.storage.asked.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            account = self._account()
            return self.send(200, account) if account else self._unknown_token()
        for prefix, call in (("/api/models/", self._describe), ("/", self._file)):
            owner, _, rest = path.removeprefix(prefix).partition("/")
            name, _, rest = rest.partition("/")
            found = self.storage.repositories.get(f"{owner}/{name}")
            if path.startswith(prefix) and found is not None:
                if found.private and not self._account():
                    break
                return call(f"{owner}/{name}", found, rest)
        return self.send(404, {}, error="RepoNotFound")

    def do_POST(self) -> None:  # noqa: N802
        path = urlsplit(self.path).path
        self.storage.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        account = self._account()
        if account is None:
            return self._unknown_token()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            good = isinstance(yaml.safe_load(head), dict)
            return self.send(200 if good else 400, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        owner, name, what = path.removeprefix("/api/models/").split("/")[:3]
        stored = self.storage.repositories.get(f"{owner}/{name}")
        if stored is None:
            return self.send(404, {}, error="RepoNotFound")
        if what == "preupload":
            return self._modes(stored, json.loads(body))
        assert what == "commit"
        lines = [json.loads(line) for line in body.splitlines()]
        return self._commit(f"{owner}/{name}", stored, lines)

    def do_PUT(self) -> None:  # noqa: N802
        oid, size = self.path.rpartition("/")[2], int(self.headers["content-length"])
        number = len(self.storage.sent)
        if self.storage.drop_from is not None and number >= self.storage.drop_from:
            self.rfile.read(size // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        content = self.rfile.read(size)
        if self.storage.on_file is not None:
            self.storage.on_file()
            time.sleep(0.5)
        assert hashlib.sha256(content).hexdigest() == oid
        self.storage.objects[oid] = content
        self.storage.sent.append(oid)
        self.send(200, {})

    def _account(self) -> dict[str, Any] | None:
        said = self.headers.get("authorization") or ""
        return self.storage.accounts.get(said.removeprefix("Bearer "))

    def _endpoint(self) -> str:
        return f"http://{self.headers['host']}"

    def _unknown_token(self) -> None:
        self.send(401, {}, error="Unauthorized")

    def _describe(self, name: str, stored: Stored, rest: str) -> None:
        if rest.startswith("tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": git_oid(content)}
                for file, content in stored.files.items()
            ]
            return self.send(200, tree)
        files = [
            {"rfilename": file, "size": len(content), "blobId": git_oid(content)}
            for file, content in stored.files.items()
        ]
        said = {"id": name, "modelId": name, "sha": COMMIT, "private": stored.private}
        return self.send(200, said | {"siblings": files})

    def _file(self, name: str, stored: Stored, rest: str) -> None:
        content = stored.files.get(rest.removeprefix(f"resolve/{COMMIT}/"))
        if content is None:
            return self.send(404, {}, error="EntryNotFound")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self.send(200, content, headers=headers)

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked["organization"] or "me"
        name = f"{owner}/{asked['name']}"
        if name in self.storage.repositories:
            return self.send(409, {"url": f"{self._endpoint()}/{name}"})
        private = asked.get("visibility") == "private"
        self.storage.repositories[name] = Stored(private)
        return self.send(200, {"url": f"{self._endpoint()}/{name}"})

    def _modes(self, stored: Stored, asked: dict[str, Any]) -> None:
        def described(file: dict[str, Any]) -> dict[str, Any]:
            path, is_large = file["path"], is_stored_large(file["path"])
            held = stored.files.get(path)
            oid = None
            if held is not None:
                oid = hashlib.sha256(held).hexdigest() if is_large else git_oid(held)
            mode = "lfs" if is_large else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        self.send(200, {"files": [described(file) for file in asked["files"]]})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            there = one["oid"] in self.storage.objects
            address = f"{self._endpoint()}/objects/{one['oid']}"
            objects.append(one if there else one | {"actions": {"upload": {"href": address}}})
        self.send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, stored: Stored, lines: list[dict[str, Any]]) -> None:
        if self.storage.lose_commits:
            return self.send(500, {})
        files = dict(stored.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.storage.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert line["key"] == "header"
        stored.files, stored.commits = files, stored.commits + 1
        address = f"{self._endpoint()}/{name}/commit/{COMMIT}"
        return self.send(200, {"commitUrl": address, "commitOid": COMMIT, "success": True})


def is_stored_large(name: str) -> bool:
    """Whether the hub keeps a file apart from git, by its name."""
    return name.endswith((".safetensors", ".gguf", ".bin"))


def git_oid(content: bytes) -> str:
    """The name that git has for a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
