"""What a JPEG demands of its decoder, found without decoding it."""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

__all__ = ["check_jpeg"]

MOST_METADATA = 1 << 24
"""Bytes of EXIF: the decoder joins its segments one by one, in quadratic time."""

_FEWEST_SCANS, _MOST_SCANS = 100, 1000
# Pixels x scans; ordinary progressive files have about ten scans, and each looks at all blocks of the picture again.
_MOST_WORK = 25_000_000_000
_CHUNK = 1 << 20
_START_OF_SCAN, _END = 0xDA, 0xD9
_EXIF = 0xE1
# Start-of-frame markers; C4, C8 and CC in between are something else.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# Markers without a content: TEM, the restarts, the beginning.
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
# Among coded pixels 0 follows on a byte of 255, or a number that says where decoding can start anew.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")


def check_jpeg(handle: BinaryIO) -> None:
    """Refuse a JPEG that would keep its decoder busy for hours: thousands of scans, or endless metadata.

    Parameters
    ----------
    handle : BinaryIO
        The file; read from its beginning. Only for files with several scans more than the header is read.

    Raises
    ------
    ValueError
        More scans or metadata than any camera or program writes. Whatever else is wrong is left to the decoder.
    """
    handle.seek(2)
    pixels, components, scans, metadata, progressive = 0, 0, 0, 0, False
    while (marker := _next_marker(handle)) is not None and marker != _END:
        if marker in _BARE:
            continue
        size = handle.read(2)
        if len(size) < 2:
            return
        length = max(0, int.from_bytes(size, "big") - 2)
        if marker in _FRAMES and length >= 6:
            head = handle.read(6)
            if len(head) == 6:
                height, width, components = struct.unpack(">xHHB", head)
                pixels, progressive = height * width, marker in _PROGRESSIVE
            handle.seek(length - 6, 1)
        elif marker == _START_OF_SCAN:
            scans += 1
            covered = int.from_bytes(handle.read(1), "big")
            if scans == 1 and not progressive and covered == components:
                return
            most = min(max(_MOST_WORK // max(1, pixels), _FEWEST_SCANS), _MOST_SCANS)
            if scans > most:
                raise ValueError(f"its pixels are spread over more than {most} scans")
            handle.seek(length - 1, 1)
            _skip_pixels(handle)
        else:
            metadata += length if marker == _EXIF and handle.peek(4)[:4] == b"Exif" else 0  # type: ignore[attr-defined]
            if metadata > MOST_METADATA:
                raise ValueError(f"it has more than {MOST_METADATA >> 20} MiB of metadata")
            handle.seek(length, 1)


def _next_marker(handle: BinaryIO) -> int | None:
    """Read on to the next marker, over fill bytes and whatever does not belong there, as decoders do."""
    chunk = handle.read(2)
    while len(chunk) == 2 and not (chunk[0] == 0xFF and chunk[1] not in (0x00, 0xFF)):
        if chunk[1] == 0xFF:
            chunk = chunk[1:] + handle.read(1)
        else:
            _skip_pixels(handle)
            chunk = handle.read(2)
    return chunk[1] if len(chunk) == 2 else None


def _skip_pixels(handle: BinaryIO) -> None:
    """Go to the next marker that is none of those among coded pixels, or to the end."""
    carried = b""
    while chunk := handle.read(_CHUNK):
        found = _MARKER.search(carried + chunk)
        if found:
            handle.seek(found.start() - len(carried) - len(chunk), 1)
            return
        carried = chunk[-1:]
