"""A stand-in for the hub: repositories in memory behind the parts of its HTTP API that uploads and downloads use."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_API = re.compile(
    r"/api/models/(?P<id>[^/]+/[^/]+?)(?:/(?P<verb>\w+)/(?P<revision>[^/?]+)(?:/(?P<within>[^?]+))?)?(?:[?].*)?"
)
_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>[^?]+)(?:[?].*)?")


@dataclass
class Repository:
    """Files, and how it was made."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class StandIn(ThreadingHTTPServer):
    """The server, with what it holds and was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.cards: list[str] = []
        """Cards whose metadata a client wanted checked."""
        self.requests: list[str] = []
        self.refuses: int | None = None
        """The status that every request is answered with, if it is one."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer_get()

    def do_HEAD(self) -> None:
        self._answer_get()

    def _answer_get(self) -> None:
        if not self._noted():
            return
        if found := _FILE.fullmatch(self.path):
            self._file(found["id"], found["path"])
            return
        found = _API.fullmatch(self.path)
        repository = None if found is None else self.server.repositories.get(found["id"])
        if found is None or repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif found["verb"] == "tree":
            within = f"{found['within']}/" if found["within"] else ""
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in repository.files.items()
                if name.startswith(within)
            ]
            if tree or not within:
                self._send(200, tree)
            else:
                self._send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        else:
            siblings = [{"rfilename": name} for name in sorted(repository.files)]
            told = {"id": found["id"], "sha": repository.commit, "private": repository.private}
            self._send(200, {**told, "siblings": siblings})

    def _file(self, name: str, path: str) -> None:
        repository = self.server.repositories[name]
        data = repository.files.get(path)
        commit = {"X-Repo-Commit": repository.commit}
        if data is None:
            self._send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", **commit})
        else:
            self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', **commit})

    def do_PUT(self) -> None:
        if self._noted():
            data = self._body()
            self.server.blobs[hashlib.sha256(data).hexdigest()] = data
            self._send(200, {})

    def do_POST(self) -> None:
        data = self._body()
        if not self._noted():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.server.repositories.setdefault(name, Repository(private=private))
            self._send(200, {"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(data)["content"])
            self._send(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [self._upload(each) for each in json.loads(data)["objects"]]
            self._send(200, {"transfer": "basic", "objects": objects})
        elif (found := _API.fullmatch(self.path)) and found["verb"] == "preupload":
            self._send(200, {"files": [_mode(each) for each in json.loads(data)["files"]]})
        else:
            assert found and found["verb"] == "commit", self.path
            self._commit(found["id"], data)

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{self.server.url}/blobs/{asked['oid']}"}}}

    def _commit(self, name: str, data: bytes) -> None:
        repository = self.server.repositories[name]
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repository.files[value["path"]]
        commit = repository.commit
        self._send(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit}
        )

    def _noted(self) -> bool:
        """Note the request; False if it was refused."""
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.refuses is None:
            return True
        self._send(self.server.refuses, {"error": "not you"})
        return False

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(asked: dict[str, Any]) -> dict[str, Any]:
    """As the hub does: weights by large-file storage, all else within the commit."""
    large = asked["path"].endswith((".safetensors", ".st"))
    return {
        **asked,
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
        "oid": None,
    }
