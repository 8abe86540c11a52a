"""Errors as a client sees them: RFC 9457, with what to do about each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

__all__ = ["MEDIA_TYPE", "Problem", "ProblemError", "internal", "stopping"]

MEDIA_TYPE = "application/problem+json"


class ProblemError(Exception):
    """The request ends here, with this problem for an answer."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.title)
        self.problem = problem


class Problem:
    """What went wrong with a request.

    Parameters
    ----------
    status : int
        Of HTTP.
    kind : str
        Short name that programs can rely on.
    title : str
        The kind of problem, the same each time.
    detail : str
        This one.
    advice : str
        What the client can do.
    headers : mapping
        To go with the answer.
    retry_after : int or None
        Seconds after which it is worth while to try again.
    close : bool
        End the connection with the answer.
    members : dict
        More members of the document.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        title: str,
        detail: str,
        advice: str,
        *,
        headers: Mapping[str, str] | None = None,
        retry_after: int | None = None,
        close: bool = False,
        **members: Any,
    ) -> None:
        self.status, self.kind, self.title = status, kind, title
        self.detail, self.advice = detail, advice
        self.headers = dict(headers or {})
        self.members = members
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, retry_after))
        if close:
            self.headers["Connection"] = "close"

    def document(self, request_id: str | None = None) -> dict[str, Any]:
        """Give the members of the answer."""
        return {
            "type": f"urn:sparsespec:problem:{self.kind}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "advice": self.advice,
            **self.members,
            **({} if request_id is None else {"request_id": request_id}),
        }

    def response(self, request_id: str | None = None) -> Response:
        """Give the answer."""
        content = json.dumps(self.document(request_id), ensure_ascii=False, allow_nan=False).encode()
        return Response(content, self.status, headers=self.headers, media_type=MEDIA_TYPE)

    @classmethod
    def of_status(cls, status: int, headers: Mapping[str, str] | None = None) -> Problem:
        """Give the problem that a plain status of HTTP stands for."""
        phrase = HTTPStatus(status).phrase
        detail, advice = {
            404: ("There is nothing at this address.", "/openapi.json lists what there is."),
            405: ("This address does not take that method.", "The header Allow names those that it takes."),
        }.get(status, (f"{phrase}.", "/openapi.json says what requests look like."))
        return cls(status, phrase.lower().replace(" ", "-"), phrase, detail, advice, headers=headers)


def internal() -> Problem:
    """Something that must not happen; the log of the server says what."""
    return Problem(
        500,
        "internal",
        "Internal error",
        "Something went wrong in the server that is not the request's fault.",
        "Tell the operator of the server the request_id, by which the log can be searched.",
    )


def stopping() -> Problem:
    """Answer to what comes, or is left over, while the server stops."""
    return Problem(
        503,
        "stopping",
        "Stopping",
        "The server is about to stop and takes nothing more on.",
        "Try again in a moment, when another may have taken its place.",
        retry_after=5,
        close=True,
    )
