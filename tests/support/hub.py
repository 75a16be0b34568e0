"""A small Hugging Face hub on the loopback address: what ``snapshot_download`` asks for, for models in folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
REVISIONS = ("main", "v1", COMMIT)


class Hub:
    """A hub of models in folders, by their ids."""

    def __init__(self, models: dict[str, Path]):
        self.models = models
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        """Files whose content was asked for."""
        self.endpoint = ""

    def answer(self, path: str, *, content: bool) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for a path."""
        parts = path.strip("/").split("/")
        asks_api = parts[:2] == ["api", "models"]
        owner, name, kind, revision, *rest = (parts[2:] if asks_api else parts) + [""] * 4
        model = f"{owner}/{name}"
        if model not in self.models:
            return 401, b"{}", {"x-error-code": "RepoNotFound"}
        if (revision or "main") not in REVISIONS:
            return 404, b"{}", {"x-error-code": "RevisionNotFound"}
        root = self.models[model]
        files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
        if asks_api:
            return 200, json.dumps(_listing(model, files, tree=kind == "tree")).encode(), {}
        return self._file(model, files, "/".join(rest).strip("/"), content)

    def _file(self, model: str, files: dict[str, Path], name: str, content: bool) -> tuple[int, bytes, dict[str, str]]:
        if model in self.gated:
            return 403, b"{}", {"x-error-code": "GatedRepo"}
        if name not in files:
            return 404, b"{}", {"x-error-code": "EntryNotFound"}
        if content:
            self.fetched.append(name)
        return 200, files[name].read_bytes(), {"etag": f'"{_etag(files[name])}"'}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        content = self.command == "GET"
        status, data, headers = self.hub.answer(unquote(urlsplit(self.path).path), content=content)
        self.send_response(status)
        for key, value in {"x-repo-commit": COMMIT, "content-length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if content:
            self.wfile.write(data)

    do_HEAD = do_GET


@contextmanager
def small_hub(models: dict[str, Path]) -> Iterator[Hub]:
    """Serve folders under their ids."""
    hub = Hub(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _listing(model: str, files: dict[str, Path], *, tree: bool) -> object:
    if not tree:
        return {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in sorted(files)]}
    sizes = {name: (path.stat().st_size, _etag(path)) for name, path in files.items()}
    return [{"type": "file", "path": name, "size": size, "oid": etag} for name, (size, etag) in sizes.items()]


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
