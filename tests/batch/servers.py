"""Servers on this machine for tests: a real object store, and one that misbehaves as it is told to."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_ATTACHED = """
import os, runpy, sys, threading

def wait():
    os.read(0, 1)
    os._exit(1)

threading.Thread(target=wait, daemon=True).start()
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def attached(module: str, *arguments: str) -> list[str]:
    """Give the command that runs a module until the pipe on its standard input is closed, as when we are killed."""
    return [sys.executable, "-P", "-c", _ATTACHED, module, *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ObjectStore:
    """A process with moto's server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.address = f"http://127.0.0.1:{port}"
        self._log = log

    def count(self) -> Counter[str]:
        """Count the requests since it was started, by method."""
        return Counter(re.findall(r'"(GET|PUT|HEAD|POST|DELETE) /', self._log.read_text(errors="replace")))

    def client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.address, region_name="us-east-1")


@contextmanager
def object_store(log: Path) -> Iterator[ObjectStore]:
    """Run an object store in a process of its own."""
    with log.open("wb") as file:
        command = attached("moto.server", "-H", "127.0.0.1", "-p", "0")
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file)
        assert process.stdin is not None
        with process.stdin:
            try:
                deadline = time.monotonic() + 120
                # Said once it listens.
                while not (
                    found := re.search(r"Running on http://127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))
                ):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(log.read_text(errors="replace"))
                    time.sleep(0.05)
                yield ObjectStore(process, int(found[1]), log)
            finally:
                process.kill()
                process.wait()


Answer = Callable[[BaseHTTPRequestHandler], None]


def answer(
    body: bytes = b"", status: int = 200, *, announced: int | None = None, reset: bool = False, **headers: str
) -> Answer:
    """Answer with this, or with less than was announced."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body) if announced is None else announced))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
        if reset:
            handler.wfile.flush()
            # Closed with a pending "linger" of no time, the other side sees a reset and not an end.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            handler.connection.close()
        if announced is not None:
            handler.close_connection = True

    return give


def xml_error(code: str, status: int, message: str = "told so") -> Answer:
    """Answer as S3 does when something is wrong."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return answer(body, status, Content_Type="application/xml")


def wait(seconds: float) -> Answer:
    """Say nothing for some time."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return give


class Scripted:
    """What a server answers, by path: one after the other, the last one again and again."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.answers: dict[str, list[Answer]] = {}
        self.seen: list[str] = []

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        handler.rfile.read(length)
        self.seen.append(f"{handler.command} {handler.path}")
        path = handler.path.partition("?")[0]
        for key in (f"{handler.command} {path}", path):
            if key in self.answers:
                queue = self.answers[key]
                (queue.pop(0) if len(queue) > 1 else queue[0])(handler)
                return
        answer(status=404)(handler)


@contextmanager
def scripted_server() -> Iterator[Scripted]:
    """Run a server whose answers are given by the test."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, ValueError, OSError):
                self.close_connection = True

        def finish(self) -> None:
            with suppress(ConnectionError, ValueError, OSError):
                super().finish()

        def do_GET(self) -> None:
            script.handle(self)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        script = Scripted(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()
