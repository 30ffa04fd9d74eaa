"""A stand-in for the Hugging Face hub on this machine: the few answers that downloading a dataset takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

#: What the hub says in the header X-Error-Code, with its status.
REFUSALS = {"GatedRepo": 403, "RepoNotFound": 404, "RevisionNotFound": 404}


@dataclass
class Hub:
    """Datasets by name and revision (a commit for the revision `main` and others), and what was asked for."""

    address: str = ""
    commits: dict[tuple[str, str], str] = field(default_factory=dict)  #: (repository, revision) → commit
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)  #: (repository, commit) → files
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def publish(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """A new commit that the revision names from now on."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[repo, revision] = self.commits[repo, commit] = commit
        self.files[repo, commit] = files
        return commit


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that is there until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(self.path)
            kind, *rest = unquote(urlsplit(self.path).path).strip("/").split("/")
            if kind == "api":
                rest = rest[1:]
            repo, what, revision = "/".join(rest[:2]), rest[2], rest[3]
            commit = hub.commits.get((repo, revision))
            if repo in hub.gated:
                self.refuse("GatedRepo")
            elif commit is None:
                known = any(name == repo for name, _ in hub.commits)
                self.refuse("RevisionNotFound" if known else "RepoNotFound")
            elif what == "revision":
                self.answer(json.dumps({"id": repo, "sha": commit, "siblings": []}).encode(), commit)
            elif what == "tree":
                files = hub.files[repo, commit].items()
                tree = [{"type": "file", "path": path, "size": len(data), "oid": oid(data)} for path, data in files]
                self.answer(json.dumps(tree).encode(), commit)
            else:
                self.answer(hub.files[repo, commit]["/".join(rest[4:])], commit)

        do_HEAD = do_GET

        def answer(self, data: bytes, commit: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{oid(data)}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def refuse(self, code: str) -> None:
            self.send_response(REFUSALS[code])
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
