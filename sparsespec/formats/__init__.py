"""What a run leaves on disk: label PNG, COCO JSON, overlays and the report. Every file appears whole or not at all."""

from __future__ import annotations

from sparsespec.formats.coco import CocoWriter, decode_rle, encode_rle, instance_annotations
from sparsespec.formats.labels import write_label_png
from sparsespec.formats.overlay import (
    draw_instances,
    instance_colours,
    jpeg_bytes,
    reduced_copy,
    render_overlay,
    write_overlay_jpeg,
)
from sparsespec.formats.report import ReportWriter

__all__ = [
    "CocoWriter",
    "ReportWriter",
    "decode_rle",
    "draw_instances",
    "encode_rle",
    "instance_annotations",
    "instance_colours",
    "jpeg_bytes",
    "reduced_copy",
    "render_overlay",
    "write_label_png",
    "write_overlay_jpeg",
]
