"""The description of the server, OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from sparsespec import __version__
from sparsespec.server.body import FIELD
from sparsespec.server.limits import Limits
from sparsespec.server.metrics import MEDIA_TYPE as METRICS
from sparsespec.server.problems import MEDIA_TYPE as PROBLEM
from sparsespec.server.wish import COCO, LABELS, LARGEST_OVERLAY, LAST_PAGE, MOST_LAYERS, OVERLAY

__all__ = ["document"]

_PROBLEMS = {
    "400": "The body is empty, or a form that is damaged or has no image.",
    "403": "The page that sends it is of another origin.",
    "404": "The model is not served here.",
    "406": "Accept names nothing that an answer can be.",
    "408": "The upload was too slow.",
    "413": "The upload has too many bytes, or the image too many pixels.",
    "415": "The body is no image.",
    "421": "The header Host names another server.",
    "422": "A parameter is not valid, or the image is damaged.",
    "429": "Too many images are waiting, or the uploads of others take the memory.",
    "500": "An error in the server, or an image that crashed its process.",
    "503": "Out of time or memory for this image, or the server is starting or stopping.",
}


def document(models: list[str], limits: Limits, root_path: str = "") -> dict[str, Any]:
    """Describe a server.

    Parameters
    ----------
    models : list of str
        Names of the models, the default first.
    limits : Limits
        Of the server.
    root_path : str
        The path under which a proxy shows it.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sparsespec",
            "version": __version__,
            "summary": "Object instances from photographs.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": root_path or "/"}],
        "paths": {
            "/segment": {"post": _segment(models, limits)},
            "/healthz": {"get": _probe("alive", "Whether the process answers.", ready=False)},
            "/readyz": {"get": _probe("ready", "Whether an image would be taken on now.", ready=True)},
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "Numbers for Prometheus.",
                    "responses": {"200": _content("The numbers.", {METRICS: {"schema": {"type": "string"}}}), **_any()},
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "summary": "This description.",
                    "responses": {"200": _content("It.", {COCO: {"schema": {"type": "object"}}}), **_any()},
                }
            },
        },
        "components": {"schemas": _schemas()},
    }


def _segment(models: list[str], limits: Limits) -> dict[str, Any]:
    binary: dict[str, Any] = {"schema": {}}
    boolean = {"type": "boolean", "default": False}
    responses = {
        "200": {
            **_content(
                "The objects, in the form that Accept asks for.",
                {
                    COCO: {"schema": _ref("Coco")},
                    LABELS: {"schema": {"description": "Grey, 16 bits; 0 is background, 1, 2, ... the objects."}},
                    OVERLAY: {"schema": {"description": "The photograph with outlines, colours and scores."}},
                },
            ),
            "headers": {
                "X-Request-ID": {"schema": {"type": "string"}},
                "Server-Timing": {"schema": {"type": "string"}, "description": "Milliseconds of each stage."},
            },
        },
        **{status: _problem(text) for status, text in _PROBLEMS.items()},
    }
    for status in ("429", "503"):
        responses[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return {
        "operationId": "segment",
        "summary": "Find the objects in a photograph.",
        "parameters": [
            _parameter("model", "Name of the model.", {"type": "string", "enum": models, "default": models[0]}),
            _parameter(
                "n_instances",
                "Exactly so many objects, or 'auto': as many as are found.",
                {
                    "oneOf": [
                        {"type": "integer", "minimum": 1, "maximum": limits.max_instances},
                        {"type": "string", "const": "auto"},
                    ]
                },
            ),
            _parameter(
                "long_side",
                "Pixels of the network's input along its longer side; more takes longer and sees smaller objects.",
                {"type": "integer", "minimum": 1, "maximum": limits.max_long_side},
            ),
            _parameter(
                "page",
                "Of a TIFF with several, counted from 1.",
                {"type": "integer", "minimum": 1, "maximum": LAST_PAGE, "default": 1},
            ),
            _parameter("polygons", "Outlines in COCO JSON, instead of run-length encodings.", boolean),
            _parameter(
                "layers",
                "Add maps on the token grid to COCO JSON: the foreground, and so many eigenvectors.",
                {"type": "integer", "minimum": 0, "maximum": MOST_LAYERS},
            ),
            _parameter(
                "max_side",
                "Longest side of an overlay in pixels.",
                {"type": "integer", "minimum": 1, "maximum": LARGEST_OVERLAY, "default": 2048},
            ),
        ],
        "requestBody": {
            "required": True,
            "description": f"One image file of at most {limits.max_body:,} bytes and {limits.max_pixels:,} pixels.",
            "content": {
                "image/*": binary,
                "application/octet-stream": binary,
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": [FIELD],
                        "properties": {FIELD: {"type": "string", "contentMediaType": "image/*"}},
                    }
                },
            },
        },
        "responses": responses,
    }


def _parameter(name: str, text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": text, "schema": schema}


def _probe(name: str, text: str, *, ready: bool) -> dict[str, Any]:
    responses = {"200": _content("Yes.", {COCO: {"schema": _ref("Status")}}), **_any()}
    if ready:
        responses["503"] = _content("No, and why.", {COCO: {"schema": _ref("Status")}})
    return {"operationId": name, "summary": text, "responses": responses}


def _content(text: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": content}


def _problem(text: str) -> dict[str, Any]:
    return _content(text, {PROBLEM: {"schema": _ref("Problem")}})


def _any() -> dict[str, Any]:
    return {"421": _problem(_PROBLEMS["421"])}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> dict[str, Any]:
    text, whole, number = {"type": "string"}, {"type": "integer"}, {"type": "number"}
    pair = {"type": "array", "items": whole, "minItems": 2, "maxItems": 2}
    return {
        "Problem": {
            "type": "object",
            "description": "RFC 9457.",
            "required": ["type", "title", "status", "detail", "advice"],
            "properties": {
                "type": {**text, "description": "Stays the same: what programs can rely on."},
                "title": text,
                "status": whole,
                "detail": text,
                "advice": {**text, "description": "What to do."},
                "request_id": text,
                "seconds": {**number, "description": "As Retry-After, with fractions, where the queue is full."},
            },
        },
        "Status": {
            "type": "object",
            "required": ["status"],
            "properties": {
                "status": text,
                "workers_ready": whole,
                "waiting": whole,
                "models": {"type": "array", "items": text},
            },
        },
        "Coco": {
            "type": "object",
            "description": "COCO JSON of one image.",
            "required": ["info", "licenses", "categories", "annotations", "images"],
            "properties": {
                "info": {"type": "object"},
                "licenses": {"type": "array"},
                "categories": {"type": "array", "items": {"type": "object"}},
                "images": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["id", "file_name", "width", "height"],
                        "properties": {"id": whole, "file_name": text, "width": whole, "height": whole, "page": whole},
                    },
                },
                "annotations": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["id", "image_id", "category_id", "segmentation", "bbox", "area", "score", "label"],
                        "properties": {
                            "id": whole,
                            "image_id": whole,
                            "category_id": whole,
                            "segmentation": {
                                "description": "A run-length encoding, or polygons.",
                                "oneOf": [
                                    {
                                        "type": "object",
                                        "required": ["size", "counts"],
                                        "properties": {"size": pair, "counts": text},
                                    },
                                    {"type": "array", "items": {"type": "array", "items": number}},
                                ],
                            },
                            "bbox": {"type": "array", "items": number, "minItems": 4, "maxItems": 4},
                            "area": whole,
                            "score": {**number, "minimum": 0, "maximum": 1},
                            "iscrowd": whole,
                            "label": {**whole, "description": "Value of the object in the labels PNG."},
                        },
                    },
                },
                "layers": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name", "grid", "extent", "range", "data"],
                        "properties": {
                            "name": text,
                            "grid": {**pair, "description": "Rows and columns."},
                            "extent": {
                                "type": "array",
                                "items": number,
                                "minItems": 2,
                                "maxItems": 2,
                                "description": "The image covers so many rows and columns of the grid, from its start.",
                            },
                            "range": {
                                "type": "array",
                                "items": number,
                                "minItems": 2,
                                "maxItems": 2,
                                "description": "The values that 0 and 255 stand for.",
                            },
                            "data": {**text, "contentEncoding": "base64", "description": "A byte for each token."},
                        },
                    },
                },
            },
        },
    }
