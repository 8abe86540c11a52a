from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from sparsespec._mapped import bands, release


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (100, 3)])
@pytest.mark.parametrize("step", [None, 1, 3, 1000])
def test_bands_cover_every_row_once(shape: tuple[int, int], step: int | None) -> None:
    array = np.arange(shape[0] * shape[1]).reshape(shape)
    parts = list(bands(array, step=step))
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), array)
    assert all(np.shares_memory(part, array) for _, part in parts)
    assert [top for top, _ in parts] == list(range(0, shape[0], step or shape[0]))


@pytest.mark.parametrize("mode", ["r+", "c", "r"])
def test_released_arrays_keep_what_was_written(tmp_path: Path, mode: str) -> None:
    np.arange(5000, dtype=np.uint16).tofile(tmp_path / "a")
    array = np.memmap(tmp_path / "a", np.uint16, mode, shape=(50, 100))
    expected = np.arange(5000, dtype=np.uint16).reshape(50, 100)
    if mode != "r":
        array[10:20] = expected[10:20] = 7
    for view in (array, array[5:30], np.asarray(array)[::2], array.view(np.int16)):
        release(view)
        np.testing.assert_array_equal(array, expected)


def test_other_arrays_are_left_alone() -> None:
    array = np.arange(10)
    release(array)
    release(array[2:5])
    np.testing.assert_array_equal(array, np.arange(10))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says how much is in memory")
def test_released_pages_leave_the_memory(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    array = np.memmap(tmp_path / "a", np.uint16, "w+", shape=(4000, 10_000))
    array[:] = 3
    full = resident()
    release(array[100:200])
    assert full - resident() > 60e6  # of 80 MB
    assert (array[::1000] == 3).all()
