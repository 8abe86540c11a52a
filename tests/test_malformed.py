from __future__ import annotations

import collections
import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparsespec import images
from sparsespec.images import ImageReadError, count_pages, open_image, read_image
from tests import malformed

if sys.platform == "win32":
    pytest.skip("no resource module to ask for the peak of the memory", allow_module_level=True)

MOST_PIXELS = 1_000_000
# Above what the process holds before: twelve bytes for each pixel that may be decoded (Pillow's four, the coefficients
# of a progressive JPEG, the array), the largest file, and what decoders take for themselves.
MOST_MEMORY = 12 * MOST_PIXELS + 50_000_000 + 80_000_000
# A process that takes so long hangs: the slowest file takes well below a second.
PATIENCE = 300


def attempts(folder: Path, files: Iterable[tuple[str, bytes]]) -> dict[str, dict[str, Any]]:
    """Let a process of its own read these files; what it says of each."""
    folder.mkdir()
    names = []
    for name, content in files:
        (folder / name).write_bytes(content)
        names.append(name)
    good = folder.parent / "good.png"
    good.write_bytes(malformed.originals()["colour.png"])
    command = [sys.executable, "-P", malformed.__file__, "read", str(folder), str(good), str(MOST_PIXELS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert (result.returncode, result.stderr) == (0, ""), lines[-1]
    outcomes = {line["name"]: line for line in lines if "name" in line}
    assert sorted(outcomes) == sorted(names)
    base = lines[0]["base"]
    for line in outcomes.values():
        assert not [outcome for outcome in line["outcomes"] if outcome.startswith("escaped")], line
        assert line["peak"] - base < MOST_MEMORY, line
    return outcomes


def test_damaged_files_of_every_kind(tmp_path: Path) -> None:
    files = list(malformed.mutated(each=1))
    assert len(files) > 300
    outcomes = attempts(tmp_path / "files", files)
    kinds = collections.Counter(outcome.split(":")[0] for line in outcomes.values() for outcome in line["outcomes"])
    # Not every flipped bit is noticed; if all or none were read, the files would not be what they should.
    assert kinds["read"] > 100
    assert kinds["refused"] > 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_more_damaged_files(tmp_path: Path, seed: int) -> None:
    attempts(tmp_path / "files", malformed.mutated(each=3, seed=seed))


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    files = list(malformed.bombs())
    outcomes = attempts(tmp_path / "files", [(name, content) for name, content, _ in files])
    for name, _, reason in files:
        assert all(outcome.startswith("refused") and reason in outcome for outcome in outcomes[name]["outcomes"]), (
            reason,
            outcomes[name],
        )


def test_the_originals_are_good(tmp_path: Path) -> None:
    outcomes = attempts(tmp_path / "files", malformed.originals().items())
    assert {outcome for line in outcomes.values() for outcome in line["outcomes"]} == {"read"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (b"\xef\xbb\xbf<HTML>", "a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a drawing"),
        (b"<?xml version='1.0'?><svg/>", "an XML document or a drawing"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
        (b"PK\x03\x04" + bytes(30), "a ZIP archive"),
        (b'{"error": "not found"}', "JSON"),
        (b"\x1f\x8b\x08" + bytes(30), "gzip"),
        (b"\xd7\xcd\xc6\x9a" + bytes(60), "not an image that can be read"),
    ],
)
def test_other_files_say_what_they_are(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    assert count_pages(path) == 1
    with pytest.raises(ImageReadError, match=reason):
        read_image(path)


@pytest.mark.parametrize("work", [read_image, count_pages])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, work: Any) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    paths = [tmp_path / "pipe.jpg", Path(os.devnull)]
    with socket.socket(socket.AF_UNIX) as listener:
        # Paths of sockets have to be short.
        listener.bind(os.path.relpath(tmp_path / "socket.jpg"))
        paths.append(tmp_path / "socket.jpg")
        for path in paths:
            with pytest.raises(ImageReadError, match="not a regular file"):
                work(path)


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    os.mkfifo(path)
    monkeypatch.setattr(images, "_check_file", lambda path: None)
    with pytest.raises(ImageReadError, match="not a regular file"):
        read_image(path)


def test_a_file_that_vanishes_between_look_and_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_check_file", lambda path: None)
    for work in (read_image, count_pages):
        with pytest.raises(ImageReadError, match="there is no such file"):
            work(tmp_path / "gone.jpg")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    pixels = np.random.default_rng(1).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    with tifffile.TiffWriter(path) as file:
        for _ in range(2):
            file.write(pixels, photometric="rgb", tile=(64, 64), compression="zlib")
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 1)
    with open_image(path, page=1) as source:
        np.testing.assert_array_equal(source.read(0, 0, 64, 300), pixels[:64])
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(
            ImageReadError, match=r"page 1 \(counted from 0\): it is damaged or cut short near row"
        ) as e:
            source.read(0, 0, 400, 300)
        assert e.value.path == str(path)
        np.testing.assert_array_equal(source.read(0, 0, 64, 64), pixels[:64, :64])
    with pytest.raises(ValueError, match="is closed"):
        source.read(0, 0, 64, 64)


def test_a_disk_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((400, 300, 3), np.uint8), photometric="rgb", rowsperstrip=8, compression="zlib")
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 1)
    with open_image(path) as source:

        def fail(*_: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("sparsespec._tiff.TiffPieces.parts", fail)
        with pytest.raises(ImageReadError, match="Input/output error; check the file and the disk"):
            source.read(0, 0, 400, 300)


def test_threads_share_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    noise = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    tifffile.imwrite(path, noise, photometric="rgb", tile=(64, 64), compression="zlib")
    path.write_bytes(malformed.blank_range(malformed.random.Random(3), path.read_bytes()))
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 1)
    monkeypatch.setattr(images, "available_cpus", lambda: 4)
    outcomes: list[str] = []
    with open_image(path) as source:

        def read() -> None:
            for top in range(0, 512, 64):
                try:
                    np.testing.assert_array_equal(source.read(top, 0, top + 64, 512), noise[top : top + 64])
                    outcomes.append("read")
                except ImageReadError:
                    outcomes.append("refused")

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert collections.Counter(outcomes) == {"read": 28, "refused": 4}


def test_errors_leave_the_process_as_it_was(tmp_path: Path) -> None:
    before, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    for number, (_, content) in enumerate(malformed.mutated(each=1)):
        if number % 20 == 0:
            (tmp_path / "a").write_bytes(content or b"\0")
            try:
                read_image(tmp_path / "a")
            except ImageReadError:
                continue
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == (before, limit)
