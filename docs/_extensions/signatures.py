"""Signatures as the code writes them: ``npt.NDArray[np.float32]``, not what that stands for."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

_DOTTED = re.compile(r"(?<![\w.'\"])[A-Za-z_][\w.]*")
_LITERAL = re.compile(r"Literal\[[^\]]*\]")


def written(annotation: Any, scope: dict[str, Any]) -> str:
    """Text of an annotation, with the package's own classes under their full names so that they become links."""
    if not isinstance(annotation, str):
        annotation = inspect.formatannotation(annotation)

    def full(match: re.Match[str]) -> str:
        thing: Any = None
        for number, part in enumerate(match[0].split(".")):
            thing = getattr(thing, part, None) if number else scope.get(part)
        home = getattr(thing, "__module__", None) or ""
        if isinstance(thing, type) and home.startswith("sparsespec"):
            return f"~{home}.{thing.__qualname__}"
        return match[0]

    return _DOTTED.sub(full, annotation)


def _signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    if what not in ("function", "method", "class", "exception") or not signature:
        return None
    function = thing.__init__ if isinstance(thing, type) else thing
    function = inspect.unwrap(function)
    scope = getattr(function, "__globals__", None)
    if scope is None:
        return None
    found = inspect.signature(function)
    if isinstance(thing, type):
        # What dataclasses make has no text of its own.
        scope = {**vars(inspect.getmodule(thing)), **scope} if inspect.getmodule(thing) else scope
    parameters = list(found.parameters.values())
    if isinstance(thing, type) or (what == "method" and parameters and parameters[0].name in ("self", "cls")):
        parameters = parameters[1:]
    parts, star = [], False
    for number, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = True
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {written(parameter.annotation, scope)}"
        if parameter.default is not parameter.empty:
            equals = " = " if parameter.annotation is not parameter.empty else "="
            text += equals + _default(parameter.default)
        parts.append(text)
        last = number + 1 == len(parameters)
        if parameter.kind is parameter.POSITIONAL_ONLY and (
            last or parameters[number + 1].kind is not parameter.POSITIONAL_ONLY
        ):
            parts.append("/")
    result = None
    if not isinstance(thing, type) and found.return_annotation is not found.empty:
        result = written(found.return_annotation, scope)
    return f"({', '.join(parts)})", result


def _default(value: Any) -> str:
    text = repr(value)
    # Factories of dataclasses, objects with addresses, long tuples.
    return "..." if text.startswith("<") or len(text) > 60 else text


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("autodoc-process-signature", _signature)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
