"""``sparsespec bench server``."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from sparsespec.cli import main
from sparsespec.evaluation import benchmark
from sparsespec.evaluation.benchmark import check_document, clients, server
from sparsespec.evaluation.benchmark.server import Load
from tests.server.serving import STUBS, ask, inline_app, photo, served

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def test_photographs_are_of_many_sizes_and_always_the_same() -> None:
    photos = [np.arange(h * w * 3, dtype=np.uint8).reshape(h, w, 3) for h, w in ((40, 60), (50, 30))]
    pictures = server.photographs_of(photos, 6)
    sides = [max(picture.shape[:2]) for picture in pictures]
    assert (sides[0], sides[-1]) == (240, 3000)
    assert sides == sorted(sides)
    ratios = [later / earlier for earlier, later in pairwise(sides)]
    assert max(ratios) / min(ratios) < 1.02
    assert [picture.tobytes() for picture in server.photographs_of(photos, 6)] == [p.tobytes() for p in pictures]


def test_malformed_bodies_are_all_refused() -> None:
    app = inline_app()
    bodies = server.malformed_bodies(photo(300, 200, kind="JPEG"))
    for name, kind, content in bodies:
        answer = ask(app, headers={"Content-Type": kind}, body=content)
        assert 400 <= answer.status < 500, name
        answer.problem()
    assert len({name for name, _, _ in bodies}) == len(bodies) >= 6


def test_figures_of_a_load() -> None:
    # Number of the body, good, status, seconds, work, when, size, stages.
    results = [[k, 1.0, 200, 0.01 * (k + 1), 0.5 if k == 7 else 0.1, 0.1 * k, 10, 5] for k in range(100)]
    results += (
        [[0, 1.0, 429, 0.001, 0.0, 1, 1, 0]] * 3 + [[0, 1.0, 500, 1, 0, 1, 1, 0]] + [[9, 0.0, 415, 1, 0, 1, 1, 0]] * 2
    )
    memory = [(float(k), 1_000_000_000 + (10_000_000 if k < 2 else 0)) for k in range(20)]
    load = Load(20.0, 1.0, results, memory, replaced=1)
    row = server._row("as it is", 32, 2, load, 4.0)
    assert (row["images"], row["ok"], row["refused"], row["lost"], row["malformed"], row["told"]) == (
        104,
        100,
        3,
        1,
        2,
        2,
    )
    assert [row["p50"], row["p95"], row["p99"]] == pytest.approx([0.5, 0.95, 0.99])
    assert row["bound"] == pytest.approx(17 * 0.5)
    assert (row["speed"], row["ratio"], row["share"]) == (5.0, 1.25, 0.05)
    assert row["statuses"] == {"image 200": 100, "image 429": 3, "image 500": 1, "malformed 415": 2}
    memory_row = server._memory_row("as it is", load)
    assert (memory_row["start"], memory_row["end"], memory_row["peak"]) == (1_010_000_000, 1_000_000_000, 1_010_000_000)
    assert memory_row["growth"] == pytest.approx(0, abs=1e-3)
    assert memory_row["replaced"] == 1
    nothing = server._row("as it is", 32, 2, Load(1.0, 0.1, []), None)
    assert (nothing["status"], nothing["p99"], nothing["ratio"]) == ("failed", None, None)
    assert math.isnan(nothing["bound"])


@posix
def test_clients(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(photo())
    (tmp_path / "bad").write_bytes(b"no image")
    bodies = [
        {
            "path": str(tmp_path / name),
            "type": "image/png",
            "accept": "*/*",
            "target": "/segment",
            "good": name == "good",
        }
        for name in ("good", "bad")
    ]
    with served(limits="max_waiting=1") as running:
        running.event("ready")
        task = {"host": "127.0.0.1", "address": "127.0.0.1", "port": running.port, "clients": 6, "seconds": 0.6}
        task |= {"malformed": 0.3, "seed": 1, "bodies": bodies}
        done = subprocess.run(
            [sys.executable, "-P", clients.__file__], input=json.dumps(task), capture_output=True, text=True, check=True
        )
    found = json.loads(done.stdout)
    statuses = {(good, status) for _, good, status, *_ in found["results"]}
    assert {(1.0, 200), (0.0, 415)} <= statuses <= {(1.0, 200), (0.0, 415), (1.0, 429), (0.0, 429)}
    assert found["seconds"] >= 0.6
    served_ = [result for result in found["results"] if result[2] == 200]
    assert all(0 < work <= seconds + 0.02 and stages == 3 for _, _, _, seconds, work, _, _, stages in served_)


def test_part_and_document() -> None:
    check_document(Path(__file__).parents[2] / "docs" / "benchmarks.md", ["server"])
    assert "server" not in benchmark.PARTS
    with pytest.raises(ValueError, match="seconds must be above 0"):
        benchmark.Options(seconds=0)


@pytest.mark.slow
@posix
def test_the_whole_part(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        f"import runpy; Stub = runpy.run_path({str(STUBS)!r})['Stub']\n"
        "from sparsespec.cli import main, serve\n"
        "serve._served = lambda *arguments: {'default': Stub()}\n"
        "main()\n"
    )
    monkeypatch.setattr(server, "_START", [sys.executable, "-P", "-c", code])
    monkeypatch.setattr(server, "_loop", lambda bench, folder: 50.0)
    monkeypatch.setattr(server, "_LONGEST", 300)
    monkeypatch.setattr(server, "_PHOTOGRAPHS", 3)
    monkeypatch.setattr(server, "_EVERY", 0.1)
    monkeypatch.setattr(server, "_LEAST_SECONDS", 0.5)
    result = CliRunner().invoke(
        main, ["bench", "server", "--quick", "--seconds", "1", "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    section: dict[str, Any] = json.loads(result.stdout)["server"]
    assert section["command"] == "sparsespec bench server --quick --seconds 1"
    rows = section["tables"]["server"]["rows"]
    assert [row["queue"] for row in rows] == ["as it is", "a short queue"]
    for row in rows:
        assert row["ok"] > 0
        assert row["lost"] == 0
        assert row["told"] == row["malformed"]
        assert row["p50"] <= row["p99"]
        assert row["ratio"] == row["speed"] / 50
    assert rows[0]["refused"] == 0
    assert rows[1]["refused"] > 0
    assert section["tables"]["memory"]["rows"][0]["replaced"] == 0
