"""The body of a request: read into memory up to the limits, and the image taken out of a form."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive

from sparsespec.server.limits import Limits
from sparsespec.server.problems import Problem, ProblemError

__all__ = ["FIELD", "DisconnectedError", "Store", "check_head", "image_of", "read_body"]

FIELD = "image"
"""Name of the form field that holds the image."""

_FORM = "multipart/form-data"
_RAW = "application/octet-stream"
# What curl says of --data-binary unless it is told otherwise.
_CURL = "application/x-www-form-urlencoded"
_MOST_PARTS = 16
# What surrounds the image in a form.
_AROUND = 16_384
_ADVICE = "Send the bytes of the image as they are with its type (image/jpeg, ...), or a form with the field 'image'."


class DisconnectedError(Exception):
    """The client has gone away."""


class Store:
    """The memory that all uploads share.

    Attributes
    ----------
    held : int
        Bytes that are held now.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Give a place for one upload, which is free again afterwards."""
        place = Place(self)
        try:
            yield place
        finally:
            place.leave()

    def take(self, size: int) -> bool:
        """Take so many bytes, if there are."""
        if self.held + size > self._most:
            return False
        self.held += size
        return True


class Place:
    """One upload's part of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._taken = 0

    def take(self, size: int) -> bool:
        """Take so many bytes more, if there are."""
        if self._store.take(size):
            self._taken += size
            return True
        return False

    def leave(self) -> None:
        """Give all of it back."""
        self._store.held -= self._taken
        self._taken = 0


def check_head(headers: Headers, limits: Limits) -> tuple[str, dict[str, str]]:
    """Judge an upload by its headers alone.

    Returns
    -------
    kind : str
        Media type without parameters, "" where there is none.
    parameters : dict of str to str
        Of the media type.

    Raises
    ------
    ProblemError
        413, 415.
    """
    from python_multipart.multipart import parse_options_header

    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ProblemError(
            Problem(
                415,
                "content-encoding",
                "Compressed upload",
                "Bodies with a Content-Encoding are not unpacked.",
                "Send the image file as it is: it is compressed already.",
                headers={"Accept-Encoding": "identity"},
            )
        )
    name, raw = parse_options_header(headers.get("content-type", ""))
    kind = name.decode("latin-1").strip().lower()
    parameters = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in raw.items()}
    if not (kind in ("", _RAW, _CURL, _FORM) or kind.startswith("image/")):
        raise ProblemError(
            Problem(
                415,
                "content-type",
                "Not an image",
                f"The Content-Type says '{kind[:80]}', which is no image.",
                _ADVICE,
                headers={"Accept-Post": f"image/*, {_RAW}, {_FORM}"},
            )
        )
    if kind == _FORM and not parameters.get("boundary"):
        raise _bad_form("its Content-Type has no boundary")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > _most(kind, limits):
        raise ProblemError(_too_large(limits, f"{int(length):,} bytes"))
    return kind, parameters


def _most(kind: str, limits: Limits) -> int:
    return limits.max_body + (_AROUND if kind == _FORM else 0)


async def read_body(receive: Receive, kind: str, limits: Limits, place: Place) -> bytearray:
    """Read the body of a request of a media type into memory.

    Raises
    ------
    ProblemError
        408, 413, 429.
    DisconnectedError
        The client went away before all of it had come.
    """
    most = _most(kind, limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.upload_limit):
            while True:
                try:
                    async with asyncio.timeout(limits.idle_limit):
                        message = await receive()
                except TimeoutError:
                    raise _slow(f"Nothing of the upload came for {limits.idle_limit:g} s.") from None
                if message["type"] == "http.disconnect":
                    raise DisconnectedError
                chunk = message.get("body", b"")
                if len(body) + len(chunk) > most:
                    raise ProblemError(_too_large(limits, "more than that"))
                if not place.take(len(chunk)):
                    raise ProblemError(
                        Problem(
                            429,
                            "busy",
                            "Too many uploads",
                            "The uploads of others take all the memory that the server keeps for them.",
                            "Try again later.",
                            retry_after=2,
                        )
                    )
                body += chunk
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise _slow(f"The upload was not complete after {limits.upload_limit:g} s.") from None


def image_of(body: bytearray, kind: str, parameters: dict[str, str], limits: Limits) -> bytes:
    """Take the image out of a body.

    Raises
    ------
    ProblemError
        400 for an empty body, or a form that is damaged or has no image; 413.
    """
    image = _of_form(body, parameters["boundary"]) if kind == _FORM else bytes(body)
    if not image:
        raise ProblemError(Problem(400, "empty", "Empty upload", "The image has no bytes.", _ADVICE))
    if len(image) > limits.max_body:
        raise ProblemError(_too_large(limits, f"{len(image):,} bytes"))
    return image


def _of_form(body: bytearray, boundary: str) -> bytes:
    """Find the one field of the name ``image``, its file name being nobody's business."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    images: list[bytes] = []
    names: list[str] = []
    part = bytearray()
    header, value = bytearray(), bytearray()
    field = [""]
    ended = [False]

    def begin() -> None:
        if len(names) >= _MOST_PARTS:
            raise _bad_form(f"it has more than {_MOST_PARTS} fields")
        part.clear()
        field[0] = ""

    def end_of_header() -> None:
        if bytes(header).strip().lower() == b"content-disposition":
            _, options = parse_options_header(bytes(value))
            field[0] = options.get(b"name", b"").decode("utf-8", errors="replace")
        header.clear()
        value.clear()

    def data(content: bytes, start: int, end: int) -> None:
        if field[0] == FIELD:
            part.extend(content[start:end])

    def end() -> None:
        names.append(field[0])
        if field[0] == FIELD:
            images.append(bytes(part))
            part.clear()

    def over() -> None:
        ended[0] = True

    callbacks: Any = {
        "on_part_begin": begin,
        "on_header_field": lambda content, start, end: header.extend(content[start:end]),
        "on_header_value": lambda content, start, end: value.extend(content[start:end]),
        "on_header_end": end_of_header,
        "on_part_data": data,
        "on_part_end": end,
        "on_end": over,
    }
    try:
        parser = MultipartParser(boundary.encode("latin-1"), callbacks)
        parser.write(bytes(body))
        parser.finalize()
    except FormParserError as error:
        raise _bad_form("it is damaged") from error
    if not ended[0]:
        raise _bad_form("it ends before its last boundary")
    if len(images) != 1:
        raise _bad_form(f"it has {len(images) or 'no'} field{'s' * (len(images) > 1)} '{FIELD}' where one should be")
    return images[0]


def _bad_form(reason: str) -> ProblemError:
    return ProblemError(
        Problem(
            400,
            "form",
            "Not a form with an image",
            f"The body says it is a form, but {reason}.",
            f"Send multipart/form-data with one file in the field '{FIELD}'.",
        )
    )


def _slow(detail: str) -> ProblemError:
    advice = "Send it again over a faster connection, or a smaller image."
    return ProblemError(Problem(408, "slow-upload", "Upload too slow", detail, advice, close=True))


def _too_large(limits: Limits, size: str) -> Problem:
    return Problem(
        413,
        "too-many-bytes",
        "Upload too large",
        f"An upload may have {limits.max_body:,} bytes; this one has {size}.",
        "Make the image smaller, or save it as JPEG.",
        max_bytes=limits.max_body,
    )
