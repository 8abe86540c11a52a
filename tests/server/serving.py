"""What the tests of the server share: an application to call, requests, a server in a process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from tests.server.server_stubs import Stub

for _package in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(_package, reason="the server needs it: pip install '.[test]'")

from sparsespec.server.app import create_app  # noqa: E402
from sparsespec.server.limits import Limits  # noqa: E402
from sparsespec.server.wish import Wish  # noqa: E402
from sparsespec.server.work import Done, answer  # noqa: E402
from sparsespec.server.workers import Pool  # noqa: E402

T = TypeVar("T")
STUBS = Path(__file__).with_name("server_stubs.py")


class Inline:
    """Workers without processes: the reader and the encoders are the real ones."""

    def __init__(self, models: Mapping[str, Any] | None = None, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._models = {name: model.opened(1) for name, model in (models or {"default": Stub()}).items()}
        self.workers = 1
        self.restarts: dict[str, int] = {"crash": 0}
        self.unusable: str | None = None
        self.waiting = self.at_work = 0
        self.ready = 1
        self.full = self.stopping = False
        self.begun = 0
        self.door = asyncio.Event()
        self.door.set()

    def memory(self) -> Sequence[int]:
        return [123]

    check_room = Pool.check_room
    _usual_seconds = 1.0
    _stopping = property(lambda self: self.stopping)

    def refuse(self) -> None:
        self.stopping = True

    async def start(self) -> None:
        self.ready = 1

    async def stop(self, grace: float = 0.0) -> None:
        self.stopping = True

    async def work(self, wish: Wish, body: bytes) -> tuple[Done, float]:
        await self.door.wait()
        self.begun += 1
        return answer(self._models, wish, body, self.limits.max_pixels), 0.0


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    def problem(self) -> dict[str, Any]:
        """The problem that it is, checked for what each has to have."""
        assert self.headers["content-type"] == "application/problem+json", (self.status, self.body[:200])
        document: dict[str, Any] = self.document
        assert document["status"] == self.status
        assert document["request_id"] == self.headers["x-request-id"]
        for member in ("type", "title", "detail", "advice"):
            assert isinstance(document[member], str)
            assert document[member].strip() == document[member] != ""
        for word in ("Traceback", 'File "', ".py", "/proc/", "/tmp", "sparsespec/"):
            assert word not in self.body.decode()
        return document

    @property
    def kind(self) -> str:
        return str(self.problem()["type"]).rpartition(":")[2]


async def call(
    app: Any,
    method: str = "POST",
    target: str = "/segment",
    *,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes | Iterable[bytes] = b"",
    gone: asyncio.Event | None = None,
    pauses: float = 0.0,
    truncated: bool = False,
) -> Answer:
    """Send one request: the chunks of a body, pauses between them, and the end of the client when an event says so."""
    path, _, query = target.partition("?")
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    if not any(name.lower() == "host" for name, _ in pairs):
        pairs.append(("Host", "testserver"))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in pairs],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
        "state": {},
    }
    chunks = iter([body] if isinstance(body, bytes) else body)
    following: list[bytes | None] = [next(chunks, b"")]
    found = Answer()

    async def receive() -> dict[str, Any]:
        if following[0] is None:
            if truncated:
                return {"type": "http.disconnect"}
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        if pauses:
            await asyncio.sleep(pauses)
        chunk, following[0] = following[0], next(chunks, None)
        return {"type": "http.request", "body": chunk, "more_body": truncated or following[0] is not None}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.status = message["status"]
            found.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            found.body += message.get("body", b"")

    await app(scope, receive, send)
    return found


@contextlib.asynccontextmanager
async def running(app: Any) -> AsyncIterator[Any]:
    async with app.router.lifespan_context(app):
        yield app


def in_a_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop of its own, whatever runs in this thread already, such as that of Playwright."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, main).result()


def ask(app: Any, *arguments: Any, **options: Any) -> Answer:
    """Send one request to an application."""
    return in_a_loop(call(app, *arguments, **options))


def with_app(use: Callable[[Any], Awaitable[Any]], models: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Run an application with worker processes, and use it."""

    async def run() -> Any:
        async with running(create_app(models or {"default": Stub()}, **options)) as app:
            return await use(app)

    return in_a_loop(run())


def inline_app(limits: Limits | None = None, models: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """An application without worker processes."""
    names = models or {"default": Stub()}
    return create_app(names, limits=limits, workers=Inline(names, limits), **options)


def photo(
    width: int = 32, height: int = 24, *, red: int = 99, kind: str = "PNG", mode: str = "RGB", **options: Any
) -> bytes:
    """An image file; its first pixel tells the stub what to do."""
    pixels = np.full((height, width, 3), 120, np.uint8)
    pixels[0, 0] = (red, 0, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def form(
    content: bytes, *, name: str = "image", boundary: str = "border", more: bytes = b""
) -> tuple[dict[str, str], bytes]:
    """Headers and body of a form with one file."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="cat.png"\r\n'
    head += "Content-Type: image/png\r\n\r\n"
    body = more + head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}, body


@contextlib.contextmanager
def served(*, limits: str = "", models: str = "", more: str = "", log: str = "json") -> Iterator[Served]:
    """A server in a process of its own, with stubs for models."""
    code = (
        "import runpy, sys; globals().update(runpy.run_path(sys.argv[1]))\n"
        "from sparsespec.server.limits import Limits\n"
        "from sparsespec.server.run import listen, run\n"
        f"models = {models or {'default': 'Stub()'}!r}\n"
        "models = {name: eval(model) for name, model in models.items()} if isinstance(models, dict) else eval(models)\n"
        f"sys.exit(run(models, listen(port=0), limits=Limits({limits}), workers=1, log_format={log!r}, {more}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "error", "-c", code, str(STUBS)], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    server = Served(process)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Served:
    """A running server and its log."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[dict[str, Any]] = []
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        # A pipe that nobody reads from fills up, and the server would wait.
        threading.Thread(target=self._listen, daemon=True).start()
        self.url = str(self.event("listening")["url"])
        self.port = int(self.url.rpartition(":")[2])

    def event(self, name: str) -> dict[str, Any]:
        """Read the log up to an event."""
        while (line := self._lines.get(timeout=60)) is not None:
            self.log.append(json.loads(line))
            if self.log[-1]["event"] == name:
                return self.log[-1]
        raise AssertionError(f"the log ended without {name!r}: {self.log}")

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                self._lines.put(line)
        self._lines.put(None)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(self, raw: bytes) -> bytes:
        """Send bytes on a connection of their own; all that comes back until the server closes it."""
        with self.connect() as connection:
            connection.sendall(raw)
            return received(connection)

    def post(self, body: bytes, target: str = "/segment", *, more: str = "Connection: close\r\n") -> Answer:
        head = f"POST {target} HTTP/1.1\r\nHost: localhost:{self.port}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        return parsed(self.send(head.encode() + body))

    def get(self, target: str) -> Answer:
        head = f"GET {target} HTTP/1.1\r\nHost: localhost:{self.port}\r\nConnection: close\r\n\r\n"
        return parsed(self.send(head.encode()))


def received(connection: socket.socket) -> bytes:
    content = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            content += chunk
    return content


def parsed(raw: bytes) -> Answer:
    """The answer that bytes are."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert len(body) == int(headers.get("content-length", len(body)))
    return Answer(int(first.split()[1]), headers, body)
