"""The page of the server: a photograph is dropped on it, and its masks can be played with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["answers"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {"css": "text/css", "js": "text/javascript", "html": "text/html"}


def answers() -> dict[str, Callable[[Request], Awaitable[Response]]]:
    """What is behind the addresses of the page."""
    names = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
    own = {path: _answer(name) for path, name in names.items()}
    return {**own, "/viewer.css": _answer("viewer.css"), "/viewer.js": _answer("viewer.js")}


def _answer(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        headers = {"Cache-Control": "no-cache", "Content-Security-Policy": _POLICY}
        return Response(_text(name), media_type=_TYPES[name.rpartition(".")[2]], headers=headers)

    return answer


@cache
def _text(name: str) -> str:
    if name.startswith("viewer."):
        from sparsespec.formats import viewer

        return str(viewer.style() if name.endswith(".css") else viewer.script())
    return files("sparsespec.server").joinpath(name).read_text(encoding="utf-8")
