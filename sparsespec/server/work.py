"""One image from the bytes of a file to the bytes of an answer, and the worker process that does it.

A worker process decodes what strangers send. What it says to its parent is therefore plain: a line of JSON and the
bytes of the answer, nothing that is unpickled. Requests, which come from the parent, are pickled.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from sparsespec._processes import talk, write_frame
from sparsespec.server.wish import COCO, LABELS, Wish

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sparsespec.images import ImageReadError
    from sparsespec.pipeline import Segmentation
    from sparsespec.server.models import OpenModel

__all__ = ["Done", "answer", "main", "read_said", "said"]

_LARGEST_LAYER = 64
_LONGEST_TEXT = 400


@dataclass
class Done:
    """What became of an image.

    Attributes
    ----------
    status : int
        Of HTTP: 200, or that of a problem.
    content : bytes
        The answer of a 200.
    problem : dict of str to str
        ``kind``, ``title``, ``detail`` and ``advice`` of all others.
    facts : dict
        ``width``, ``height``, ``instances`` and ``seconds`` per stage, as far as they are known.
    trace : str
        For the log alone.
    """

    status: int
    content: bytes = b""
    problem: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    trace: str = ""


def said(kind: str, done: Done | None = None, text: str = "") -> bytes:
    """Write a message of a worker process."""
    head: dict[str, Any] = {"kind": kind, "text": text}
    content = b""
    if done is not None:
        content = done.content
        head |= {"status": done.status, "problem": done.problem, "facts": done.facts, "trace": done.trace}
    return json.dumps(head, allow_nan=False).encode() + b"\n" + content


def read_said(message: bytes) -> tuple[str, Done, str]:
    """Read a message of a worker process: its kind, what it says of an image, and a text.

    Raises
    ------
    ValueError
        It is not one.
    """
    line, _, content = message.partition(b"\n")
    head = json.loads(line)
    if not isinstance(head, dict):
        raise ValueError("a worker process said something that is no message")
    done = Done(
        int(head.get("status", 0)), content, head.get("problem", {}), head.get("facts", {}), head.get("trace", "")
    )
    return str(head.get("kind")), done, str(head.get("text", ""))


def main(requests: IO[bytes]) -> None:
    """Answer requests until the parent closes its end.

    Requests are pickled pairs in frames of :mod:`sparsespec._processes`: ``("open", (models, threads))``, answered
    by ``ready`` or ``unusable``, and ``("image", (wish, body, max_pixels))``, answered by ``done``.

    Parameters
    ----------
    requests : binary file
        For `sparsespec._processes.talk`.
    """
    answers, inbox = talk(requests)
    models: dict[str, OpenModel] = {}
    while True:
        kind, content = pickle.loads(inbox.get())
        if kind == "open":
            try:
                served, threads = content
                models = {name: model.opened(threads) for name, model in served.items()}
                message = said("ready")
            except Exception as error:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                message = said("unusable", Done(0, trace=traceback.format_exc()), text)
        else:
            wish, body, max_pixels = content
            del content
            message = said("done", answer(models, wish, body, max_pixels))
            del body
        write_frame(answers, message)
        del message


def answer(models: Mapping[str, OpenModel], wish: Wish, body: bytes, max_pixels: int) -> Done:
    """Segment an image; nothing it meets gets out as an exception.

    Parameters
    ----------
    models : mapping of str to OpenModel
        By their names.
    wish : Wish
        What is asked for.
    body : bytes
        The image file.
    max_pixels : int
        Largest image to decode.
    """
    from sparsespec.images import ImageReadError

    facts: dict[str, Any] = {"seconds": {}}
    try:
        return Done(200, _answer(models[wish.model], wish, body, max_pixels, facts), facts=facts)
    except ImageReadError as error:
        return _unreadable(error, facts)
    except MemoryError:
        return Done(503, problem=_out_of_memory(facts), facts=facts)
    except ValueError as error:
        text = " ".join(str(error).split())
        if wish.n_instances is not None and text.startswith("n_instances"):
            problem = _problem(
                "parameter", "A parameter is not valid", f"{_capital(text)}.", "Ask for fewer, or leave it out."
            )
            return Done(422, problem=problem, facts=facts)
        return Done(500, facts=facts, trace=traceback.format_exc())
    except Exception:
        return Done(500, facts=facts, trace=traceback.format_exc())


def _answer(model: OpenModel, wish: Wish, body: bytes, max_pixels: int, facts: dict[str, Any]) -> bytes:
    import numpy as np

    from sparsespec.images import read_image

    seconds: dict[str, float] = facts["seconds"]
    before = time.perf_counter()
    with _file_of(body) as path:
        image = read_image(path, page=wish.page - 1, max_pixels=max_pixels)
    facts["height"], facts["width"] = int(image.shape[0]), int(image.shape[1])
    now = time.perf_counter()
    seconds["read"], before = now - before, now
    found = model(image, n_instances=wish.n_instances, long_side=wish.long_side, eigenvectors=max(0, wish.layers))
    facts["instances"] = len(np.asarray(found.scores))
    now = time.perf_counter()
    stages = {stage: float(value) for stage, value in found.info.get("seconds", {}).items() if stage != "total"}
    seconds |= stages or {"segment": now - before}
    content = _encoded(wish, image, found)
    seconds["write"] = time.perf_counter() - now
    return content


def _encoded(wish: Wish, image: npt.NDArray[Any], found: Segmentation) -> bytes:
    if wish.kind == LABELS:
        from sparsespec.formats.labels import label_png_bytes

        return label_png_bytes(found.labels)
    if wish.kind == COCO:
        return json.dumps(_document(wish, found), allow_nan=False, separators=(",", ":")).encode()
    from sparsespec.formats.overlay import draw_instances, jpeg_bytes, reduced_copy

    photo, small = reduced_copy(image, found.labels, wish.max_side)
    return jpeg_bytes(draw_instances(photo, small, found.scores))


def _document(wish: Wish, found: Segmentation) -> dict[str, Any]:
    """COCO JSON of one image, as ``instances.json`` of a run has it."""
    from sparsespec import __version__
    from sparsespec.formats.coco import CATEGORY_ID, instance_annotations
    from sparsespec.formats.polygons import add_polygons

    annotations = instance_annotations(found.labels, found.scores)
    if wish.polygons:
        add_polygons(annotations, found.labels)
        for annotation in annotations:
            annotation["segmentation"] = annotation.pop("polygons")
    height, width = found.labels.shape
    document: dict[str, Any] = {
        "info": {"description": "sparsespec", "version": __version__},
        "licenses": [],
        "categories": [{"id": CATEGORY_ID, "name": "object", "supercategory": "object"}],
        "annotations": [
            {"id": number, "image_id": 1, **annotation} for number, annotation in enumerate(annotations, start=1)
        ],
        "images": [{"id": 1, "file_name": "", "width": int(width), "height": int(height)}],
    }
    if wish.page > 1:
        document["images"][0]["page"] = wish.page
    if wish.layers >= 0:
        extent = found.info.get("extent")
        document["layers"] = [_layer(name, values, extent) for name, values in found.layers.items()]
    return document


def _layer(name: str, values: npt.NDArray[np.float32], extent: Any) -> dict[str, Any]:
    """A map on the token grid as bytes, with the values that 0 and 255 stand for."""
    import numpy as np

    grid = np.asarray(values, np.float64)
    step = -(-max(grid.shape) // _LARGEST_LAYER)
    covered = [float(size) for size in (extent or grid.shape)]
    if step > 1:
        padded = np.pad(grid, [(0, -size % step) for size in grid.shape], mode="edge")
        grid = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step).mean(axis=(1, 3))
        covered = [size / step for size in covered]
    low, high = float(grid.min()), float(grid.max())
    scaled = np.rint((grid - low) * (255 / (high - low or 1))).astype(np.uint8)
    return {
        "name": name,
        "grid": list(grid.shape),
        "extent": covered,
        "range": [round(low, 6), round(high, 6)],
        "data": base64.b64encode(scaled.tobytes()).decode("ascii"),
    }


@contextmanager
def _file_of(body: bytes) -> Iterator[str]:
    """Give a path under which the bytes can be read: in memory where the system can."""
    if sys.platform == "linux":
        with suppress(OSError), os.fdopen(os.memfd_create("upload"), "w+b", buffering=0) as file:
            path = f"/proc/self/fd/{file.fileno()}"
            if os.path.exists(path):
                rest = memoryview(body)
                while len(rest):
                    rest = rest[file.write(rest) :]
                yield path
                return
    with tempfile.TemporaryDirectory(prefix="sparsespec-") as folder:
        path = os.path.join(folder, "upload")
        with open(path, "wb") as file:
            file.write(body)
        yield path


def _unreadable(error: ImageReadError, facts: dict[str, Any]) -> Done:
    """Tell bytes that are no image from an image that is too large, and from one that is damaged."""
    # Not its advice in every case: that is for somebody who can give the program other limits.
    reason = " ".join(error.reason.split())
    reason = reason if len(reason) <= _LONGEST_TEXT else reason[: _LONGEST_TEXT - 1] + "…"
    if error.kind == "too-large":
        problem = _problem("too-many-pixels", "Image too large", f"{_capital(reason)}.", "Make the image smaller.")
        return Done(413, problem=problem, facts=facts)
    if error.kind == "not-an-image":
        problem = _problem("not-an-image", "Not an image", f"{_capital(reason)}.", f"{_capital(error.advice)}.")
        return Done(415, problem=problem, facts=facts)
    if error.kind == "no-such-page":
        problem = _problem(
            "page", "No such page", f"{_capital(reason)}.", "Leave out page, or give one of them, counted from 1."
        )
        return Done(422, problem=problem, facts=facts)
    problem = _problem(
        "unreadable", "Image cannot be read", f"{_capital(reason)}.", "Open it with another program and save it anew."
    )
    return Done(422, problem=problem, facts=facts)


def _out_of_memory(facts: Mapping[str, Any]) -> dict[str, str]:
    size = f" of {facts['width']} x {facts['height']} pixels" if "width" in facts else ""
    return _problem(
        "memory", "Out of memory", f"There is not enough memory for an image{size}.", "Make the image smaller."
    )


def _problem(kind: str, title: str, detail: str, advice: str) -> dict[str, str]:
    return {"kind": kind, "title": title, "detail": detail, "advice": advice}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
