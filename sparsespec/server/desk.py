"""Where every request comes in and every answer goes out: its number, the log, and who is let in."""

from __future__ import annotations

import logging
import re
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsespec.server.logs import LOGGER, Record
from sparsespec.server.metrics import Counter
from sparsespec.server.problems import Problem, internal

__all__ = ["Desk", "record_of"]

_KEY = "sparsespec.record"
_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def record_of(scope: Scope) -> Record:
    """What is known of a request that came in over the desk."""
    record: Record = scope[_KEY]
    return record


class Desk:
    """Middleware around everything else.

    Parameters
    ----------
    app : ASGI application
        What answers.
    requests, received, sent : Counter
        To be counted up.
    paths : frozenset of str
        Addresses that are counted by their names; all others are one.
    allowed_hosts : tuple of str
        Of the header ``Host``; () for any.
    cors_origins : tuple of str
        Origins whose pages may send images.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        requests: Counter,
        received: Counter,
        sent: Counter,
        paths: frozenset[str],
        allowed_hosts: tuple[str, ...],
        cors_origins: tuple[str, ...],
    ) -> None:
        self._app = app
        self._requests, self._received, self._sent = requests, received, sent
        self._paths = paths
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        record = Record(
            request_id=asked if _GOOD_ID.match(asked) else uuid.uuid4().hex,
            method=scope["method"] if scope["method"] in _METHODS else "other",
            path=path if path in self._paths else "other",
        )
        scope[_KEY] = record
        begun = False

        async def counted() -> Message:
            message = await receive()
            record.received += len(message.get("body", b""))
            return message

        async def dressed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                record.status = message["status"]
                dress = MutableHeaders(scope=message)
                dress["X-Request-ID"] = record.request_id
                dress["X-Content-Type-Options"] = "nosniff"
                dress["Referrer-Policy"] = "no-referrer"
                dress.setdefault("Cache-Control", "no-store")
            elif message["type"] == "http.response.body":
                record.sent += len(message.get("body", b""))
            await send(message)

        try:
            problem = self._refusal(headers, scope["method"])
            if problem is None:
                await self._app(scope, counted, dressed)
            else:
                record.kind = problem.kind
                await problem.response(record.request_id)(scope, counted, dressed)
        except Exception:
            logging.getLogger(LOGGER).exception("a request met an error", extra={"request_id": record.request_id})
            record.kind = "internal"
            if begun:
                # The client sees that the answer is not whole.
                raise
            await internal().response(record.request_id)(scope, counted, dressed)
        finally:
            status = str(record.status)
            self._requests.add(method=record.method, path=record.path, status=status)
            self._received.add(record.received)
            self._sent.add(record.sent)
            record.write()

    def _refusal(self, headers: Headers, method: str) -> Problem | None:
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy that goes by the other one would take the rest of this body for somebody else's request.
            return Problem(
                400,
                "http",
                "Not HTTP",
                "The request has both a Transfer-Encoding and a Content-Length.",
                "Send one of them.",
                close=True,
            )
        host = _host(headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            return Problem(
                421,
                "host",
                "Not a name of this server",
                "The header Host names another server.",
                "Use an address of this server; its operator can add one with --allowed-host.",
            )
        if method in ("GET", "HEAD", "OPTIONS"):
            return None
        origin = headers.get("origin")
        # A page anywhere could otherwise let its visitor's browser work for it.
        if origin is not None and not self._own(origin, headers) and origin.lower() not in self._origins:
            return Problem(
                403,
                "origin",
                "Not from this page",
                "Pages of other origins may not send images to this server.",
                "Its operator can allow an origin with --cors-origin.",
            )
        return None

    @staticmethod
    def _own(origin: str, headers: Headers) -> bool:
        try:
            return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        except ValueError:
            return False


def _host(value: str) -> str:
    """Take the port off; an address in brackets keeps them."""
    value = value.strip().lower()
    if value.startswith("["):
        return value.partition("]")[0] + "]"
    return value.partition(":")[0]
