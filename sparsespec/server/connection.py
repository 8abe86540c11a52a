"""Connections that have to come to the point: uvicorn's protocol, with limits on those that say nothing or too much."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from sparsespec.server.limits import Limits
from sparsespec.server.problems import MEDIA_TYPE, Problem

__all__ = ["protocol"]


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """Make the class of the connections of a server with these limits."""

    class Connection(H11Protocol):
        """One connection.

        Within the limit from its beginning, or from the end of an answer, the next request has to be there with its
        headers. What is left of the body of a request that was answered early is read and forgotten until then, so
        that a client which writes before it reads gets its answer. A client that does not read its answer, or hardly,
        is cut off: the answer is in memory, and the connection one of those that there may be.
        """

        _patience: asyncio.TimerHandle | None = None
        _sending: asyncio.TimerHandle | None = None
        _unread = 0
        _reading_since = 0.0

        def connection_made(self, transport: Any) -> None:
            """Begin, unless there are too many."""
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.write(_refusal())
                transport.close()
                return
            self._wait_for_request()

        def connection_lost(self, exc: Exception | None) -> None:
            """End."""
            self._stop_waiting()
            self._stop_watching()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            """Begin to watch a client that does not read as fast as it is answered."""
            super().pause_writing()
            self._unread, self._reading_since = self.transport.get_write_buffer_size(), self.loop.time()
            self._watch()

        def resume_writing(self) -> None:
            """Stop that: it has read nearly all."""
            self._stop_watching()
            super().resume_writing()

        def handle_events(self) -> None:
            """Notice when a request has come with its headers."""
            before = self.cycle
            super().handle_events()
            # One that is answered already has begun to wait for the next.
            if self.cycle is not before and self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            """Begin to wait for the next request."""
            if self._sending is None:
                self._unread, self._reading_since = self.transport.get_write_buffer_size(), self.loop.time()
            self._wait_for_request()
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            """Answer to what is no HTTP, or has too long a head."""
            if self.cycle is not None and not self.cycle.response_complete:
                # In the middle of a body: its request has an answer of its own, or none.
                self.transport.close()
                return
            problem = Problem(
                400,
                "http",
                "Not HTTP",
                "The request is not valid HTTP/1.1, or its headers are too long.",
                "Send fewer or shorter headers.",
                close=True,
            )
            self.transport.write(_written(problem, "400 Bad Request"))
            self.transport.close()

        def _wait_for_request(self) -> None:
            self._stop_waiting()
            self._patience = self.loop.call_later(limits.head_limit, self._give_up)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _give_up(self) -> None:
            self._patience = None
            if self.transport.get_write_buffer_size():
                # Closing would wait until that is read.
                if self._sending is None and not self._reads():
                    self.transport.abort()
                else:
                    self._wait_for_request()
            elif not self.transport.is_closing():
                self.transport.close()

        def _reads(self) -> bool:
            """Tell whether the client has read more since the last time, and is not at it for too long."""
            before, self._unread = self._unread, self.transport.get_write_buffer_size()
            return self._unread < before and self.loop.time() - self._reading_since < limits.upload_limit

        def _watch(self) -> None:
            self._stop_watching()
            self._sending = self.loop.call_later(limits.idle_limit, self._look)

        def _look(self) -> None:
            if self._reads():
                self._watch()
            else:
                self._sending = None
                self.transport.abort()

        def _stop_watching(self) -> None:
            if self._sending is not None:
                self._sending.cancel()
                self._sending = None

    return Connection


def _refusal() -> bytes:
    problem = Problem(
        503,
        "connections",
        "Too many connections",
        "As many connections are open as the server has room for.",
        "Try again later, and use one connection for several requests.",
        retry_after=5,
        close=True,
    )
    return _written(problem, "503 Service Unavailable")


def _written(problem: Problem, status: str) -> bytes:
    content: Any = json.dumps(problem.document()).encode()
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {MEDIA_TYPE}",
        f"Content-Length: {len(content)}",
        *(f"{name}: {value}" for name, value in problem.headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(content)
