from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sparsespec.batch import Formats, Inline, find_inputs, run_batch
from sparsespec.cli import main
from sparsespec.evaluation import benchmark
from sparsespec.evaluation.benchmark import check_document, memory, runs
from sparsespec.evaluation.benchmark.jobs import TASKS


def test_the_spread_is_that_of_pairs() -> None:
    found = runs.spread([1.1, 2.0, 4.2], [1.0, 2.0, 4.0])
    assert found == pytest.approx({"overhead": 0.05, "least": 0.0, "most": 0.1})


def test_files_that_differ_are_named() -> None:
    one = {"a": "1", "b": "2", "c": "3"}
    assert runs.differing(one, {"a": "1", "b": "9", "d": "4"}) == {"b", "c", "d"}
    assert runs.differing(one, dict(one)) == set()


def test_images_are_names_of_few_files(tmp_path: Path) -> None:
    runs.make_images(tmp_path / "in", 1203)
    inputs = find_inputs(tmp_path / "in")
    assert len(inputs.images) == 1203
    assert len({(tmp_path / "in" / path).stat().st_ino for path in inputs.images}) <= 5 or os.name == "nt"


def test_without_links_there_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    runs.make_images(tmp_path / "in", 12)
    inputs = find_inputs(tmp_path / "in")
    assert len({(tmp_path / "in" / path).read_bytes() for path in inputs.images}) == 5
    result = run_batch(runs.Stub(), inputs, tmp_path / "out", engine=Inline(2), formats=Formats(overlays=False))
    assert result.counts == {"images": 12, "done": 12, "instances": 24}


def test_the_stub_fills_what_it_is_given() -> None:
    given = np.zeros((16, 24), np.uint16)
    found = runs.Stub()(np.zeros((16, 24, 3), np.uint8), out=given)
    assert found.labels is given
    assert np.unique(given).tolist() == [0, 1, 2]


def test_made_up_results_end_in_the_files_of_a_run(tmp_path: Path) -> None:
    runs.make_images(tmp_path / "in", 300)
    began = []
    result = run_batch(
        runs.Stub(), find_inputs(tmp_path / "in"), tmp_path / "out", engine=runs.Noted(lambda: began.append(1))
    )
    assert began == [1]
    assert result.counts == {"images": 300, "done": 300, "instances": 600}
    coco = json.loads((tmp_path / "out" / "instances.json").read_bytes())
    assert len(coco["images"]) == 300
    assert len(coco["annotations"]) == 600
    assert not (tmp_path / "out" / "masks").exists()


def test_memory_counts_children() -> None:
    own, together = memory.current_bytes(), runs.process_bytes()
    assert (own is None) == (together is None)
    if own is not None and together is not None:
        assert together > 0.9 * own


@pytest.mark.parametrize("overlays", [False, True])
def test_the_job_of_tiny_images(tmp_path: Path, overlays: bool) -> None:
    runs.make_images(tmp_path / "in", 40)
    job = TASKS["runs tiny"](str(tmp_path / "in"), "inline", 2, overlays)
    found = job.describe(job.run())
    assert len(found["resident"]) == 3
    assert all(found[key] > 0 for key in ("listing", "working", "final"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_job_of_names(tmp_path: Path) -> None:
    runs.make_images(tmp_path / "in", 200)
    job = TASKS["runs noted"](str(tmp_path / "in"))
    steps = job.describe(job.run())["steps"]
    assert [step["step"] for step in steps] == [
        "listing",
        "names and shards",
        "records of the shards",
        "merging, final files",
    ]
    assert all(step["seconds"] > 0 for step in steps)


def test_the_document_has_its_place() -> None:
    check_document(Path(__file__).parents[1] / "docs" / "benchmarks.md", ["runs"])
    # It takes long: nobody gets it without asking.
    assert "runs" not in benchmark.PARTS


def test_bad_number() -> None:
    with pytest.raises(ValueError, match="names must be above 0, not 0"):
        benchmark.Options(names=0)


@pytest.mark.slow
def test_the_command() -> None:
    command = ["bench", "runs", "--quick", "--repeats", "1", "--photographs", "200", "--names", "300", "--threads", "2"]
    result = CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    section = json.loads(result.stdout)["runs"]
    assert section["command"] == ("sparsespec bench runs --quick --repeats 1 --threads 2 --photographs 200 --names 300")
    tables = section["tables"]
    rows = {key: table["rows"] for key, table in tables.items()}
    assert all(row["status"] == "done" for found in rows.values() for row in found)
    assert [row["who"] for row in rows["overhead"]] == ["loop", "run, no overlays", "run, overlays"]
    for row in rows["overhead"]:
        assert row["read"] > 0
        assert row["segment"] > row["write"] > 0
    assert [row["same"] for row in rows["engines"]] == ["yes"] * 3
    assert [row["images"] for row in rows["tiny"]] == [200, 200, 200, 20]
    assert len(rows["noted"]) == 4
