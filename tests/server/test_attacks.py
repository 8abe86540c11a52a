"""What attackers send, and what operators do to processes."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.server.server_stubs import HANG, KILLED, NAP
from tests.server.serving import Limits, call, in_a_loop, inline_app, parsed, photo, served, with_app

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc of Linux")


def request(*lines: str, body: bytes = b"", target: str = "/segment", method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode("latin-1") + body


@posix
def test_requests_that_two_servers_could_read_in_two_ways() -> None:
    hidden = b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with served() as server:
        for lines in (
            (f"Content-Length: {len(hidden)}", "Transfer-Encoding: chunked"),
            ("Transfer-Encoding: chunked", "Content-Length: 3"),
            ("Transfer-Encoding: chunked, chunked",),
            ("Transfer-Encoding: gzip",),
            ("Content-Length: 5", "Content-Length: 3"),
            ("Content-Length: +5",),
            ("Content-Length : 5",),
        ):
            answer = server.send(request(*lines, body=hidden))
            # One answer: what looks like a second request is none.
            assert answer.count(b"HTTP/1.1 ") == 1, lines
            assert parsed(answer).status == 400
            assert parsed(answer).document["type"] == "urn:sparsespec:problem:http"


@linux
def test_answers_that_nobody_reads_do_not_keep_their_connection() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    head = request(f"Content-Length: {file.tell()}", "Accept: image/jpeg", target="/segment?max_side=4096")
    with served(limits="idle_limit=0.3, max_connections=1") as server, socket.socket() as lazy:
        server.event("ready")
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lazy.connect(("127.0.0.1", server.port))
        # More than the system keeps for it, one after the other.
        lazy.sendall((head + file.getvalue()) * 2)
        assert server.event("request")["status"] == 200
        until(lambda: server.get("/healthz").status == 200)


def until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@posix
def test_an_image_whose_process_is_killed_from_outside_is_tried_once_more() -> None:
    async def use(app: Any) -> None:
        pool = app.state.pool
        await pool.settled.wait()
        headers = {"Content-Type": "image/png"}
        task = asyncio.create_task(call(app, headers=headers, body=photo(red=NAP)))
        while not pool.at_work:
            await asyncio.sleep(0.01)
        os.kill(pool._children[0].pid, signal.SIGKILL)
        assert (await task).status == 200
        assert pool.restarts["crash"] == 1
        # One that has its process killed each time is given up.
        answer = await call(app, headers=headers, body=photo(red=KILLED))
        assert (answer.status, answer.kind) == (503, "memory")
        assert pool.restarts["crash"] == 3
        # Nobody waits for it any more.
        gone = asyncio.Event()
        task = asyncio.create_task(call(app, headers=headers, body=photo(red=HANG), gone=gone))
        while not pool.at_work:
            await asyncio.sleep(0.01)
        gone.set()
        assert (await task).status == 499
        os.kill(pool._children[0].pid, signal.SIGKILL)
        assert (await call(app, headers=headers, body=photo())).status == 200
        assert (pool.restarts["crash"], pool.waiting, pool.at_work) == (4, 0, 0)

    with_app(use, workers=1)


@posix
def test_processes_that_end_one_after_the_other_are_not_started_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec.server import workers

    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds >= 0.5:
            pauses.append(seconds)
        await sleep(min(seconds, 0.01))

    async def use(app: Any) -> None:
        pool = app.state.pool
        await pool.settled.wait()
        monkeypatch.setattr(workers.asyncio, "sleep", note)
        for number in range(3):
            while not pool.ready:
                await sleep(0.01)
            os.kill(pool._children[0].pid, signal.SIGKILL)
            while pool.restarts["crash"] <= number:
                await sleep(0.01)
        while not pool.ready:
            await sleep(0.01)
        assert pauses == [0.5, 1.0, 2.0]

    with_app(use, workers=1)


@linux
def test_workers_end_with_a_server_that_is_killed() -> None:
    with served() as server:
        server.event("ready")
        with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children", encoding="ascii") as file:
            children = [int(pid) for pid in file.read().split()]
        assert children
        server.process.kill()
        server.process.wait()
        until(lambda: not any(os.path.exists(f"/proc/{pid}/cmdline") and _cmdline(pid) for pid in children))


def _cmdline(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


@posix
def test_stopping_before_the_model_is_open() -> None:
    with served(models={"default": "Stub(slow_start=30)"}) as server:  # type: ignore[arg-type]
        until(lambda: server.get("/healthz").status == 200)
        assert server.get("/readyz").document["status"] == "starting"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        server.event("stopped")


def test_when_to_come_again() -> None:
    app = inline_app(Limits(max_waiting=32))
    pool = app.state.pool
    pool.full, pool.at_work = True, 1
    cases = ((32, 0.5, "9", 8.5), (4, 0.1, "1", 0.3), (0, 0.01, "1", 0.1), (9, 99, "60", 60.0))
    for waiting, usual, header, seconds in cases:
        pool.waiting, pool._usual_seconds = waiting, usual
        answer = in_a_loop(call(app, body=photo()))
        assert (answer.status, answer.headers["retry-after"]) == (429, header)
        assert answer.document["seconds"] == seconds


def test_many_pages_and_frames() -> None:
    app = inline_app()
    frames = [Image.new("P", (40, 30), k) for k in range(60)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert in_a_loop(call(app, body=file.getvalue())).document["images"][0]["width"] == 40
    pages = b"II*\0" + (8).to_bytes(4, "little")
    for k in range(20_000):
        entry = b"".join(value.to_bytes(size, "little") for value, size in ((1, 2), (256, 2), (3, 2), (1, 4), (10, 4)))
        pages += entry + (8 + (k + 1) * 18).to_bytes(4, "little")
    answer = in_a_loop(call(app, target="/segment?page=19999", body=pages))
    assert (answer.status, answer.kind) == (422, "unreadable")
