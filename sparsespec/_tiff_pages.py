"""The pages of a TIFF: where their directories lie, and the file as if one of them were the first."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["MOST_PAGES", "EndlessPagesError", "LostPageError", "at_page", "in_memory", "number_of_pages"]

MOST_PAGES = 10_000
"""Directories that a TIFF may have, those of smaller copies and masks included."""

_SUBFILE_TAG, _OLD_SUBFILE_TAG = 254, 255
# In tag 254 the bits for a smaller copy of another page and for a transparency mask; in tag 255 the smaller copy.
_COPY_OR_MASK = 1 | 4
_OLD_COPY = 2
# More entries than any directory has; damaged ones claim up to 2^64.
_MOST_ENTRIES = 4096
# Arrays of the places of strips and tiles are turned into Python numbers: 4 million pieces are 5,000 pixels each in the
# largest picture that is read.
_PLACE_TAGS = (273, 279, 324, 325)
_MOST_PIECES = 1 << 22
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_LARGEST_COPY = 1 << 28
# Tags may share a few bytes.
_SHARED = 1 << 16
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}


class LostPageError(ValueError):
    """The list of the pages is damaged, so that this page and those behind it cannot be found."""


class EndlessPagesError(ValueError):
    """The list of the pages runs in a circle, or is absurdly long."""


def number_of_pages(handle: BinaryIO) -> int:
    """Count the pages of a TIFF or BigTIFF; smaller copies of other pages and masks are none.

    Parameters
    ----------
    handle : BinaryIO
        The file, which begins with the signature of a TIFF.

    Returns
    -------
    int
        At least 1. Where the list of the pages is damaged, the pages that can be reached and one more, for those that
        cannot: `at_page` says of it what is wrong.

    Raises
    ------
    EndlessPagesError
        The list runs in a circle or has more than `MOST_PAGES` entries.
    """
    count = 0
    try:
        for _ in _pages(handle):
            count += 1
    except LostPageError:
        count += 1
    return count


def at_page(handle: BinaryIO, page: int) -> BinaryIO:
    """Show a TIFF as if the directory of this page were its first.

    Parameters
    ----------
    handle : BinaryIO
        The file. It stays open when the result is closed, and isn't to be read as long as that is read.
    page : int
        Counted from 0.

    Returns
    -------
    BinaryIO
        The same bytes, but for those in the header that say where the first directory is; `handle` itself if that is
        the one.

    Raises
    ------
    IndexError
        There are fewer pages; the argument of the error is their number.
    LostPageError
        The list is damaged before it comes to this page.
    EndlessPagesError
        The list runs in a circle, or is too long, before it comes to this page.
    ValueError
        The tags of the page claim more bytes than the file has: reading them would take any amount of memory.
    """
    offset = _find(handle, page)
    _check_tags(handle, offset)
    order, wide = _header(handle)
    kind, start = (f"{order}Q", 8) if wide else (f"{order}I", 4)
    handle.seek(start)
    first = _number(handle, kind)
    handle.seek(0)
    return handle if offset == first else io.BufferedReader(_Patched(handle, start, struct.pack(kind, offset)))


def in_memory(handle: BinaryIO) -> BinaryIO | None:
    """Copy what `at_page` gave into memory; None for the file itself, or one that is too large for that.

    libtiff opens files by their number, sees the true header, and fails on any page if the first is damaged.
    """
    if not isinstance(getattr(handle, "raw", None), _Patched) or os.fstat(handle.fileno()).st_size > _LARGEST_COPY:
        return None
    handle.seek(0)
    return io.BytesIO(handle.read())


class _Patched(io.FileIO):
    """A file of which some bytes read otherwise."""

    def __init__(self, handle: BinaryIO, start: int, patch: bytes) -> None:
        super().__init__(handle.fileno(), "rb", closefd=False)
        self.name = handle.name  # decoders ask for it and do not expect a number
        self._start = start
        self._patch = patch
        self.seek(0)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        place = self.tell()
        count = super().readinto(buffer) or 0
        first, last = max(place, self._start), min(place + count, self._start + len(self._patch))
        if first < last:
            memoryview(buffer).cast("B")[first - place : last - place] = self._patch[
                first - self._start : last - self._start
            ]
        return count

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(buffer)])

    def readall(self) -> bytes:
        place = self.tell()
        content = bytearray(super().readall())
        first, last = max(place, self._start), min(place + len(content), self._start + len(self._patch))
        if first < last:
            content[first - place : last - place] = self._patch[first - self._start : last - self._start]
        return bytes(content)


def _header(handle: BinaryIO) -> tuple[str, bool]:
    """Byte order, and whether it is a BigTIFF."""
    handle.seek(0)
    mark = handle.read(4)
    order = "<" if mark[:2] == b"II" else ">"
    return order, mark[2:] in (b"+\x00", b"\x00+")


def _find(handle: BinaryIO, page: int) -> int:
    count = 0
    for offset in _pages(handle):
        if count == page:
            return offset
        count += 1
    raise IndexError(count)


def _pages(handle: BinaryIO) -> Iterator[int]:
    """Offsets of the directories of the pages."""
    first, found = None, False
    for offset, beside in _directories(handle):
        first = offset if first is None else first
        if not beside:
            found = True
            yield offset
    if not found and first is not None:
        # A file with nothing but thumbnails: the first is what other programs show.
        yield first


def _directories(handle: BinaryIO) -> Iterator[tuple[int, bool]]:
    """Offset of each directory of the chain, and whether it is a smaller copy or a mask."""
    order, wide = _header(handle)
    size = os.fstat(handle.fileno()).st_size
    place, head, entry = ("Q", "Q", 20) if wide else ("I", "H", 12)
    handle.seek(8 if wide else 4)
    offset = _number(handle, order + place)
    seen: set[int] = set()
    while offset != 0 or not seen:
        if offset in seen:
            raise EndlessPagesError(f"the list of its pages comes back to one of them after {len(seen)} pages")
        if len(seen) == MOST_PAGES:
            raise EndlessPagesError(f"the list of its pages has more than {MOST_PAGES} entries")
        if offset is None or not 8 <= offset < size:
            raise LostPageError(f"the next page is listed at byte {offset} of a file of {size} bytes")
        seen.add(offset)
        handle.seek(offset)
        count = _number(handle, order + head)
        if count is None or not 1 <= count <= _MOST_ENTRIES:
            raise LostPageError(f"the next page, at byte {offset}, has a header of {count} entries")
        entries = handle.read(count * entry)
        # Read now: who takes the offset may read elsewhere before asking for the next.
        following = _number(handle, order + place)
        if len(entries) < count * entry:
            raise LostPageError(f"the file ends inside the header of the next page, at byte {offset}")
        yield offset, _is_beside(entries, order, entry)
        if following is None:
            raise LostPageError("the file ends where it should say whether there is another page")
        offset = following


def _check_tags(handle: BinaryIO, offset: int) -> None:
    order, wide = _header(handle)
    size = os.fstat(handle.fileno()).st_size
    link, length = ("Q", 20) if wide else ("I", 12)
    handle.seek(offset)
    count = _number(handle, order + ("Q" if wide else "H")) or 0
    entries = handle.read(min(count, _MOST_ENTRIES) * length)
    claimed = 0
    for tag, kind, values in struct.iter_unpack(f"{order}HH{link}{length - 4 - struct.calcsize(link)}x", entries):
        claimed += values * _BYTES.get(kind, 0)
        if tag in _PLACE_TAGS and values > _MOST_PIECES:
            raise ValueError(f"its header lists {values} strips or tiles, more than {_MOST_PIECES}")
    if claimed > size + _SHARED:
        raise ValueError(f"its tags claim {claimed} bytes of a file of {size} bytes")


def _number(handle: BinaryIO, kind: str) -> int | None:
    content = handle.read(struct.calcsize(kind))
    return struct.unpack(kind, content)[0] if len(content) == struct.calcsize(kind) else None


def _is_beside(entries: bytes, order: str, length: int) -> bool:
    """Whether the entries of a directory say that it is a smaller copy or a mask."""
    for start in range(0, len(entries), length):
        tag, kind = struct.unpack_from(f"{order}HH", entries, start)
        # The value stands at the end of the entry: 4 bytes of 12, 8 of 20.
        room = 4 if length == 12 else 8
        if tag in (_SUBFILE_TAG, _OLD_SUBFILE_TAG) and kind in _INTEGERS and _BYTES[kind] <= room:
            (value,) = struct.unpack_from(order + _INTEGERS[kind], entries, start + length - room)
            if (value & _COPY_OR_MASK) if tag == _SUBFILE_TAG else value == _OLD_COPY:
                return True
    return False
