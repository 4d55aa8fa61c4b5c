"""A Hugging Face Hub of our own on 127.0.0.1: the endpoints that ``snapshot_download`` uses, and the Hub's ways to say no."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType


class FakeHub:
    """Serves ``repositories``: Hub id -> revision name -> folder. Use as a context manager.

    ``gated``: ids whose files need ``token``. ``drop``: file names whose first download breaks off half-way.
    ``uploads``: what was committed, by id and file; ``private``: by id, whether it was asked to be. ``answer``: status code given to
    every request instead. ``silent``: never answer. ``requests``: "METHOD /path" seen so far.
    """

    def __init__(self, repositories: dict[str, dict[str, Path]]) -> None:
        self.repositories = repositories
        self.gated: set[str] = set()
        self.token = "hf_test"
        self.drop: set[str] = set()
        self.answer: int | None = None
        self.silent = False
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @staticmethod
    def sha(revision: str) -> str:
        """The commit that a revision name stands for."""
        return hashlib.sha1(revision.encode()).hexdigest()

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        """Uploads: a repository is made, told to take every file as it is, and given a commit of them."""
        hub, body = self.hub, self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append(f"POST {self.path}")
        if hub.answer is not None or self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.refuse(hub.answer or 401)
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            hub.uploads.setdefault(name, {})
            hub.private[name] = wanted.get("private", wanted.get("visibility") == "private")
            self.send_json({"url": f"{hub.url}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.send_json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            owner, name = self.path.split("/")[3:5]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.uploads[f"{owner}/{name}"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.send_json({"commitUrl": f"{hub.url}/{owner}/{name}/commit/1", "commitOid": "1" * 40})
        else:
            self.send_json({"valid": True})

    def respond(self) -> None:
        hub = self.hub
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.silent:
            hub.closing.wait(60)
            self.close_connection = True
        elif hub.answer is not None:
            self.refuse(hub.answer)
        elif path.startswith("/api/models/"):
            parts = path.removeprefix("/api/models/").split("/")
            self.describe("/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3] if len(parts) > 3 else "main")
        elif path.count("/") > 4 and path.split("/")[3] == "resolve":
            _, owner, name, _, revision, *rest = path.split("/")
            self.send_file(f"{owner}/{name}", revision, "/".join(rest))
        else:
            self.refuse(404)

    def folder(self, repository: str, revision: str) -> tuple[Path, str] | None:
        revisions = self.hub.repositories.get(repository)
        if revisions is None:
            self.refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
            return None
        for name, folder in revisions.items():
            if revision in (name, FakeHub.sha(name)):
                return folder, FakeHub.sha(name)
        self.refuse(404, "RevisionNotFound")
        return None

    def describe(self, repository: str, what: str, revision: str) -> None:
        found = self.folder(repository, revision)
        if found is None:
            return
        folder, sha = found
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if what == "tree":
            self.send_json([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)} for f in files])
        else:
            self.send_json({"id": repository, "modelId": repository, "sha": sha, "siblings": [{"rfilename": f.name} for f in files]})

    def send_file(self, repository: str, revision: str, name: str) -> None:
        found = self.folder(repository, revision)
        if found is None:
            return
        path = found[0] / name
        authorization = self.headers.get("Authorization")
        if repository in self.hub.gated and authorization != f"Bearer {self.hub.token}":
            self.refuse(403 if authorization else 401, "GatedRepo")
        elif not path.is_file():
            self.refuse(404, "EntryNotFound")
        else:
            data = path.read_bytes()
            start = 0
            wanted = self.headers.get("Range")
            if wanted:
                self.hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{etag(path)}"')
            self.send_header("X-Repo-Commit", found[1])
            self.end_headers()
            if self.command == "GET":
                if name in self.hub.drop:
                    self.hub.drop.remove(name)
                    data = data[: len(data) // 2]
                    self.close_connection = True
                self.wfile.write(data[start:])

    def send_json(self, data: object) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
