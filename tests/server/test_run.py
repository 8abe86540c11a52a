"""Real servers in processes of their own, spoken to over sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsespec.server.run import ListenError, listen
from tests.server.server_stubs import HANG, NAP
from tests.server.serving import Answer, Served, form, parsed, photo, received, served

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = "max_body=20000, head_limit=0.5, idle_limit=0.5, upload_limit=1.5, max_connections=40, max_waiting=4"
    with served(limits=limits) as server:
        server.event("ready")
        yield server


def head(server: Served, *lines: str, target: str = "/segment") -> bytes:
    return "\r\n".join([f"POST {target} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", *lines, "", ""]).encode()


def test_images_one_after_the_other_on_one_connection(server: Served) -> None:
    with server.connect() as connection, connection.makefile("rb") as file:
        for _ in range(3):
            body = photo()
            connection.sendall(head(server, f"Content-Length: {len(body)}", "Content-Type: image/png") + body)
            answer = next_answer(file)
            assert answer.status == 200
            assert b'"annotations"' in answer.body


def next_answer(file: Any) -> Answer:
    lines = []
    while (line := file.readline()) not in (b"\r\n", b""):
        lines.append(line)
    raw = b"".join(lines)
    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:"))
    return parsed(raw + b"\r\n" + file.read(length))


def test_chunks_without_a_length(server: Served) -> None:
    body = photo()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:40], body[40:])) + b"0\r\n\r\n"
    raw = server.send(head(server, "Transfer-Encoding: chunked", "Connection: close") + chunks)
    assert parsed(raw).status == 200
    endless = b"".join(b"%x\r\n%s\r\n" % (1000, b"x" * 1000) for _ in range(40))
    answer = parsed(server.send(head(server, "Transfer-Encoding: chunked") + endless))
    assert (answer.status, answer.kind) == (413, "too-many-bytes")


def test_whoever_asks_first_is_told_before_sending(server: Served) -> None:
    for length, target, status in (
        (20_001, "/segment", 413),
        (100, "/segment?page=x", 422),
        (100, "/segment?model=x", 404),
    ):
        with server.connect() as connection, connection.makefile("rb") as file:
            connection.sendall(head(server, f"Content-Length: {length}", "Expect: 100-continue", target=target))
            assert next_answer(file).status == status
    body = photo()
    with server.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(head(server, f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert file.readline().startswith(b"HTTP/1.1 100")
        assert file.readline() == b"\r\n"
        connection.sendall(body)
        assert next_answer(file).status == 200


def test_whoever_sends_first_is_told_as_well(server: Served) -> None:
    with server.connect() as connection, connection.makefile("rb") as file:
        body = b"x" * 3_000_000
        connection.sendall(head(server, f"Content-Length: {len(body)}"))
        connection.sendall(body)
        answer = next_answer(file)
        assert (answer.status, answer.kind) == (413, "too-many-bytes")
        # The connection can be used again: what was sent was read and forgotten.
        connection.sendall(head(server, f"Content-Length: {len(photo())}") + photo())
        assert next_answer(file).status == 200


def test_slow_and_broken_uploads(server: Served) -> None:
    with server.connect() as connection:
        connection.sendall(head(server, "Content-Length: 5000") + b"x" * 100)
        answer = parsed(received(connection))
        assert (answer.status, answer.kind) == (408, "slow-upload")
    with server.connect() as connection:
        connection.sendall(head(server, "Content-Length: 5000"))
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                connection.sendall(b"x")
                time.sleep(0.1)
        assert parsed(received(connection)).kind == "slow-upload"
    # Ended before all of it was sent: there is nobody left to tell.
    with server.connect() as connection:
        connection.sendall(head(server, "Content-Length: 5000") + b"x" * 100)
        connection.shutdown(socket.SHUT_WR)
        assert received(connection) == b""
    with server.connect() as connection:
        connection.sendall(head(server, "Content-Length: 5000") + b"x" * 100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.post(photo()).status == 200


def test_connections_that_do_not_come_to_the_point(server: Served) -> None:
    with server.connect() as silent, server.connect() as slow:
        slow.sendall(b"POST /segment HT")
        began = time.monotonic()
        assert received(silent) == b""
        assert received(slow) == b""
        assert time.monotonic() - began < 15
    # The rest of a refused body for ever: its connection is closed.
    with server.connect() as connection:
        connection.sendall(head(server, "Transfer-Encoding: chunked", "Content-Type: text/html"))
        end = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(b"1\r\nx\r\n")
                time.sleep(0.01)
        assert time.monotonic() < end


def test_heads_that_are_no_http_or_too_long(server: Served) -> None:
    for raw in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"x" * 70_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ):
        with server.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(raw + b"\r\n\r\n")
            answer = received(connection)
        if answer:  # what was sent too much can reset the connection before the answer is read
            assert parsed(answer).status == 400
            assert parsed(answer).document["type"] == "urn:sparsespec:problem:http"
    for lines in (("Content-Length: x",), ("Content-Length: -1",), ("Content-Length: 1", "Content-Length: 2")):
        assert parsed(server.send(head(server, *lines))).status == 400
    assert parsed(server.send(b"POST /segment HTTP/1.1\r\n\r\n")).status == 400
    assert server.post(photo()).status == 200


def test_too_many_connections(server: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(server.connect())
        with server.connect() as connection:
            answer = parsed(received(connection))
        assert answer.status == 503
        assert answer.document["type"] == "urn:sparsespec:problem:connections"
    end = time.monotonic() + 20
    while server.get("/healthz").status != 200:
        assert time.monotonic() < end


def test_many_clients_at_once(server: Served) -> None:
    answers: list[Answer] = []

    def client(number: int) -> None:
        headers, body = form(photo())
        for turn in range(4):
            if (number + turn) % 4 == 0:
                answers.append(server.post(b"no image"))
            else:
                kind = f"Content-Type: {headers['Content-Type']}\r\nConnection: close\r\n"
                answers.append(server.post(body, more=kind))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [answer.status for answer in answers]
    assert len(statuses) == 32
    # One at work and four that may wait: others are refused at once.
    assert set(statuses) <= {200, 415, 429}
    assert statuses.count(200) + statuses.count(415) >= 5
    for answer in answers:
        if answer.status != 200:
            answer.problem()


def test_no_dashes_of_a_server_in_its_answers(server: Served) -> None:
    for answer in (server.get("/"), server.get("/nothing"), server.post(b"x")):
        assert "server" not in answer.headers
        assert "x-powered-by" not in answer.headers


@contextlib.contextmanager
def stopping(limits: str = "grace=20.0") -> Iterator[Served]:
    with served(limits=limits) as server:
        server.event("ready")
        yield server


def begin(server: Served, red: int) -> socket.socket:
    body = photo(red=red)
    connection = server.connect()
    connection.sendall(head(server, f"Content-Length: {len(body)}") + body)
    return connection


def until_at_work(server: Served) -> None:
    end = time.monotonic() + 20
    while "sparsespec_in_work 1\n" not in server.get("/metrics").body.decode():
        assert time.monotonic() < end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_finish(number: signal.Signals) -> None:
    with stopping() as server, begin(server, NAP) as first, begin(server, NAP) as second:
        until_at_work(server)
        server.process.send_signal(number)
        assert parsed(received(first)).status == 200
        assert parsed(received(second)).status == 200
        assert server.process.wait(20) == 0
        server.event("stopped")
        with pytest.raises(ConnectionError):
            server.connect()


def test_what_is_not_done_within_the_grace_is_told_so() -> None:
    with stopping("grace=0.3") as server, begin(server, HANG) as connection:
        until_at_work(server)
        server.process.send_signal(signal.SIGTERM)
        answer = parsed(received(connection))
        assert (answer.status, answer.kind) == (503, "stopping")
        assert server.process.wait(20) == 0


def test_the_second_signal_ends_it_at_once() -> None:
    with stopping() as server, begin(server, HANG) as connection:
        until_at_work(server)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 128 + signal.SIGTERM
        received(connection)


def test_the_log_is_json_without_anything_of_clients() -> None:
    with stopping() as server:
        body = photo()
        assert server.post(body, more="Connection: close\r\nX-Request-ID: mine\r\nX-Secret: words\r\n").status == 200
        server.process.send_signal(signal.SIGTERM)
        server.event("stopped")
    assert [line["event"] for line in server.log] == ["listening", "ready", "request", "stopped"]
    line = server.log[2]
    assert (line["request_id"], line["status"], line["width"], line["height"]) == ("mine", 200, 32, 24)
    assert set(line["stages"]) == {"upload", "wait", "read", "features", "write"}
    assert "words" not in str(server.log)


def test_addresses_that_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(listen(port=0)) as sock, pytest.raises(ListenError, match="in use: end what uses it"):
        listen(port=sock.getsockname()[1])
    # No name is asked for elsewhere.
    with pytest.raises(ListenError, match="no address for the host"):
        listen("a" * 70 + ".invalid", 0)
    with pytest.raises(ListenError, match="no address of this machine"):
        listen("192.0.2.1", 0)

    def refuse(self: socket.socket, address: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ListenError, match="port 80 is not allowed to this user"):
        listen(port=80)


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with contextlib.closing(listen(uds=str(path))) as sock:
        assert sock.family == socket.AF_UNIX
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with pytest.raises(ListenError, match="a server listens on"):
            listen(uds=str(path))
    # What a server that was killed leaves is replaced; another file is not.
    listen(uds=str(path)).close()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ListenError, match="is a file, which is left alone"):
        listen(uds=str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ListenError, match="cannot listen on"):
        listen(uds=str(tmp_path / "nothing" / "s"))
