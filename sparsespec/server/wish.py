"""What a client asks for: which model, how many objects, and what the answer is to be."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sparsespec.server.limits import Limits
from sparsespec.server.problems import Problem, ProblemError

__all__ = [
    "COCO", "KINDS", "LABELS", "LARGEST_OVERLAY", "LAST_PAGE", "MOST_LAYERS", "OVERLAY", "PARAMETERS", "Wish",
    "negotiated", "parse",
]  # fmt: skip

LABELS = "image/png"
COCO = "application/json"
OVERLAY = "image/jpeg"
KINDS = (COCO, LABELS, OVERLAY)
"""What an answer can be, the default first."""

PARAMETERS = ("model", "n_instances", "long_side", "page", "polygons", "layers", "max_side")

MOST_LAYERS = 8
LARGEST_OVERLAY = 4096
LAST_PAGE = 1_000_000
_QUALITY = re.compile(r"(?:0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)\Z")


@dataclass(frozen=True)
class Wish:
    """A request, checked.

    Attributes
    ----------
    kind : str
        Media type of the answer, one of :data:`KINDS`.
    model : str
        Name of the model.
    n_instances : int or None
        Exactly so many objects, or as many as are found.
    long_side : int or None
        Longer side of the network's input in pixels, or the usual one.
    page : int
        Of a TIFF, counted from 1.
    polygons : bool
        Outlines in COCO JSON, instead of run-length encodings.
    layers : int
        Eigenvectors to go with COCO JSON beside the foreground; -1 for neither.
    max_side : int
        Longest side of an overlay in pixels.
    """

    kind: str = COCO
    model: str = "default"
    n_instances: int | None = None
    long_side: int | None = None
    page: int = 1
    polygons: bool = False
    layers: int = -1
    max_side: int = 2048


def negotiated(accept: str | None) -> str:
    """Choose what the answer is by the header ``Accept``.

    Parameters
    ----------
    accept : str or None
        The header; several of them joined with commas.

    Returns
    -------
    str
        The one of :data:`KINDS` with the highest quality, the first of those that are equal.

    Raises
    ------
    ProblemError
        406: none of them is acceptable.
    """
    if accept is None or not accept.strip():
        return KINDS[0]
    ranges = list(_ranges(accept))
    qualities = {kind: _quality(kind, ranges) for kind in KINDS}
    best = max(KINDS, key=lambda kind: qualities[kind])
    if qualities[best] > 0:
        return best
    raise ProblemError(
        Problem(
            406,
            "not-acceptable",
            "Not acceptable",
            "The header Accept names nothing that an answer can be.",
            f"Accept one of {', '.join(KINDS)}.",
            available=list(KINDS),
        )
    )


def _ranges(accept: str) -> Iterable[tuple[str, str, float]]:
    """Yield type, subtype and quality of each media range; what is no media range is passed over."""
    for part in accept.split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        kind, slash, subtype = name.lower().partition("/")
        if not (kind and slash and subtype):
            continue
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "q":
                quality = float(value.strip()) if _QUALITY.match(value.strip()) else 0.0
        yield kind, subtype, quality


def _quality(kind: str, ranges: list[tuple[str, str, float]]) -> float:
    """Quality of a media type: the most specific range that covers it decides."""
    own_type, own_subtype = kind.split("/")
    found = [
        ((type_ != "*") + (subtype != "*"), quality)
        for type_, subtype, quality in ranges
        if type_ in ("*", own_type) and subtype in ("*", own_subtype) and not (type_ == "*" and subtype != "*")
    ]
    if not found:
        return 0.0
    closest = max(specific for specific, _ in found)
    return max(quality for specific, quality in found if specific == closest)


def parse(pairs: Iterable[tuple[str, str]], accept: str | None, models: Collection[str], limits: Limits) -> Wish:
    """Check the parameters of a request.

    Parameters
    ----------
    pairs : iterable of (str, str)
        Names and values of the query.
    accept : str or None
        The header ``Accept``.
    models : collection of str
        Names of the models that are served, the default first.
    limits : Limits
        Of the server.

    Raises
    ------
    ProblemError
        406, 404 for a model that is not served, 422 for parameters.
    """
    readers: dict[str, Callable[[str], Any]] = {
        "model": str,
        "n_instances": lambda text: None if text.lower() == "auto" else _number(text, 1, limits.max_instances),
        "long_side": lambda text: _number(text, 1, limits.max_long_side),
        "page": lambda text: _number(text, 1, LAST_PAGE),
        "polygons": _yes_or_no,
        "layers": lambda text: _number(text, 0, MOST_LAYERS),
        "max_side": lambda text: _number(text, 1, LARGEST_OVERLAY),
    }
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name not in readers:
            raise _wrong(name, "there is no such parameter", f"Known are {', '.join(PARAMETERS)}.")
        if name in given:
            raise _wrong(name, "it is given twice", "Give it once.")
        try:
            given[name] = readers[name](value.strip())
        except ValueError as error:
            raise _wrong(name, f"'{_shown(value)}' is not valid", f"Give {error}.") from error
    kind = negotiated(accept)
    names = list(models)
    model = given.setdefault("model", names[0])
    if model not in names:
        raise ProblemError(
            Problem(
                404,
                "unknown-model",
                "No such model",
                f"The model '{_shown(model)}' is not served here.",
                f"Use one of those that are: {', '.join(names)}.",
                models=names,
            )
        )
    return Wish(kind=kind, **given)


def _number(text: str, least: int, most: int) -> int:
    # Not int() alone: it takes blanks, underscores and digits of other scripts.
    if re.fullmatch(r"[0-9]{1,9}", text) and least <= int(text) <= most:
        return int(text)
    raise ValueError(f"a whole number from {least} to {most}")


def _yes_or_no(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() in values:
        return values[text.lower()]
    raise ValueError("'true' or 'false'")


def _shown(text: str) -> str:
    short = text if len(text) <= 60 else text[:59] + "…"
    return "".join(character if character.isprintable() else "?" for character in short)


def _wrong(name: str, reason: str, advice: str) -> ProblemError:
    return ProblemError(
        Problem(
            422,
            "parameter",
            "A parameter is not valid",
            f"The parameter '{_shown(name)}': {reason}.",
            advice,
            parameter=_shown(name),
        )
    )
