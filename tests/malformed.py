"""Damaged and hostile image files, made anew from a seed, and the program that tries to read them.

``python tests/malformed.py read FOLDER`` reads every file of a folder and prints a line of JSON for each. It runs as a
process of its own, so that a crash, a hang and the memory it takes can be seen from outside.
"""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

INTERESTING = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


# What is done to any file


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    return bytes(result)


def flip_bits_of_the_header(rng: random.Random, data: bytes) -> bytes:
    head = min(len(data), 256)
    return flip_bits(rng, data[:head]) + data[head:]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))]


def remove_range(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 200) :] or b"\0"


def repeat_range(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randrange(1, 200))
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 50)) + data[stop:]


def blank_range(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randrange(1, 200))
    return data[:start] + rng.choice((b"\0", b"\xff")) * (stop - start) + data[stop:]


def overwrite_number(rng: random.Random, data: bytes) -> bytes:
    kind = rng.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(kind)
    if len(data) <= size:
        return data
    result = bytearray(data)
    place = rng.randrange(min(len(data), rng.choice((64, 1024, len(data)))) - size + 1)
    struct.pack_into(kind, result, place, rng.choice(INTERESTING) % 256**size)
    return bytes(result)


GENERAL: tuple[Mutation, ...] = (
    flip_bits, flip_bits_of_the_header, truncate, remove_range, repeat_range, blank_range, overwrite_number,
)  # fmt: skip


# PNG


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        if place + 12 + size > len(data):
            break
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    return chunks


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def png_header(rng: random.Random, data: bytes) -> bytes:
    """Other sizes, depth, colour or interlacing, with the right checksum."""
    chunks = png_chunks(data)
    if not chunks or len(chunks[0][1]) != 13:
        return flip_bits(rng, data)
    fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    field = rng.randrange(7)
    fields[field] = rng.choice(INTERESTING) if field < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return png([(b"IHDR", struct.pack(">IIBBBBB", *fields)), *chunks[1:]])


def png_body(rng: random.Random, data: bytes) -> bytes:
    """Change one chunk, its checksum with it."""
    chunks = png_chunks(data)
    if not chunks:
        return flip_bits(rng, data)
    place = rng.randrange(len(chunks))
    kind, body = chunks[place]
    if body:
        body = rng.choice(GENERAL)(rng, body)
    chunks[place] = (kind, body)
    return png(chunks)


def png_order(rng: random.Random, data: bytes) -> bytes:
    """Lose a chunk, double one, swap two, or cut the pixels into many pieces, empty ones among them."""
    chunks = png_chunks(data)
    if not chunks:
        return flip_bits(rng, data)
    place, other = rng.randrange(len(chunks)), rng.randrange(len(chunks))
    what = rng.randrange(4)
    if what == 0:
        del chunks[place]
    elif what == 1:
        chunks.insert(other, chunks[place])
    elif what == 2:
        chunks[place], chunks[other] = chunks[other], chunks[place]
    else:
        kind, body = chunks[place]
        chunks[place : place + 1] = [(kind, body[i : i + 7]) for i in range(0, len(body), 7)] + [(kind, b"")] * 50
    return png(chunks)


def png_extra(rng: random.Random, data: bytes) -> bytes:
    """Put in a profile, text or metadata, compressed a thousandfold or nonsense."""
    blown = zlib.compress(bytes(rng.choice((100, 1 << 22, 1 << 26))), 9)
    extra = rng.choice((
        (b"iCCP", b"icc\0\0" + blown),
        (b"zTXt", b"Comment\0\0" + blown),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + blown),
        (b"tEXt", b"Comment\0" + bytes(100_000)),
        (b"eXIf", rng.randbytes(60)),
        (b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + rng.randbytes(200)),
        (b"PLTE", rng.randbytes(rng.choice((0, 1, 3, 768, 769)))),
        (b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 6, 256, 300)))),
        (b"acTL", struct.pack(">II", rng.choice(INTERESTING), 0)),
        (b"pHYs", rng.randbytes(9)),
        (b"gAMA", bytes(4)),
        (b"cHRM", rng.randbytes(5)),
    ))  # fmt: skip
    chunks = png_chunks(data)
    return png([*chunks[:1], extra, *chunks[1:]])


def png_filters(rng: random.Random, data: bytes) -> bytes:
    """Change what the pixels inflate to: filters that do not exist, too few rows, far too many."""
    chunks = png_chunks(data)
    body = b"".join(body for kind, body in chunks if kind == b"IDAT")
    try:
        rows = zlib.decompress(body)
    except zlib.error:
        return flip_bits(rng, data)
    rows = rng.choice((
        lambda: bytes(byte if rng.random() > 0.01 else rng.randrange(256) for byte in rows),
        lambda: rows[: len(rows) // 3],
        lambda: rows + bytes(1 << 26),
        lambda: b"",
    ))()  # fmt: skip
    kept = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
    return png([*kept, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")])


# JPEG


def jpeg_segments(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Markers and contents up to the first scan, and all from there on."""
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, size = data[place + 1], struct.unpack_from(">H", data, place + 2)[0]
        if marker == 0xDA or size < 2:
            break
        segments.append((marker, data[place + 4 : place + 2 + size]))
        place += 2 + size
    return segments, data[place:]


def jpeg(segments: list[tuple[int, bytes]], rest: bytes) -> bytes:
    return (
        b"\xff\xd8"
        + b"".join(
            bytes((0xFF, marker)) + struct.pack(">H", min(len(body) + 2, 65535)) + body[:65533]
            for marker, body in segments
        )
        + rest
    )


def jpeg_size(rng: random.Random, data: bytes) -> bytes:
    """Other numbers in the frame's header: precision, size, components, sampling."""
    segments, rest = jpeg_segments(data)
    for place, (marker, body) in enumerate(segments):
        if 0xC0 <= marker <= 0xC2 and len(body) > 6:
            changed = bytearray(body)
            if rng.random() < 0.5:
                struct.pack_into(">H", changed, rng.choice((1, 3)), rng.choice(INTERESTING) & 0xFFFF)
            else:
                changed[rng.randrange(len(changed))] = rng.choice((0, 1, 2, 4, 0x11, 0x22, 0x44, 0xFF))
            segments[place] = (marker, bytes(changed))
    return jpeg(segments, rest)


def jpeg_segment(rng: random.Random, data: bytes) -> bytes:
    """Change, lose, double or retype a segment."""
    segments, rest = jpeg_segments(data)
    if not segments:
        return flip_bits(rng, data)
    place = rng.randrange(len(segments))
    marker, body = segments[place]
    what = rng.randrange(4)
    if what == 0 and body:
        segments[place] = (marker, rng.choice(GENERAL)(rng, body))
    elif what == 1:
        del segments[place]
    elif what == 2:
        segments += [segments[place]] * rng.choice((1, 300))
    else:
        segments[place] = (rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE)), body)
    return jpeg(segments, rest)


def jpeg_scan(rng: random.Random, data: bytes) -> bytes:
    """Damage the coded pixels, put markers among them, repeat the scan, or put a picture in the picture."""
    segments, rest = jpeg_segments(data)
    what = rng.randrange(4)
    if what == 0:
        rest = rest[:20] + flip_bits(rng, rest[20:] or b"\0")
    elif what == 1 and len(rest) > 30:
        place = rng.randrange(20, len(rest))
        marker = rng.choice((0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xFE, 0x01))
        rest = rest[:place] + bytes((0xFF, marker)) + rest[place:]
    elif what == 2:
        rest = rest.removesuffix(b"\xff\xd9") * 20 + b"\xff\xd9"
    else:
        rest = rest[:40] + data + rest[40:]
    return jpeg(segments, rest)


def jpeg_extra(rng: random.Random, data: bytes) -> bytes:
    """Put in metadata: EXIF with wild offsets, pieces of a profile that claim to be many, MPO lists."""
    segments, rest = jpeg_segments(data)
    entry = struct.pack("<HHII", 274, rng.choice((3, 4, 5, 12)), rng.choice((1, 0, 2**31)), rng.choice(INTERESTING))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", rng.choice((1, 2, 65535))) + entry + struct.pack("<I", 8)
    extra = rng.choice((
        (0xE1, b"Exif\0\0" + exif),
        (0xE1, b"Exif\0\0" + rng.randbytes(100)),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + rng.randbytes(500)),
        (0xE2, b"ICC_PROFILE\0" + bytes((rng.randrange(256), rng.randrange(256))) + rng.randbytes(50)),
        (0xE2, b"MPF\0II*\0\x08\0\0\0" + rng.randbytes(80)),
        (0xE2, b"MPF\0" + exif.replace(struct.pack("<H", 274), struct.pack("<H", 0xB001))),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed" + rng.randbytes(40)),
        (0xEE, b"Adobe\0" + rng.randbytes(6)),
        (0xFE, b"\xff" * 65533),
    ))  # fmt: skip
    return jpeg([extra, *segments], rest)


# TIFF


def tiff_entries(data: bytes) -> tuple[str, bool, list[tuple[int, int, int, int]], list[int]]:
    """Byte order, BigTIFF or not, (place, tag, type, count) of all entries, and places of the links to directories."""
    order = "<" if data[:2] == b"II" else ">"
    wide = len(data) > 3 and 43 in data[2:4]
    head, link, length = ("Q", "Q", 20) if wide else ("H", "I", 12)
    entries: list[tuple[int, int, int, int]] = []
    links, seen = [8 if wide else 4], set[int]()
    while links[-1] + struct.calcsize(link) <= len(data):
        (offset,) = struct.unpack_from(order + link, data, links[-1])
        if offset in seen or not 8 <= offset < len(data) - 8 or len(seen) > 50:
            break
        seen.add(offset)
        (count,) = struct.unpack_from(order + head, data, offset)
        place = offset + struct.calcsize(head)
        if place + count * length > len(data):
            break
        for entry in range(place, place + count * length, length):
            tag, kind, number = struct.unpack_from(f"{order}HH{link}", data, entry)
            entries.append((entry, tag, kind, number))
        links.append(place + count * length)
    return order, wide, entries, links


def tiff_entry(rng: random.Random, data: bytes) -> bytes:
    """Change a tag's number, type, count, or value or offset."""
    order, wide, entries, _ = tiff_entries(data)
    if not entries:
        return flip_bits(rng, data)
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        entry = rng.choice(entries)[0]
        what = rng.randrange(5)
        word, value = ("Q", entry + 12) if wide else ("I", entry + 8)
        if what == 0:
            tag = rng.choice((254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 324, 330, 338, 347))
            struct.pack_into(order + "H", result, entry, tag)
        elif what == 1:
            struct.pack_into(order + "H", result, entry + 2, rng.choice((0, 1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 99)))
        elif what == 2:
            struct.pack_into(order + word, result, entry + 4, rng.choice(INTERESTING))
        else:
            number = rng.choice((*INTERESTING, rng.randrange(1 << 16), len(data) - 1, entry))
            struct.pack_into(order + "I", result, value, number)
    return bytes(result)


TIFF_VALUES: dict[int, tuple[int, ...]] = {
    254: (1, 4, 5, 2**31),
    256: (0, 1, 65535, 2**31 - 1, 2**31, 2**32 - 1),
    257: (0, 1, 65535, 2**31 - 1, 2**31, 2**32 - 1),
    258: (0, 1, 2, 3, 4, 7, 12, 16, 24, 32, 64, 65535),
    259: (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 32773, 32809, 32946, 33003, 34661, 34712, 34887, 34892, 34925, 50000, 50001),
    262: (0, 1, 2, 3, 4, 5, 6, 8, 32803, 34892, 65535),
    266: (0, 2, 3),
    277: (0, 1, 2, 3, 4, 5, 100, 65535),
    278: (0, 1, 2, 2**31, 2**32 - 1),
    284: (0, 2, 3),
    317: (0, 2, 3, 4, 34892, 34893),
    322: (0, 1, 15, 16, 65536, 2**31, 2**32 - 16),
    323: (0, 1, 15, 16, 65536, 2**31, 2**32 - 16),
    338: (0, 1, 2, 3, 65535),
    339: (0, 2, 3, 4, 5, 6, 65535),
    530: (0, 1, 2, 3, 65535),
    32997: (0, 2, 2**31),
}


def tiff_value(rng: random.Random, data: bytes) -> bytes:
    """Give one or two tags values that mean something else."""
    order, wide, entries, _ = tiff_entries(data)
    known = [entry for entry in entries if entry[1] in TIFF_VALUES]
    if not known:
        return flip_bits(rng, data)
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        entry, tag, _, _ = rng.choice(known)
        struct.pack_into(f"{order}HH{'QQ' if wide else 'II'}", result, entry, tag, 4, 1, rng.choice(TIFF_VALUES[tag]))
        if order == ">" and wide:
            result[entry + 12 : entry + 20] = result[entry + 16 : entry + 20] + bytes(4)
    return bytes(result)


def tiff_link(rng: random.Random, data: bytes) -> bytes:
    """Lead the chain of directories astray: back, out of the file, into the pixels, into itself."""
    order, wide, _, links = tiff_entries(data)
    result = bytearray(data)
    place = rng.choice(links)
    kind = order + ("Q" if wide else "I")
    if place + struct.calcsize(kind) > len(data):
        return flip_bits(rng, data)
    first = struct.unpack_from(kind, data, links[0])[0]
    target = rng.choice((first, first, 8, len(data) - 1, len(data), 2**32 - 1, 2**31, rng.randrange(len(data)), 7))
    struct.pack_into(kind, result, place, target)
    return bytes(result)


def tiff_places(rng: random.Random, data: bytes) -> bytes:
    """Change where strips and tiles lie, or how long they are."""
    order, wide, entries, _ = tiff_entries(data)
    places = [entry for entry in entries if entry[1] in (273, 279, 324, 325)]
    if not places:
        return flip_bits(rng, data)
    entry, _, kind, count = rng.choice(places)
    size = TIFF_SIZES.get(kind, 4)
    value = entry + (12 if wide else 8)
    if count * size > (8 if wide else 4):
        (value,) = struct.unpack_from(order + ("Q" if wide else "I"), data, value)
    result = bytearray(data)
    code = {2: "H", 4: "I", 8: "Q"}.get(size, "B")
    for index in range(min(count, 5000)) if rng.random() < 0.5 else [rng.randrange(max(1, count))]:
        if value + (index + 1) * size <= len(data):
            number = rng.choice((0, 1, len(data) - 2, len(data) * 2, 2**31, 2**32 - 1)) % 256**size
            struct.pack_into(order + code, result, value + index * size, number)
    return bytes(result)


# WebP


def riff_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        chunks.append((data[place : place + 4], data[place + 8 : place + 8 + size]))
        place += 8 + size + size % 2
    return chunks


def riff(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_chunk(rng: random.Random, data: bytes) -> bytes:
    """Change, lose, double or add a chunk: canvases of any size, frames outside them, profiles, metadata."""
    chunks = riff_chunks(data)
    if not chunks:
        return flip_bits(rng, data)
    place = rng.randrange(len(chunks))
    kind, body = chunks[place]
    what = rng.randrange(5)
    if what == 0 and body:
        chunks[place] = (kind, rng.choice(GENERAL)(rng, body))
    elif what == 1:
        del chunks[place]
    elif what == 2:
        chunks.append(chunks[place])
    elif what == 3:
        side = rng.choice((0, 100, 16383, 2**24 - 1))
        canvas = bytes((rng.choice((0x02, 0x10, 0x12, 0x3E)), 0, 0, 0)) + struct.pack("<I", side)[:3] * 2
        if kind == b"VP8X":
            chunks[place] = (b"VP8X", canvas)
        else:
            chunks.insert(0, (b"VP8X", canvas))
    else:
        extra = rng.choice((b"ICCP", b"EXIF", b"XMP ", b"ANIM", b"ANMF", b"ALPH"))
        chunks.insert(rng.randrange(len(chunks) + 1), (extra, rng.randbytes(rng.choice((0, 5, 40)))))
    return riff(chunks)


# GIF


def gif_frame(data: bytes) -> int:
    """Where the first frame begins; -1 if none is found."""
    place = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    while place + 12 < len(data) and data[place] != 0x2C:
        if data[place] != 0x21:
            return -1
        place += 2
        while place < len(data) and data[place]:
            place += data[place] + 1
        place += 1
    return place if place + 12 < len(data) else -1


def gif_sizes(rng: random.Random, data: bytes) -> bytes:
    """Change the logical screen, the place and size of a frame, the width of its codes."""
    result = bytearray(data)
    frame = gif_frame(data)
    if rng.random() < 0.4 or frame < 0:
        if len(data) < 13:
            return data
        struct.pack_into("<H", result, rng.choice((6, 8)), rng.choice(INTERESTING) & 0xFFFF)
        if rng.random() < 0.3:
            result[10] = rng.randrange(256)
    else:
        what = rng.randrange(3)
        if what == 0:
            struct.pack_into("<H", result, frame + rng.choice((1, 3, 5, 7)), rng.choice(INTERESTING) & 0xFFFF)
        elif what == 1:
            result[frame + 9] = rng.randrange(256)
        else:
            result[frame + 10] = rng.randrange(256)
    return bytes(result)


def gif_blocks(rng: random.Random, data: bytes) -> bytes:
    """Put extensions before the first frame: comments without end, nonsense, a wrong length."""
    palette = 3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0
    place = 13 + palette
    extra = rng.choice((
        b"\x21\xfe" + (b"\xff" + b"c" * 255) * 2000 + b"\0",
        b"\x21\xfe\x05abc",
        b"\x21\xf9\x04" + rng.randbytes(4) + b"\0",
        b"\x21\xf9\x00",
        b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00",
        b"\x2c" + rng.randbytes(9),
        b"\x3b",
        b"\0" * 5000,
    ))  # fmt: skip
    return data[:place] + extra + data[place:]


SPECIAL: dict[str, tuple[Mutation, ...]] = {
    "png": (png_header, png_body, png_order, png_extra, png_filters),
    "jpg": (jpeg_size, jpeg_segment, jpeg_scan, jpeg_extra),
    "tif": (tiff_entry, tiff_value, tiff_value, tiff_link, tiff_places),
    "webp": (webp_chunk, webp_chunk),
    "gif": (gif_sizes, gif_blocks),
    "avif": (),
    "jp2": (),
    "bmp": (),
    "tga": (),
    "ppm": (),
}


def kind_of(data: bytes) -> str:
    """Name of the format, as in `SPECIAL`, of a file that may be damaged."""
    signatures = {
        b"\x89PNG": "png", b"\xff\xd8": "jpg", b"II": "tif", b"MM": "tif", b"RIFF": "webp", b"GIF8": "gif",
    }  # fmt: skip
    return next((kind for begin, kind in signatures.items() if data.startswith(begin)), "bmp")


@functools.cache
def originals() -> dict[str, bytes]:
    """Files of every kind the reader knows, from pictures of scikit-image."""
    import numpy as np
    import tifffile
    from PIL import Image, features
    from skimage import data

    colour = np.ascontiguousarray(data.coffee()[100:340:4, 200:520:4])
    grey = np.ascontiguousarray(data.camera()[100:200:2, 150:290:2])
    deep = grey.astype(np.uint16) * 257
    picture = Image.fromarray(colour)
    files: dict[str, bytes] = {}

    def save(name: str, image: Image.Image, **options: Any) -> None:
        buffer = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(name.split(".")[-1], name.split(".")[-1].upper())
        image.save(buffer, kind, **options)
        files[name] = buffer.getvalue()

    def tiff(name: str, *pages: Any, options: dict[str, Any] | None = None, **file_options: Any) -> None:
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer, **file_options) as writer:
            for page in pages:
                photometric: Any = "rgb" if page.ndim == 3 else "minisblack"
                writer.write(page, **{"photometric": photometric, "metadata": None, **(options or {})})
        files[name] = buffer.getvalue()

    exif = Image.Exif()
    exif[274] = 6
    exif[271] = "Camera"
    opacity = Image.fromarray(np.dstack([colour, np.full(colour.shape[:2], 128, np.uint8)]))
    frames = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    save("baseline.jpg", picture, quality=80, exif=exif, icc_profile=bytes(range(256)) * 10)
    save("progressive.jpg", picture, quality=80, progressive=True)
    save("grey.jpg", Image.fromarray(grey), restart_marker_blocks=3)
    save("ink.jpg", picture.convert("CMYK"))
    save("colour.png", picture, exif=exif.tobytes())
    save("opacity.png", opacity)
    save("palette.png", picture.quantize(16), transparency=3)
    save("bits.png", picture.convert("1"))
    save("deep.png", Image.fromarray(deep))
    save("animated.png", picture, **frames)
    save("frames.gif", picture, **frames)
    save("palette.gif", picture.quantize(16), interlace=1, transparency=2)
    save("lossy.webp", picture, exif=exif)
    save("lossless.webp", opacity, lossless=True)
    save("frames.webp", picture, **frames)
    if features.check("avif"):
        save("colour.avif", picture, speed=10, exif=exif)
    if features.check("jpg_2000"):
        save("colour.jp2", picture)
    save("colour.bmp", picture)
    save("colour.tga", picture, compression="tga_rle")
    save("grey.ppm", Image.fromarray(grey))
    tiff("strips.tif", colour, options={"rowsperstrip": 16})
    tiff("deflate.tif", colour, options={"rowsperstrip": 16, "compression": "zlib", "predictor": 2})
    tiff("tiles.tif", colour, options={"tile": (32, 32), "compression": "zlib"})
    tiff("deep.tif", deep, options={"rowsperstrip": 16, "compression": "zlib"})
    tiff("deep-tiles.tif", np.dstack([deep] * 3), byteorder=">", options={"tile": (16, 32)})
    tiff("deep-lzma.tif", deep, options={"compression": "lzma"})
    tiff("float.tif", (grey / 255).astype(np.float32))
    tiff("planes.tif", np.moveaxis(colour, -1, 0), options={"planarconfig": "separate"})
    tiff("big.tif", colour, deep, bigtiff=True, options={"rowsperstrip": 16})
    tiff("big-tiles.tif", colour, bigtiff=True, byteorder=">", options={"tile": (32, 32), "compression": "zlib"})
    tiff("pages.tif", colour, deep, grey)
    save("jpeg.tif", picture, compression="jpeg")
    save("lzw.tif", picture, compression="tiff_lzw")
    save("packbits.tif", picture.quantize(16), compression="packbits")
    save("fax.tif", picture.convert("1"), compression="group4")
    save("ink.tif", picture.convert("CMYK"), compression="tiff_adobe_deflate")
    save("book.tif", picture, save_all=True, append_images=[Image.fromarray(grey), opacity], compression="tiff_lzw")
    return files


def mutated(*, each: int, seed: int = 20) -> Iterator[tuple[str, bytes]]:
    """Name and content of damaged files.

    Parameters
    ----------
    each : int
        How many files come from one original and one kind of damage.
    seed : int
        Other seeds give other damage.
    """
    for original, data in originals().items():
        mutations = (*GENERAL, *SPECIAL[original.split(".")[-1]])
        for number in range(each * len(mutations)):
            mutate = mutations[number % len(mutations)]
            # From a text, whose hash is the same in every process and version.
            rng = random.Random(f"{seed} {original} {number}")
            yield f"{number:03}-{mutate.__name__}-{original}", mutate(rng, data)


# Bombs: small files that ask for much


@functools.cache
def _deflated_zeros(megabytes: int) -> bytes:
    """Zeros as one block of raw deflate a megabyte, each the same."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes


def _tiff_of_bytes(pixels: bytes, tags: dict[int, tuple[int, int, int]]) -> bytes:
    """Write a little-endian TIFF: its pixels from byte 8 on, then a directory of (type, count, value or place)."""
    entries = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    start = 8 + len(pixels)
    return b"II*\0" + struct.pack("<I", start) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def _tiff_tags(width: int, height: int, compression: int, size: int, bits: int) -> dict[int, tuple[int, int, int]]:
    values = {
        256: width, 257: height, 258: bits, 259: compression, 262: 1, 273: 8, 277: 1, 278: height, 279: size,
    }  # fmt: skip
    return {tag: (4, 1, value) for tag, value in values.items()}


def _webp_canvas(side: int) -> bytes:
    frames = riff_chunks(originals()["frames.webp"])
    return riff([(b"VP8X", b"\x02\0\0\0" + struct.pack("<I", side - 1)[:3] * 2), *frames[1:]])


def _many_scans(number: int) -> bytes:
    data = originals()["progressive.jpg"]
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * number + b"\xff\xd9"


def _patched(data: bytes, place: int, kind: str, value: int) -> bytes:
    result = bytearray(data)
    struct.pack_into(kind, result, place, value)
    return bytes(result)


def bombs() -> Iterator[tuple[str, bytes, str]]:
    """Name and content of files that must be refused, and what the reason is to say."""
    deflated = b"\x78\xda" + _deflated_zeros(1024)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    yield "zeros.png", png([(b"IHDR", header), (b"IDAT", deflated), (b"IEND", b"")]), "3600.0 megapixels"
    plain = png_chunks(originals()["colour.png"])
    for kind in (b"iCCP", b"zTXt"):
        yield f"{kind.decode()}.png", png([plain[0], (kind, b"a\0\0" + deflated), *plain[1:]]), "too large"
    for name, bits in (("deep", 16), ("float", 32)):
        tags = _tiff_tags(64, 64, 8, len(deflated), bits)
        yield f"{name}-zeros.tif", _tiff_of_bytes(deflated, tags), "inflates to more than"
    for kind in (xz_of_zeros(64), xz_of_zeros(64) * 20):
        yield f"xz-{len(kind)}.tif", _tiff_of_bytes(kind, _tiff_tags(64, 64, 34925, len(kind), 16)), "inflates to more"
    pixels = bytes(1 << 20)
    overlapping = _tiff_tags(64, 64, 1, 4096, 8) | {40_000 + i: (4, 200_000, 8) for i in range(4000)}
    yield "tags.tif", _tiff_of_bytes(pixels, overlapping), "its tags claim"
    places = _tiff_tags(64, 64, 1, 4096, 8) | {273: (3, 1 << 23, 8), 279: (3, 1 << 23, 8)}
    yield "places.tif", _tiff_of_bytes(bytes(1 << 25), places), "strips or tiles"
    gif = originals()["frames.gif"]
    frame = gif_frame(gif)
    yield "screen.gif", _patched(_patched(gif, 6, "<H", 65535), 8, "<H", 65535), "4294.8 megapixels"
    disposed = gif[:frame] + b"\x21\xf9\x04\x08\0\0\0\0" + gif[frame:]
    yield "frame.gif", _patched(_patched(disposed, frame + 13, "<H", 65535), frame + 15, "<H", 65535), "pixels"
    yield "canvas.webp", _webp_canvas(16_384), "268.4 megapixels"
    yield "wide-canvas.webp", _webp_canvas(1 << 24), "damaged"
    baseline = originals()["baseline.jpg"]
    start = baseline.index(b"\xff\xc0")
    huge = _patched(_patched(baseline, start + 5, ">H", 65_500), start + 7, ">H", 65_500)
    yield "nothing.jpg", huge, "4290.2 megapixels"
    yield "scans.jpg", _many_scans(30_000), "more than 1000 scans"
    exif = b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)
    yield "exif.jpg", baseline[:2] + exif * 1000 + baseline[2:], "more than 16 MiB of metadata"
    palette = bytes(1024)
    info = struct.pack("<IiiHHIIiiII", 40, 900_000, 1, 1, 8, 1, 0, 0, 0, 256, 256)
    body = info + palette + b"\0\2\xff\xff\0\1"
    yield "runs.bmp", b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 14 + 40 + 1024) + body, "900000 pixels wide"


@functools.cache
def xz_of_zeros(megabytes: int) -> bytes:
    """Zeros, compressed six thousandfold."""
    import lzma

    return lzma.compress(bytes(megabytes << 20), preset=0)


# The program


def main() -> None:
    """Read the files of a folder in every way there is; one line of JSON each says what came of it."""
    import resource
    import warnings

    import numpy as np

    from sparsespec import images

    warnings.simplefilter("error")
    unit = 1 if sys.platform == "darwin" else 1024
    whole = images._WHOLE_TIFF

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def check(pixels: Any, shape: tuple[int, ...]) -> None:
        if pixels.shape != shape or pixels.dtype not in (np.uint8, np.uint16) or pixels.size == 0:
            raise AssertionError(f"an array of {pixels.dtype} of shape {pixels.shape} for {shape}")

    def attempt(path: Path, page: int, most: int) -> str:
        try:
            with images.open_image(path, page=page, max_pixels=most) as source:
                height, width, _ = source.shape
                for top in range(0, min(height, 4000), 1000):
                    bottom, right = min(height, top + 1000), min(width, 1000)
                    check(source.read(top, 0, bottom, right), (bottom - top, right, 3))
            pixels = images.read_image(path, page=page, max_pixels=most)
            check(pixels, (*pixels.shape[:2], 3))
        except images.ImageReadError as error:
            if error.path != str(path) or not error.reason or not error.advice or "\n" in str(error):
                raise AssertionError(f"an error that says too little: {error!r}") from error
            return f"refused: {error.reason}"
        return "read"

    images.read_image(sys.argv[3])  # what is imported on the way isn't to count
    print(json.dumps({"base": peak()}), flush=True)
    for path in sorted(Path(sys.argv[2]).iterdir()):
        began, cpu = time.perf_counter(), time.process_time()
        outcomes = []
        print(json.dumps({"begun": path.name}), flush=True)
        try:
            try:
                pages = images.count_pages(path)
            except images.ImageReadError as error:
                outcomes.append(f"not counted: {error.reason}")
                pages = 1
            for page in range(min(pages, 4)):
                for images._WHOLE_TIFF in (whole, 0):
                    outcomes.append(attempt(path, page, int(sys.argv[4])))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcomes.append(f"escaped: {type(error).__name__}: {error}")
        line = {
            "name": path.name, "outcomes": outcomes, "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - cpu, "peak": peak(),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__" and sys.argv[1:2] == ["read"]:
    main()
