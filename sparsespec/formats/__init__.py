"""What a run leaves on disk: label PNG, COCO JSON, overlays and the report. Every file appears whole or not at all."""

from __future__ import annotations

from sparsespec.formats.coco import CocoWriter, decode_rle, encode_rle, instance_annotations
from sparsespec.formats.labels import write_label_png
from sparsespec.formats.overlay import instance_colours, jpeg_bytes, render_overlay, write_overlay_jpeg
from sparsespec.formats.report import ReportWriter

__all__ = [
    "CocoWriter",
    "ReportWriter",
    "decode_rle",
    "encode_rle",
    "instance_annotations",
    "instance_colours",
    "jpeg_bytes",
    "render_overlay",
    "write_label_png",
    "write_overlay_jpeg",
]
