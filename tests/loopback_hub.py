"""A small server on loopback that speaks the Hugging Face hub's protocol, for tests without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN, WRITER = "hf_reader", "hf_writer"  # the second may write to ``org``
LARGE = (".safetensors", ".bin", ".pth", ".parquet")  # by Git LFS


@dataclass
class Repository:
    """One branch: files of one commit.

    Attributes:
        gated: whether files need a token, as on the hub, where the list of files is public; private: all needs one.
        commits: messages of those that were uploaded.
        wrong: file -> bytes that are sent in its place; cut: files whose first transfer breaks off in the middle.
    """

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    gated: bool = False
    private: bool = False
    wrong: dict[str, bytes] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """Attributes: repositories: ``org/name``, ``datasets/org/name`` -> content; requests: ``METHOD path`` in order."""

    url: str
    repositories: dict[str, Repository]
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)  # that were asked for
    uploads: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> content, before its commit


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lay_out(
    cache: Path, name: str, files: dict[str, bytes] | Path, commit: str, branch: str = "main", kind: str = "models"
) -> Path:
    """Writes a cache as huggingface_hub does, without its list of files; returns the snapshot's folder."""
    if isinstance(files, Path):
        files = {path.name: path.read_bytes() for path in files.iterdir()}
    repository = cache / f"{kind}--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for file, content in files.items():
        blob = repository / "blobs" / (sha256(content) if file.endswith(LARGE) else git_sha1(content))
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).symlink_to(os.path.relpath(blob, (snapshot / file).parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return snapshot


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """A hub until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if match := re.fullmatch(r"lfs/((?:datasets/)?[^/]+/[^/]+)/(.+)", path):
            repository, name = self.hub.repositories[match[1]], match[2]
            content = repository.wrong.get(name, repository.files[name])
            if name in repository.cut:
                repository.cut.remove(name)
                return self._send(200, content[: len(content) // 2], {"Content-Length": str(len(content))})
            return self._content(content, {})
        if match := re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            prefix = "datasets/" if match[1] == "datasets" else ""
            return self._api(prefix + match[2], match[3] == "tree", match[4] or "main")
        if match := re.fullmatch(r"((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        return self._error(404, "NotFound")

    do_HEAD = do_GET

    def _repository(self, name: str, revision: str, of_files: bool) -> Repository | None:
        """The repository, unless an error was answered."""
        if self.headers.get("authorization") == "Bearer hf_expired":
            return self._error(401, "", message="Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(name)
        allowed = self.headers.get("authorization") in (f"Bearer {TOKEN}", f"Bearer {WRITER}")
        if repository is None or (repository.private and not allowed):
            return self._error(401 if not allowed else 404, "RepoNotFound")
        if repository.gated and of_files and not allowed:
            return self._error(403 if self.headers.get("authorization") else 401, "GatedRepo")
        if revision not in ("main", "v1", repository.commit):
            return self._error(404, "RevisionNotFound")
        return repository

    def _api(self, name: str, tree: bool, revision: str) -> None:
        if not (repository := self._repository(name, revision, of_files=False)):
            return None
        if not tree:
            siblings = [{"rfilename": file} for file in repository.files]
            about = {"id": name.removeprefix("datasets/"), "private": repository.private}
            return self._json(about | {"sha": repository.commit, "siblings": siblings})
        entries = []
        for file, content in repository.files.items():
            entry = {"type": "file", "path": file, "size": len(content), "oid": git_sha1(content)}
            if file.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return self._json(entries)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if not (repository := self._repository(name, revision, of_files=True)):
            return None
        headers = {"X-Repo-Commit": repository.commit}
        if (content := repository.files.get(file)) is None:
            return self._error(404, "EntryNotFound", headers)
        if file.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            headers["Location"] = f"http://localhost:{self.server.server_port}/lfs/{name}/{file}"  # another host
            return self._send(302, b"", headers)
        headers["ETag"] = f'"{git_sha1(content)}"'
        return self._content(repository.wrong.get(file, content), headers)

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        """The bytes, or the range of them that was asked for."""
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            self.hub.ranges.append(found[0])
            start, end = int(found[1]), int(found[2] or len(content) - 1)
            headers |= {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            return self._send(206, content[start : end + 1], headers)
        return self._send(200, content, headers)

    # -- uploading, by Git LFS ---------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self._body()
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        match = re.fullmatch(
            r"/(?:api/models/)?(org/[^/.]+)(?:/(preupload|commit)/main|\.git/info/lfs/objects/batch)", self.path
        )
        if match is None or self.headers.get("authorization") != f"Bearer {WRITER}":
            return self._error(403, "Forbidden")
        if match[2] == "commit":
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        if match[2] == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        objects = json.loads(body)["objects"]
        actions = [item | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}} for item in objects]
        return self._json({"transfer": "basic", "objects": actions})

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.uploads[sha256(content)] = content
        self._send(200, b"", {})

    def _create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if self.headers.get("authorization") != f"Bearer {WRITER}" or wanted["organization"] != "org":
            return self._error(403, "Forbidden")
        if name in self.hub.repositories:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repositories[name] = Repository({}, private=wanted.get("visibility") == "private")
        return self._json({"url": f"{self.hub.url}/{name}"})

    def _commit(self, name: str, lines: list[dict]) -> None:
        repository = self.hub.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
            else:
                repository.commits.append(value["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{'e' * 40}", "commitOid": "e" * 40})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers["content-length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None, message: str = "") -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message or code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        length = int(headers.setdefault("Content-Length", str(len(content))))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.close_connection = self.close_connection or len(content) < length
