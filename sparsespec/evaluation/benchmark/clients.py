"""Clients of a server, in a process of their own: ``python -P clients.py`` reads what to do from its standard input.

Nothing but the standard library is imported, and bodies are read before it begins, so that the clients take next to
nothing of the processors that the server has.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any, NamedTuple

__all__ = ["main"]

_LATE = 300.0


class _Body(NamedTuple):
    request: bytes
    good: bool
    number: int


def main() -> None:
    """Send requests for so many seconds; write what became of each."""
    task = json.load(sys.stdin)
    found = asyncio.run(_run(task))
    json.dump(found, sys.stdout)


async def _run(task: dict[str, Any]) -> dict[str, Any]:
    bodies = [_body(task["host"], number, body) for number, body in enumerate(task["bodies"])]
    order = _Order(bodies, task["malformed"], task["seed"])
    results: list[list[float]] = []
    began, cpu = time.perf_counter(), time.process_time()
    end = began + task["seconds"]
    clients = [_client(task, order, end, began, results) for _ in range(task["clients"])]
    await asyncio.gather(*clients)
    whole = time.perf_counter() - began
    return {"results": results, "seconds": whole, "cpu_seconds": time.process_time() - cpu}


def _body(host: str, number: int, body: dict[str, Any]) -> _Body:
    with open(body["path"], "rb") as file:
        content = file.read()
    lines = [
        f"POST {body['target']} HTTP/1.1",
        f"Host: {host}",
        f"Content-Type: {body['type']}",
        f"Accept: {body['accept']}",
        f"Content-Length: {len(content)}",
    ]
    return _Body("\r\n".join([*lines, "", ""]).encode() + content, body["good"], number)


class _Order:
    """All good bodies again and again, shuffled each time, and a share of malformed ones between them."""

    def __init__(self, bodies: list[_Body], malformed: float, seed: int) -> None:
        self._good = [body for body in bodies if body.good]
        self._bad = [body for body in bodies if not body.good]
        self._malformed = malformed if self._bad else 0.0
        self._rng = random.Random(seed)
        self._deck: list[_Body] = []

    def following(self) -> _Body:
        if self._rng.random() < self._malformed:
            return self._rng.choice(self._bad)
        if not self._deck:
            self._deck = self._good.copy()
            self._rng.shuffle(self._deck)
        return self._deck.pop()


async def _client(task: dict[str, Any], order: _Order, end: float, began: float, results: list[list[float]]) -> None:
    """One client: a request, its answer, and the next; after a refusal it waits as it is told."""
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    while time.perf_counter() < end:
        body = order.following()
        before = time.perf_counter()
        status, content = 0, b""
        headers: dict[str, str] = {}
        try:
            async with asyncio.timeout(_LATE):
                if writer is None or reader is None:
                    reader, writer = await asyncio.open_connection(task["address"], task["port"])
                writer.write(body.request)
                await writer.drain()
                status, headers, content = await _answer(reader)
        except (OSError, EOFError, ValueError, TimeoutError):
            status = 0
        now = time.perf_counter()
        work, stages = _work(headers.get("server-timing", ""))
        results.append([body.number, float(body.good), status, now - before, work, now - began, len(content), stages])
        if (status == 0 or headers.get("connection", "").lower() == "close") and writer is not None:
            writer.close()
            reader = writer = None
        if status in (429, 503):
            await asyncio.sleep(min(_pause(headers, content), max(0.0, end - now)))
    if writer is not None:
        writer.close()


def _pause(headers: dict[str, str], content: bytes) -> float:
    """Seconds after which the server said to come again: the document has fractions, the header has not."""
    try:
        return float(json.loads(content)["seconds"])
    except (ValueError, LookupError, TypeError):
        return float(headers.get("retry-after", "1"))


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    content = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, content


def _work(timing: str) -> tuple[float, int]:
    """Seconds of work on an image, without upload and waiting, and of how many stages."""
    work, stages = 0.0, 0
    for part in timing.split(","):
        name, _, rest = part.strip().partition(";dur=")
        if rest and name not in ("upload", "wait"):
            work += float(rest) / 1000
            stages += 1
    return work, stages


if __name__ == "__main__":
    main()
