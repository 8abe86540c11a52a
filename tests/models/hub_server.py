"""A server on this machine that answers as the Hugging Face hub does, with the faults a test asks for."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Request:
    """What was asked, and how it was answered."""

    method: str
    path: str
    headers: dict[str, str]
    status: int
    sent: int = 0

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class HubServer:
    """Repositories at ``url``, in the hub's layout: ``/OWNER/NAME/resolve/REVISION/FILE``.

    ``heads`` and ``gets`` hold what is to go wrong with the next requests of that kind, in order; None is a good
    answer. An integer is a status; ``("cut", n)`` breaks off after n bytes; ``("pause", n, seconds)`` waits there;
    ``("whole",)`` ignores the range; ``("bare",)`` leaves out the headers of a hub.
    """

    def __init__(self, *, cdn: HubServer | None = None) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.gated: set[str] = set()
        self.cdn = cdn
        self.requests: list[Request] = []
        self.heads: deque[Any] = deque()
        self.gets: deque[Any] = deque()
        self.down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub._answer(self, hub.heads)

            def do_GET(self) -> None:
                hub._answer(self, hub.gets)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a client that hung up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def publish(self, repository: str, files: dict[str, bytes]) -> str:
        """Add a commit; ``main`` is the newest."""
        commits = self.repositories.setdefault(repository, {})
        seed = repr((repository, len(commits), sorted(files.items())))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        commits[commit] = dict(files)
        return commit

    def of(self, method: str) -> list[Request]:
        return [request for request in self.requests if request.method == method]

    def _answer(self, handler: BaseHTTPRequestHandler, faults: deque[Any]) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.command, handler.path, headers, 0)
        self.requests.append(request)
        fault = faults.popleft() if faults else (503 if self.down else None)
        if isinstance(fault, int):
            self._send(handler, request, fault, {}, b"")
            return
        parts = unquote(handler.path).lstrip("/").split("/")
        if parts[0] == "cdn":
            self._content(handler, request, self.blobs[parts[1]], {}, fault)
            return
        if len(parts) < 5 or parts[2] != "resolve":
            self._send(handler, request, 404, {}, b"")
            return
        repository, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        commits = self.repositories.get(repository)
        if commits is None:
            # The hub says 401 to somebody unknown, so as not to tell which private repositories there are.
            self._send(handler, request, 401, {"X-Error-Code": "RepoNotFound"}, b"")
            return
        if repository in self.gated:
            self._send(handler, request, 403, {"X-Error-Code": "GatedRepo"}, b"")
            return
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            self._send(handler, request, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
            return
        if file not in commits[commit]:
            self._send(handler, request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
            return
        content = commits[commit][file]
        said = {"X-Repo-Commit": commit}
        if file.endswith(".json"):
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git counts it
            said["ETag"] = f'"{blob}"'
        else:
            digest = hashlib.sha256(content).hexdigest()
            said |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "ETag": f'"{digest}"'}
            if self.cdn is not None:
                self.cdn.blobs[digest] = content
                said["Location"] = f"{self.cdn.url}/cdn/{digest}"
                self._send(handler, request, 302, said, b"")
                return
        if fault == ("bare",):
            said = {}
        self._content(handler, request, content, said, fault)

    def _content(
        self, handler: BaseHTTPRequestHandler, request: Request, content: bytes, said: dict[str, str], fault: Any
    ) -> None:
        start, status = 0, 200
        if request.range is not None and fault != ("whole",):
            start = int(request.range.removeprefix("bytes=").split("-")[0])
            status = 206
            if start >= len(content):
                self._send(handler, request, 416, {"Content-Range": f"bytes */{len(content)}"}, b"")
                return
            said = said | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        said = said | {"Accept-Ranges": "bytes"}
        self._send(handler, request, status, said, content[start:], fault)

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        request: Request,
        status: int,
        headers: dict[str, str],
        body: bytes,
        fault: Any = None,
    ) -> None:
        request.status = status
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        stop = fault[1] if fault and fault[0] in ("cut", "pause") else len(body)
        request.sent = len(body[:stop])  # first: who has read the last byte may ask for it
        handler.wfile.write(body[:stop])
        handler.wfile.flush()
        if fault and fault[0] == "cut":
            handler.close_connection = True
            handler.connection.close()
        elif fault and fault[0] == "pause":
            time.sleep(fault[2])
            request.sent = len(body)
            handler.wfile.write(body[stop:])
