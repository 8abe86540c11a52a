from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import sparsespec.cli
from sparsespec import affinity, spectral
from sparsespec.batch.one import EIGENVECTORS
from sparsespec.evaluation import benchmark
from sparsespec.evaluation.benchmark import (
    bench,
    data,
    gallery,
    image,
    jobs,
    kernels,
    machine,
    memory,
    naive,
    ours,
    peers,
    report_page,
    seams,
    solver,
    worker,
)
from sparsespec.evaluation.benchmark.measure import Contender, Outcome, Workers
from sparsespec.evaluation.benchmark.report import (
    Column,
    Section,
    Table,
    check_document,
    contest,
    growth_exponent,
    ratio,
    update_document,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
RNG = np.random.default_rng


def done(seconds: float, **result: Any) -> Outcome:
    return Outcome("done", seconds, result, [(seconds, result)])


# Tables


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        ("text", "path", "path"),
        ("count", 1048576, "1,048,576"),
        ("seconds", 0.04693, "46.9 ms"),
        ("seconds", 0.000512, "0.512 ms"),
        ("seconds", 2.5, "2.5 s"),
        ("seconds", 1234.5, "1,230 s"),
        ("percent", 0.9712, "97.1 %"),
        ("number", 61.04, "61"),
        ("number", 0.987654, "0.988"),
        ("residual", 3.21e-6, "3.2e-06"),
        ("megabytes", 1_234_567_890, "1,235 MB"),
        ("ratio", 39.6, "40 x"),
        ("ratio", 0.512, "0.51 x"),
        ("ratio", 1234, "1,200 x"),
        ("number", None, "-"),
    ],
)
def test_values_are_written(kind: str, value: Any, shown: str) -> None:
    assert Column("key", "caption", kind).show({"key": value}) == shown


def test_a_lower_bound_is_written_as_one() -> None:
    assert Column("ratio", "", "ratio").show({"ratio": 5.0, "ratio_at_least": True}) == "> 5 x"


@pytest.fixture
def table() -> Table:
    rows = contest(
        {"tokens": 900}, done(0.5), [("a|b", done(2.0)), ("gone", Outcome("missing", remark="not installed"))]
    )
    columns = (
        Column("tokens", "tokens", "count"),
        Column("who", "who"),
        Column("seconds", "time", "seconds"),
        Column("ratio", "peer / ours", "ratio"),
        Column("remark", "remark"),
    )
    return Table("exact", "Exact", columns, rows, ["A note."])


def test_text(table: Table) -> None:
    assert table.to_text().splitlines() == [
        "Exact",
        "-----",
        "tokens  who          time  peer / ours  remark",
        "   900  sparsespec  0.5 s            -",
        "   900  a|b           2 s          4 x",
        "   900  gone            -            -  not installed",
        "A note.",
    ]


def test_markdown(table: Table) -> None:
    assert table.to_markdown().splitlines() == [
        "### Exact",
        "",
        "| tokens | who | time | peer / ours | remark |",
        "|---:|---|---:|---:|---|",
        "| 900 | sparsespec | 0.5 s | - |  |",
        "| 900 | a\\|b | 2 s | 4 x |  |",
        "| 900 | gone | - | - | not installed |",
        "",
        "- A note.",
    ]


def test_json_holds_what_was_measured(table: Table) -> None:
    section = Section("kernels", machine.describe(2), "sparsespec bench kernels", [table])
    plain = json.loads(json.dumps(section.to_dict(), allow_nan=False))
    assert plain["machine"]["threads"] == 2
    assert plain["machine"]["versions"]["numpy"] == np.__version__
    rows = plain["tables"]["exact"]["rows"]
    assert [row["seconds"] for row in rows] == [0.5, 2.0, None]
    assert [row["ratio"] for row in rows] == [None, 4.0, None]
    assert [row["status"] for row in rows] == ["done", "done", "missing"]
    assert [row["ours"] for row in rows] == [True, False, False]


@pytest.mark.parametrize(
    ("own", "peer", "expected"),
    [
        (done(0.5), done(2.0), (4.0, False)),
        (done(2.0), done(0.5), (0.25, False)),
        (done(0.5), Outcome("out of time", 60.0), (120.0, True)),
        # Stopped before ours would have ended: it says nothing.
        (done(90.0), Outcome("out of time", 60.0), (None, False)),
        (done(0.5), Outcome("not reached", 0.1), (None, False)),
        (done(0.5), Outcome("failed"), (None, False)),
        (done(0.5), Outcome("missing"), (None, False)),
        (Outcome("failed"), done(0.5), (None, False)),
        (Outcome("not reached", 0.1), done(0.5), (None, False)),
    ],
)
def test_ratio(own: Outcome, peer: Outcome, expected: tuple[float | None, bool]) -> None:
    assert ratio(own, peer) == expected


def test_a_limit_is_not_shown_as_a_time() -> None:
    row = contest({}, done(1.0), [("slow", Outcome("out of time", 60.0, remark="stopped after 60 s"))])[1]
    assert row["seconds"] is None
    assert (row["ratio"], row["ratio_at_least"]) == (60.0, True)


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match=r"status must be one of done, .*, not 'fine'"):
        Outcome("fine")


def test_growth_exponent() -> None:
    assert growth_exponent([10, 100, 1000], [0.2, 2.0, 20.0]) == pytest.approx(1.0)
    assert growth_exponent([10, 20], [1.0, 4.0]) == pytest.approx(2.0)
    assert growth_exponent([10], [1.0]) is None


def test_own_failures_are_told_apart_from_those_of_peers(table: Table) -> None:
    section = Section("kernels", machine.describe(1), "", [table])
    assert section.own_failures == []
    table.rows += contest({}, Outcome("failed", remark="MemoryError"), [("peer", Outcome("failed"))])
    assert section.own_failures == ["kernels, Exact: MemoryError"]


# The document

PAGE = """# Title

<!-- begin kernels -->
old
<!-- end kernels -->

Text \\1 stays.
<!-- begin solver -->
<!-- end solver -->
"""


def test_tables_go_between_their_markers(table: Table, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    section = Section("kernels", machine.describe(2), "sparsespec bench kernels", [table])
    for _ in range(2):  # the second time replaces the first
        update_document(page, [section])
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.count("### Exact") == 1
    assert section.to_markdown() in text
    assert text.startswith("# Title\n\n<!-- begin kernels -->\n\nMeasured by `sparsespec bench kernels` on ")
    assert text.endswith(PAGE.partition("<!-- end kernels -->")[2])
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize("page", ["", "<!-- begin kernels -->\n", "<!-- end kernels -->\n<!-- begin kernels -->\n"])
def test_a_document_without_markers_is_left_alone(page: str, table: Table, tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(page, encoding="utf-8")
    with pytest.raises(ValueError, match="'<!-- begin kernels -->' and '<!-- end kernels -->' once"):
        update_document(file, [Section("kernels", machine.describe(1), "", [table])])
    assert file.read_text(encoding="utf-8") == page


def test_the_page_of_this_project_can_be_updated() -> None:
    check_document(DOCS / "benchmarks.md", benchmark.PARTS)


# Processes


@pytest.fixture
def features(tmp_path: Path) -> str:
    path = tmp_path / "features.npy"
    np.save(path, RNG(0).standard_normal((100, 8), dtype=np.float32))
    return str(path)


def ask(*questions: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(question) + "\n" for question in questions)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_worker_prepares_runs_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(jobs.TASKS, "add", lambda a, b: jobs.Job(lambda: a + b, lambda found: {"sum": found}))
    prepared, ran, again, forgot, nothing = ask(
        {"do": "prepare", "task": "add", "inputs": {"a": 1, "b": 2}},
        {"do": "run"},
        {"do": "run"},
        {"do": "forget"},
        {"do": "run"},
    )
    assert prepared == forgot == {}
    assert ran["result"] == again["result"] == {"sum": 3}
    assert ran["seconds"] >= 0
    assert nothing["error"] == "RuntimeError: nothing is prepared"


def test_a_worker_survives_a_task_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError("no room\nfor this")

    monkeypatch.setitem(jobs.TASKS, "fail", lambda: jobs.Job(fail, dict))
    _, ran, unknown = ask(
        {"do": "prepare", "task": "fail", "inputs": {}},
        {"do": "run"},
        {"do": "prepare", "task": "no such", "inputs": {}},
    )
    assert ran == {"error": "MemoryError: no room for this"}
    assert unknown["error"].startswith("KeyError")


@pytest.mark.slow
def test_a_race_in_processes(features: str) -> None:
    inputs = {"features": features, "n_neighbors": 5}
    with Workers(threads=1) as workers:
        found = workers.race(
            {
                "ours": Contender("exact", inputs, "ours"),
                "scipy": Contender("scipy exact", inputs, "scipy"),
                "broken": Contender("exact", {**inputs, "features": "nowhere.npy"}, "broken"),
            },
            repeats=3,
            limit=60.0,
        )
        stopped = workers.race({"ours": Contender("exact", inputs, "ours")}, repeats=3, limit=1e-6)["ours"]
        after = workers.race({"ours": Contender("exact", inputs, "ours")}, repeats=1, limit=60.0)["ours"]
    assert [found["ours"].status, found["scipy"].status] == ["done", "done"]
    assert [len(found[name].runs) for name in ("ours", "scipy")] == [3, 3]
    assert found["ours"].seconds == min(seconds for seconds, _ in found["ours"].runs)
    assert found["ours"].result["edges"] >= 500
    if sys.platform == "linux":
        assert found["ours"].peak_bytes >= found["ours"].base_bytes > 1e7
    assert found["broken"].status == "failed"
    assert "nowhere.npy" in found["broken"].remark
    # The next takes a new process.
    assert (stopped.status, stopped.seconds, after.status) == ("out of time", 1e-6, "done")


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mute = tmp_path / "python"
    mute.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    mute.chmod(0o755)
    if sys.platform == "win32":
        pytest.skip("no shell scripts there")
    monkeypatch.setattr(sys, "executable", str(mute))
    with Workers(threads=1) as workers:
        found = workers.race({"a": Contender("exact", {}, "a")}, repeats=1, limit=10.0)["a"]
    assert found.status == "failed"
    assert "its process ended (code 3): out of luck" in found.remark


def test_contenders_of_a_race_do_not_share_a_process() -> None:
    same = Contender("exact", {}, "a")
    with Workers(threads=1) as workers, pytest.raises(ValueError, match="must be of different families"):
        workers.race({"x": same, "y": same}, repeats=1, limit=1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_peak_of_memory() -> None:
    memory.reset_peak()
    before = memory.current_bytes()
    block = np.ones(50_000_000 // 8)
    del block
    peak = memory.peak_bytes()
    assert before is not None
    assert peak is not None
    assert peak - before > 40e6


# Peers


def reference_neighbours(array: np.ndarray, k: int) -> list[list[int]]:
    """Nearest by BoC, of equal ones the lowest index; none of affinity 0."""
    found = []
    for i, u in enumerate(array.astype(np.float64)):
        difference = np.abs(u - array)
        total = np.abs(u + array).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            boc = (1 + difference.max(axis=1)) / (1 + difference.sum(axis=1) / total)
        boc = np.where(total == 0, 0.0, boc)
        boc[i] = 0.0
        order = np.argsort(-boc.round(5), kind="stable")[:k]
        found.append([int(j) for j in order if boc[j] > 0])
    return found


def degenerate() -> np.ndarray:
    array = RNG(3).integers(-2, 3, (60, 5)).astype(np.float32)
    array[10:14] = 0
    array[20] = -array[21]
    array[30:33] = array[29]
    return array


@pytest.mark.parametrize("array", [RNG(1).standard_normal((70, 6), dtype=np.float32), degenerate()])
def test_two_loops_find_the_nearest(array: np.ndarray) -> None:
    tokens = np.arange(len(array))
    neighbours, weights = np.full((len(array), 7), -1, np.int32), np.zeros((len(array), 7), np.float32)
    naive.nearest_of_all(array, tokens, neighbours, weights)
    expected = reference_neighbours(array, 7)
    assert [[j for j in row if j >= 0] for row in neighbours.tolist()] == expected
    assert ((weights > 0) == (neighbours >= 0)).all()
    # Two loops that look at the whole grid are two loops over all.
    windowed, others = np.full((len(array), 7), -1, np.int32), np.zeros((len(array), 7), np.float32)
    naive.nearest_of_window(array, 10, len(array), windowed, others)
    assert (windowed == neighbours).all()
    assert others.tobytes() == weights.tobytes()


def test_two_loops_stay_within_the_window() -> None:
    array = RNG(2).standard_normal((30, 4), dtype=np.float32)
    neighbours, weights = np.full((30, 8), -1, np.int32), np.zeros((30, 8), np.float32)
    naive.nearest_of_window(array, 6, 1, neighbours, weights)
    graph = affinity.boc_knn_graph(array, 8, grid=(5, 6), radius=1)
    for i, row in enumerate(neighbours):
        assert sorted(j for j in row if j >= 0) == graph.indices[graph.indptr[i] : graph.indptr[i + 1]].tolist()


def test_scipy_finds_the_nearest(features: str) -> None:
    neighbours, _ = jobs.TASKS["scipy exact"](features, 5).run()
    assert [sorted(row) for row in neighbours.tolist()] == [
        sorted(row) for row in reference_neighbours(np.load(features), 5)
    ]


@pytest.fixture
def graph(tmp_path: Path) -> dict[str, str]:
    array = RNG(4).standard_normal((144, 8), dtype=np.float32)
    return jobs.save_graph(affinity.boc_knn_graph(array, 8, grid=(12, 12), radius=1), tmp_path, "graph")


@pytest.mark.parametrize(
    ("name", "needs"),
    [("shift-invert", ""), ("arpack", ""), ("sklearn amg", "scikit-learn"), ("sklearn arpack", "scikit-learn")],
)
@pytest.mark.filterwarnings("ignore")  # what peers warn of is theirs
def test_eigenpairs_of_peers_are_ours(graph: dict[str, str], name: str, needs: str) -> None:
    if peers.missing(needs):
        pytest.skip(f"{needs} is not installed")
    job = jobs.TASKS[name](**graph, k=4, tol=1e-6)
    found = job.describe(job.run())
    own = jobs.TASKS["eigenpairs"](**graph, k=4, tol=1e-6, solver="auto")
    assert found["residual"] < 1e-4
    np.testing.assert_allclose(found["values"], own.describe(own.run())["values"], atol=1e-6)


def test_residuals_are_those_of_the_best_pairs_in_the_span() -> None:
    affine, values = gallery.path(50)
    matrix = spectral.laplacian(affine)
    vectors = np.linalg.eigh(matrix.toarray())[1][:, :3]
    mixed = vectors @ RNG(0).standard_normal((3, 3))
    largest, residuals, found = jobs.residual_of(matrix, mixed)
    assert largest == residuals.max() < 1e-12
    np.testing.assert_allclose(found, values[:3], atol=1e-12)
    assert jobs.residual_of(matrix, mixed + 0.1 * np.eye(50)[:, :3])[0] > 1e-2


@pytest.mark.parametrize("name", list(gallery.GRAPHS))
def test_gallery_has_the_spectrum_it_claims(name: str) -> None:
    matrix, values = gallery.GRAPHS[name](150)
    assert matrix.shape[0] == len(values) > 100
    assert (matrix != matrix.T).nnz == 0
    assert not matrix.diagonal().any()
    np.testing.assert_allclose(np.linalg.eigvalsh(spectral.laplacian(matrix).toarray()), values, atol=1e-12)


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.NEEDS, "scikit-learn", ("no_such_module_anywhere",))
    assert peers.missing("scikit-learn") == "not installed: pip install 'sparsespec[peers]'"
    assert peers.missing("") is None


def test_the_extra_names_every_peer() -> None:
    setup = (DOCS.parent / "setup.cfg").read_text(encoding="utf-8")
    block = setup.partition("\npeers =\n")[2].partition("\n#")[0]
    named = {re.split("[<>=]", line.strip())[0] for line in block.splitlines() if line.strip()}
    assert named == {*peers.NEEDS}


# Photographs and features


def test_shipped_photographs_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    photos = data.photographs()
    assert {"astronaut.png", "chelsea.png", "coffee.png"} <= set(photos)
    assert all(photo.dtype == np.uint8 and photo.shape[2] == 3 for photo in photos.values())


def test_photographs_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for index in range(20):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(tmp_path / "b" / f"{index:02}.png")
    (tmp_path / "notes.txt").write_text("no photograph")
    found = data.photographs(tmp_path)
    assert len(found) == data.MOST_PHOTOGRAPHS
    assert next(iter(found)) == "b/00.png"
    assert found["b/00.png"].shape == (6, 8, 3)


def test_folders_without_photographs(tmp_path: Path) -> None:
    with pytest.raises(data.InputError, match="is not a folder"):
        data.photographs(tmp_path / "nowhere")
    with pytest.raises(data.InputError, match="holds no photograph"):
        data.photographs(tmp_path)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(data.InputError, match=r"a\.png"):
        data.photographs(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [(3600, (60, 60)), (30_502, (151, 202)), (65_536, (256, 256)), (1_048_576, (1024, 1024)), (97, (9, 10))],
)
def test_grid_of(tokens: int, grid: tuple[int, int]) -> None:
    assert data.grid_of(tokens) == grid


class FakeBackbone:
    """Features that are the colours of a token's pixels, on many channels."""

    name, patch_size = "fake", 2

    def __init__(self) -> None:
        self.calls = 0

    def features(self, picture: np.ndarray, *, long_side: int) -> Any:
        self.calls += 1
        assert picture.shape == (long_side, long_side, 3)
        side = long_side // self.patch_size
        tokens = picture.reshape(side, 2, side, 2, 3).mean(axis=(1, 3)).reshape(-1, 3)
        mixing = RNG(0).standard_normal((3, 180)).astype(np.float32)
        return SimpleNamespace(keys=np.tanh(tokens @ mixing))


@pytest.fixture
def photos() -> list[np.ndarray]:
    return [RNG(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8) for seed in range(3)]


def test_small_mosaics_are_parts_of_large_ones(photos: list[np.ndarray], tmp_path: Path) -> None:
    backbone = FakeBackbone()
    mosaic = data.FeatureMosaic(photos, tmp_path, backbone)
    small = mosaic.features((20, 30))
    calls = backbone.calls
    large = mosaic.features((96, 70))
    assert small.shape == (600, 60)
    assert small.dtype == large.dtype == np.float32
    assert (large.reshape(96, 70, 60)[:20, :30].reshape(600, 60) == small).all()
    assert len(np.unique(large, axis=0)) == len(large)
    assert backbone.calls == calls + 8
    # Another mosaic of the same photographs finds them in the folder; one of others doesn't.
    again = data.FeatureMosaic(photos, tmp_path, FakeBackbone())
    assert (again.features((96, 70)) == large).all()
    assert not (data.FeatureMosaic(photos[:2], tmp_path, FakeBackbone()).features((20, 30)) == small).all()


def test_mosaics_are_continued_by_their_mirror_image(
    photos: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MOST_REAL_TOKENS", 32 * 32)
    found = data.FeatureMosaic(photos, tmp_path, FakeBackbone()).features((40, 70)).reshape(40, 70, -1)
    assert (found[:, 32:64] == found[:, 31::-1]).all()
    assert (found[32:] == found[31:23:-1]).all()


def test_photo_mosaic(photos: list[np.ndarray]) -> None:
    picture = data.photo_mosaic(photos, 0.12)
    assert picture.dtype == np.uint8
    assert picture.shape[0] * picture.shape[1] == pytest.approx(120_000, rel=0.01)
    assert data.long_side(photos[0], 60).shape == (45, 60, 3)


def test_recall() -> None:
    array = RNG(5).standard_normal((40, 6), dtype=np.float32)
    tokens = np.array([3, 17])
    nearest = [reference_neighbours(array, 4)[i] for i in tokens]
    last = np.array([affinity.boc_edges(array, [i], [row[-1]])[0] for i, row in zip(tokens, nearest, strict=True)])

    def measured(*found: list[int]) -> float:
        return kernels.recall(found, tokens, last, array, 4)

    far = [j for j in range(40) if j not in nearest[0]]
    assert measured(*nearest) == 1.0
    assert measured(nearest[0], []) == 0.5
    # The token itself, repetitions and empty places are no neighbours, further ones no hits.
    assert measured([3, nearest[0][0], nearest[0][0], -1], nearest[1]) == pytest.approx((1 + 4) / 8)
    assert measured([*nearest[0][:3], *[j for j in far if j != 3][:2]], nearest[1]) == pytest.approx((3 + 4) / 8)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[0, 1], [2, 2]], [[0, 1], [2, 2]], 1.0),
        ([[0, 1], [2, 2]], [[0, 2], [1, 1]], 1.0),
        ([[0, 0], [1, 1]], [[0, 0], [1, 2]], 0.75),
        ([[0, 0], [1, 1]], [[0, 0], [0, 0]], 0.5),
        ([[1, 1], [1, 1]], [[0, 0], [0, 0]], 0.0),
        # Matched so that most pixels agree, not greedily.
        ([[1, 1, 1, 1, 1, 2, 2, 2, 2]], [[1, 1, 1, 2, 2, 1, 1, 1, 1]], 6 / 9),
    ],
)
def test_agreement(first: list[list[int]], second: list[list[int]], expected: float) -> None:
    assert seams.agreement(np.array(first), np.array(second)) == pytest.approx(expected)


def test_agreement_needs_one_shape() -> None:
    assert seams.agreement(np.zeros((0, 3), int), np.zeros((0, 3), int)) == 1.0
    with pytest.raises(ValueError, match="of one shape"):
        seams.agreement(np.zeros((2, 3), int), np.zeros((3, 2), int))


def test_share_of_the_features() -> None:
    runs = [
        (0.0, {"stages": {"features": 0.2, "refine": 0.04, "total": 0.26}}),
        (0.0, {"stages": {"features": 0.3, "refine": 0.02, "total": 0.35}}),
    ]
    figures = image.stages_of(Outcome("done", 0.1, {}, runs))
    assert figures == pytest.approx({"features": 0.2, "refine": 0.02, "after": 0.05, "share": 0.25})


# Whole parts, tiny


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run every contender here, once, on made-up features, with no peer beyond SciPy; the list says what ran."""
    ran: list[str] = []

    def race(self: Workers, contenders: Mapping[str, Contender], **options: Any) -> dict[str, Outcome]:
        assert options["repeats"] >= 1
        assert options["limit"] > 0
        outcomes = {}
        for name, contender in contenders.items():
            ran.append(contender.task)
            plain = json.loads(json.dumps(contender.inputs))  # as the processes get them
            job = jobs.TASKS[contender.task](**plain)
            found = json.loads(json.dumps(job.describe(job.run()), allow_nan=False))
            outcomes[name] = Outcome("done", 0.5, found, [(0.5, found)], peak_bytes=2000, base_bytes=1000)
        return outcomes

    def features(self: object, grid: tuple[int, int]) -> np.ndarray:
        smooth = np.cumsum(RNG(0).standard_normal((grid[0] * grid[1], 12), dtype=np.float32), axis=0)
        return smooth / np.linalg.norm(smooth, axis=1, keepdims=True)

    monkeypatch.setattr(Workers, "race", race)
    monkeypatch.setattr(data.FeatureMosaic, "features", features)
    for peer in peers.NEEDS:
        monkeypatch.setitem(peers.NEEDS, peer, ("no_such_module_anywhere",))
    return ran


def options(**more: Any) -> benchmark.Options:
    return benchmark.Options(quick=True, tokens=(144,), megapixels=(0.01,), **more)


def rows_of(section: Section, key: str) -> list[dict[str, Any]]:
    return section.to_dict()["tables"][key]["rows"]


def test_kernels(in_process: list[str]) -> None:
    (section,) = benchmark.run(("kernels",), options())
    assert [table.key for table in section.tables] == ["exact", "windowed", "approximate"]
    assert [row["who"] for row in rows_of(section, "exact")] == ["sparsespec", "SciPy cdist", "two loops"]
    assert rows_of(section, "exact")[1]["ratio"] == 1.0
    assert rows_of(section, "exact")[0]["pairs_per_second"] == pytest.approx(144 * 143 / 0.5 / 1e9)
    window = rows_of(section, "windowed")[0]
    assert window["edges"] == 2 * len(affinity.grid_edges((12, 12))[0])
    assert window["pairs_per_second"] == pytest.approx(window["edges"] / 0.5 / 1e6)
    assert window["graph_bytes"] == window["edges"] * 12 + 145 * 4
    own, peer = rows_of(section, "approximate")
    assert own["status"] == "done"
    assert (peer["status"], peer["remark"]) == ("missing", "not installed: pip install 'sparsespec[peers]'")
    assert "pynndescent" not in in_process
    assert section.own_failures == []


def test_expected_times_beyond_the_limit_are_not_waited_for(in_process: list[str]) -> None:
    (section,) = benchmark.run(("kernels",), benchmark.Options(quick=True, tokens=(100, 1024), limit=20))
    rows = rows_of(section, "exact")
    assert [row["status"] for row in rows] == ["done", "done", "done", "done", "not run", "not run"]
    assert rows[4]["remark"] == "about 52 s expected from 100 tokens"


def test_solver(in_process: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    (section,) = benchmark.run(("solver",), options(), say=said.append)
    assert [table.key for table in section.tables] == ["windowed", "known spectra", "policy"]
    rows = {row["who"]: row for row in rows_of(section, "windowed") if row["graph"] == "BoC"}
    assert next(iter(rows)) == "sparsespec"
    for name in ("sparsespec", "SciPy shift-invert", "ARPACK on 2I - L"):
        assert rows[name]["status"] == "done"
        assert rows[name]["residual"] <= solver.RESIDUAL
    for name in ("scikit-learn amg", "scikit-learn arpack", "ncut-pytorch"):
        assert rows[name]["status"] == "missing"
        assert rows[name]["ratio"] is None
        assert "pip install" in rows[name]["remark"]
    assert rows["sparsespec"]["peak_bytes"] == 2000
    known = [row for row in rows_of(section, "known spectra") if row["who"] == "sparsespec"]
    assert [row["graph"] for row in known] == list(gallery.GRAPHS)
    assert all(row["error"] < 1e-8 for row in known)
    auto, *others = rows_of(section, "policy")
    assert (auto["who"], auto["ours"]) == ("auto", True)
    assert [row["who"] for row in others] == ["dense", "arpack", "amg-lobpcg"]
    assert all(row["solver"] == row["who"] for row in others)
    assert "solver: path" in said


def test_who_misses_a_smaller_eigenvalue_has_not_done_it() -> None:
    own, peer = done(1.0, values=[0.0, 0.5, 0.9]), done(1.0, values=[0.0, 0.1, 0.5])
    solver._compare_values(own, [peer, Outcome("missing")])
    assert (own.status, own.remark) == ("not reached", "not the smallest pairs")
    assert peer.status == "done"


def test_a_residual_too_large_is_said() -> None:
    outcome = done(0.1, residual=3e-3)
    solver._judge(outcome)
    assert outcome.status == "not reached"
    assert outcome.result["residual"] == 3e-3


class FakeSegmenter:
    """Everything bright is one object."""

    def __init__(self, method: str = "sparse", **others: Any) -> None:
        self._after = 0.05 if method == "sparse" else 0.5

    def __call__(self, picture: Any) -> Any:
        bright = np.asarray(picture).max(axis=2) > 127
        seconds = {"features": 0.2, "refine": self._after, "total": 0.2 + self._after}
        info = {"seconds": seconds, "tokens": 4, "tiles": 1, "crops": 2}
        return SimpleNamespace(labels=bright.astype(np.int32), scores=np.ones(1), info=info)


def test_image(in_process: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ours, "_segmenter", lambda max_tokens=None, **others: FakeSegmenter(**others))
    Image.fromarray(RNG(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (section,) = benchmark.run(("image",), options(images=tmp_path, large=tmp_path / "a.png"))
    assert [table.key for table in section.tables] == ["stages", "large", "memory", "seams"]
    (row,) = rows_of(section, "stages")
    assert (row["image"], row["tokens"], row["instances"]) == ("a.png", 4, 1)
    assert row["share"] == pytest.approx(0.25)
    assert row["ratio"] == pytest.approx(10)
    (large,) = rows_of(section, "large")
    assert (large["megapixels"], large["network"]) == (0.0024, "default")
    assert rows_of(section, "memory")[0]["peak_bytes"] == 2000
    assert rows_of(section, "seams")[0]["agreement"] == 1.0
    text = section.to_text()
    assert re.search(r"a\.png +4 +1 +2 +0\.2 s +50 ms +50 ms +25\.0 %", text)
    assert section.own_failures == []


@pytest.mark.slow
def test_one_photograph_for_real(tmp_path: Path) -> None:
    picture = tmp_path / "picture.npy"
    np.save(picture, data.long_side(data.photographs()["coffee.png"], 320))
    for method, count in (("sparse", None), ("paper", 2)):
        job = jobs.TASKS["segment"](str(picture), method, count)
        found = job.describe(job.run())
        assert found["tokens"] > 300
        assert found["stages"]["total"] >= found["stages"]["features"] > 0
    Image.fromarray(np.load(picture)).save(tmp_path / "picture.tif")
    job = jobs.TASKS["segment file"](str(tmp_path / "picture.tif"))
    assert job.describe(job.run())["tokens"] > 300
    job = jobs.TASKS["segment"](str(picture), long_side=160)
    assert job.describe(job.run())["tokens"] < 150
    job = jobs.TASKS["seams"](str(picture), 320, 1 << 12)
    assert job.describe(job.run())["agreement"] == 1.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_optional_peers_for_real(graph: dict[str, str], tmp_path: Path) -> None:
    array = RNG(6).standard_normal((600, 8), dtype=np.float32)
    np.save(tmp_path / "array.npy", array)
    np.save(tmp_path / "tokens.npy", np.arange(0, 600, 40))
    if peers.missing("pynndescent") is None:
        job = jobs.TASKS["pynndescent"](
            str(tmp_path / "array.npy"), 5, str(tmp_path / "tokens.npy"), {"n_neighbors": 21}
        )
        found = job.describe(job.run())["neighbours"]
        exact = reference_neighbours(array, 5)
        hits = [len(set(row) & set(exact[i])) for row, i in zip(found, range(0, 600, 40), strict=True)]
        assert np.mean(hits) > 4.5
    if peers.missing("ncut-pytorch") is None:
        np.save(tmp_path / "small.npy", array[:144])
        job = jobs.TASKS["ncut-pytorch"](**graph, k=3, features=str(tmp_path / "small.npy"))
        assert 0 < job.describe(job.run())["residual"] < 2
    if peers.missing("pynndescent") and peers.missing("ncut-pytorch"):
        pytest.skip("no optional peer is installed")


def test_unknown_part() -> None:
    parts = "kernels, solver, image, backbone, runs, killing, scheduler, server, soak, report, gpu"
    with pytest.raises(ValueError, match=f"parts must be of {parts}, not 'speed'"):
        benchmark.run(("speed",))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": (10,)}, "tokens must be numbers of at least 64"),
        ({"megapixels": (-1.0,)}, "megapixels must be above 0"),
        ({"repeats": 0}, "repeats must be above 0, not 0"),
        ({"limit": -1.0}, "limit must be above 0"),
        ({"threads": 0}, "threads must be above 0"),
    ],
)
def test_options_are_checked(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        benchmark.Options(**wrong)


# The command


@pytest.fixture
def invoke() -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(
            sparsespec.cli.main, ["bench", *map(str, arguments)], catch_exceptions=False, prog_name="sparsespec"
        )
        assert "Traceback" not in result.output
        return result

    return call


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, table: Table) -> list[dict[str, Any]]:
    """Measure nothing; the list says what would have been."""
    asked: list[dict[str, Any]] = []

    def run(parts: Any, options: Any, *, say: Callable[[str], None], command: str) -> list[Section]:
        asked.append({"parts": tuple(parts), "options": options, "command": command})
        say("measuring")
        return [Section(part, machine.describe(2), command, [table]) for part in parts]

    monkeypatch.setattr(benchmark, "run", run)
    return asked


def test_all_parts_by_default(invoke: Callable[..., Result], measured: list[dict[str, Any]]) -> None:
    result = invoke("--quick")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert measured[0]["parts"] == ("kernels", "solver", "image", "backbone")
    assert measured[0]["options"] == benchmark.Options(quick=True)
    assert result.output.count("peer / ours") == 4


def test_options_arrive(invoke: Callable[..., Result], measured: list[dict[str, Any]], tmp_path: Path) -> None:
    more = ("--tokens", "4096,65_536", "--repeats", 3, "--limit", 9.5, "--threads", 1, "--megapixels", "12,0.5")
    assert invoke("solver", *more, "--images", tmp_path, "--cache", tmp_path / "c").exit_code == 0
    assert measured[0]["parts"] == ("solver",)
    assert measured[0]["options"] == benchmark.Options(
        tokens=(4096, 65536),
        megapixels=(12.0, 0.5),
        repeats=3,
        limit=9.5,
        threads=1,
        images=tmp_path,
        cache=tmp_path / "c",
    )
    # Enough to run it again, without the folders of this machine.
    assert measured[0]["command"] == (
        "sparsespec bench solver --tokens 4096,65536 --megapixels 12,0.5 --repeats 3 --limit 9.5 --threads 1"
        f" --images {tmp_path.name}"
    )


def test_json(invoke: Callable[..., Result], measured: list[dict[str, Any]]) -> None:
    plain = json.loads(invoke("kernels", "--json").output)
    assert list(plain) == ["kernels"]
    assert set(plain["kernels"]) == {"command", "machine", "tables"}
    assert plain["kernels"]["tables"]["exact"]["rows"][1]["ratio"] == 4.0


def test_markdown_is_what_the_document_gets(
    invoke: Callable[..., Result], measured: list[dict[str, Any]], tmp_path: Path
) -> None:
    page, file = tmp_path / "page.md", tmp_path / "tables.md"
    page.write_text(PAGE, encoding="utf-8")
    printed = invoke("kernels", "--markdown", "-").output
    result = invoke("kernels", "--markdown", file, "--update", page)
    assert result.exit_code == 0
    assert file.read_text(encoding="utf-8") == printed
    assert printed in page.read_text(encoding="utf-8")


def test_own_failure_is_told_by_the_exit_code(
    invoke: Callable[..., Result], measured: list[dict[str, Any]], table: Table
) -> None:
    table.rows += contest({}, Outcome("failed", remark="MemoryError"), [])
    result = invoke("solver")
    assert result.exit_code == 1
    assert result.stderr == "sparsespec: not measured: solver, Exact: MemoryError\n"
    assert "MemoryError" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("speed",), "'speed' is not one of"),
        (("--tokens", "many"), "'many' is not a list of whole numbers"),
        (("--tokens", "4096,10"), "a number below 64"),
        (("--megapixels", "nan"), "a number below 0.01, or none"),
        (("--repeats", "0"), "--repeats"),
        (("--json", "--markdown", "-"), "both want stdout"),
        (("--images", "nowhere"), "nowhere is not a folder of photographs"),
        (("--large", "nowhere.tif"), "there is no file nowhere.tif"),
        (("--update", "nowhere.md"), "there is no document nowhere.md"),
        (("kernels", "--update", "page.md"), "'<!-- begin kernels -->'"),
    ],
)
def test_wrong_usage(
    invoke: Callable[..., Result],
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("no markers", encoding="utf-8")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_every_option_is_described(invoke: Callable[..., Result]) -> None:
    shown = set(re.findall(r"--[a-z][a-z-]+", invoke("--help").output)) - {"--help"}
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    section = text.partition("## `sparsespec bench`")[2].partition("\n## ")[0]
    assert {"--quick", "--update", "--cache"} <= shown
    assert shown <= set(re.findall(r"--[a-z][a-z-]+", section))


def test_a_bench_has_the_sizes_it_is_asked_for(tmp_path: Path) -> None:
    for given, expected in (((), [1, 2]), ((900, 64, 900), [64, 900])):
        measuring = bench.Bench(benchmark.Options(tokens=given), tmp_path, print)
        assert measuring.sizes([5], [1, 2]) == expected
        assert (measuring.repeats, measuring.limit) == (5, 60.0)
        measuring.close()


def test_photographs_of_the_report_are_few_under_many_names(tmp_path: Path) -> None:
    photos = [np.random.default_rng(k).integers(0, 255, (90, 120, 3), np.uint8) for k in range(2)]
    report_page.write_photographs(tmp_path / "in", photos, 1010, 7)
    files = sorted((tmp_path / "in").rglob("*.jpg"))
    assert len(files) == 1010
    assert len({file.read_bytes() for file in files}) == 7
    assert {file.parent.name for file in files} == {"00", "01"}


def test_a_photograph_is_segmented_once_with_all_layers_of_the_report() -> None:
    calls = []

    def segment(image: Any, *, eigenvectors: int = 0) -> Any:
        calls.append(eigenvectors)
        return object()

    remembered = report_page.Remembered(segment)  # type: ignore[arg-type]
    one, other = np.zeros((4, 5, 3), np.uint8), np.ones((4, 5, 3), np.uint8)
    assert remembered(one) is remembered(one.copy())
    assert remembered(other) is not remembered(one)
    assert calls == [EIGENVECTORS, EIGENVECTORS]


def test_a_report_is_weighed(tmp_path: Path) -> None:
    images = tmp_path / "report" / "images" / "below"
    images.mkdir(parents=True)
    for name, size in (("a.jpg", 5), ("a.js", 7), ("b.js", 9)):
        (images / name).write_bytes(b"x" * size)
    (tmp_path / "report.html").write_bytes(b"xx")
    (tmp_path / "report" / "run.js").write_bytes(b"xxx")
    found = report_page.sizes_of(tmp_path)
    assert {what: (weight["files"], weight["bytes"]) for what, weight in found.items()} == {
        "page": (1, 2),
        "times": (1, 3),
        "small photographs": (1, 5),
        "masks, scores and layers": (2, 16),
        "together": (5, 26),
    }


def test_without_a_browser_the_report_is_only_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "find_browser", lambda: None)
    (section,) = benchmark.run(("report",), benchmark.Options(quick=True, photographs=3))
    size, times = section.tables
    assert [row["files"] for row in size.rows] == [1, 1, 3, 3, 8]
    assert [(row["status"], row["remark"]) for row in times.rows] == [
        ("not available", "at least 51 images are needed to turn pages")
    ]
    assert section.own_failures == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "none of chromium, " in str(report_page._missing(51))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'sparsespec[browser]'" in str(report_page._missing(51))
