from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sparsespec.cli import main
from sparsespec.evaluation import benchmark
from sparsespec.evaluation.benchmark import check_document, soak
from sparsespec.evaluation.benchmark.jobs import TASKS


def test_slope() -> None:
    assert soak.slope([5.0, 5.0, 5.0], 10) == pytest.approx(0, abs=1e-12)
    assert soak.slope([100.0, 120.0, 140.0, 160.0], 10) == pytest.approx(2)
    assert soak.slope([1.0, 2.0], 10) is None


def test_pictures_have_so_many_different_sizes() -> None:
    photos = [np.arange(200 * 500 * 3, dtype=np.uint8).reshape(200, 500, 3), np.zeros((600, 600, 3), np.uint8)]
    pictures = soak.pictures_of(photos, 300)
    sizes = [picture.shape[:2] for picture in pictures]
    assert len(set(sizes)) == len(sizes) == 300
    assert min(map(min, sizes)) >= 112
    assert max(map(max, sizes)) <= 448
    assert all(picture.dtype == np.uint8 and picture.flags.c_contiguous for picture in pictures)
    # The same ones every time, and more of them begin with other sizes only.
    assert [picture.tobytes() for picture in soak.pictures_of(photos, 300)] == [p.tobytes() for p in pictures]


def test_the_job_runs_so_many_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.full((130, 130, 3), 90, np.uint8))
    monkeypatch.setattr(soak, "_EVERY", 3)
    job = TASKS["soak"](json.dumps([str(tmp_path / "a.npy")]), photographs=12, sizes=3, callers=2, threads=2)
    resident = job.describe(job.run())["resident"]
    if resident:  # where the system says
        assert len(resident) == 4
        assert min(resident) > 10e6


@pytest.mark.slow
def test_the_command() -> None:
    result = CliRunner().invoke(
        main,
        ["bench", "soak", "--photographs", "40", "--sizes", "8", "--threads", "2", "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    section = json.loads(result.stdout)["soak"]
    assert section["command"] == "sparsespec bench soak --threads 2 --photographs 40 --sizes 8"
    rows = section["tables"]["soak"]["rows"]
    assert [row["callers"] for row in rows] == [1, 2]
    assert all(row["status"] == "done" for row in rows)


def test_the_document_has_its_place() -> None:
    check_document(Path(__file__).parents[1] / "docs" / "benchmarks.md", ["soak"])
    # It takes long: nobody gets it without asking.
    assert "soak" not in benchmark.PARTS


@pytest.mark.parametrize("name", ["photographs", "sizes"])
def test_bad_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, not 0"):
        benchmark.Options(**{name: 0})
