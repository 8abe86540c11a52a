from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsespec.batch import OutputsError
from sparsespec.batch.job import Item, Outcome
from sparsespec.batch.outputs import held, planned_files, prepare, remove_outputs, sweep
from sparsespec.batch.plan import Plan
from sparsespec.batch.record import Row
from sparsespec.batch.state import State
from sparsespec.batch.store import LocalStore

PLAN = Plan({"seed": 0}, "digest", 2)


def fill(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("content")


def left(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def ready(root: Path, names: list[str] | None = None, *, plan: Plan = PLAN, overwrite: bool = False) -> Plan:
    store = LocalStore(root)
    with held(store):
        return prepare(store, plan, names or ["x"], overwrite=overwrite)


def note(root: Path, path: str, *files: str, shard: int = 0) -> None:
    """Let a former run have settled an image, and killed then."""
    store = LocalStore(root)
    State(store).write_plan(PLAN)
    journal = State(store).journal(shard)
    journal.begin(Item(path, path))
    sizes = {file: (root / file).stat().st_size for file in files}
    journal.settle(path, [Outcome(Row(path=path, status="done"), files=sizes, name=path)])
    journal._descriptor, descriptor = None, journal._descriptor
    assert descriptor is not None
    os.close(descriptor)


def test_new_and_empty_folders_are_fine(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    assert ready(root) is PLAN
    assert ready(root) is PLAN
    (root / ".DS_Store").write_bytes(b"")
    assert ready(root) is PLAN
    assert left(root) == {".DS_Store", ".sparsespec/lock"}


def test_used_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputsError, match=r"is not empty: .*--overwrite"):
        ready(tmp_path)
    (tmp_path / "run.json").write_text('{"program": "sparsespec"}')
    with pytest.raises(OutputsError, match="already holds a run"):
        ready(tmp_path)
    assert left(tmp_path) == {"thesis.tex", "run.json"}
    with pytest.raises(OutputsError, match="is a file"):
        ready(tmp_path / "thesis.tex", overwrite=True)
    with pytest.raises(OutputsError, match="cannot use the output folder"):
        ready(tmp_path / "thesis.tex" / "below", overwrite=True)


def test_the_same_run_goes_on_with_its_shards(tmp_path: Path) -> None:
    fill(tmp_path, "masks/x.png", "masks/.sparsespec-0123.tmp")
    note(tmp_path, "x.jpg", "masks/x.png")
    found = ready(tmp_path, plan=Plan({"seed": 0}, "other images", 7))
    assert (found.shards, found.inputs) == (2, "digest")
    assert left(tmp_path) - {".sparsespec/plan.json", ".sparsespec/lock"} == {
        "masks/x.png",
        State(LocalStore(tmp_path)).past(0)[0].sources[0],
    }


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    fill(tmp_path, "masks/x.png")
    note(tmp_path, "x.jpg", "masks/x.png")
    before = left(tmp_path)
    with pytest.raises(OutputsError, match=r"other settings \(seed was 0, is 1\): .*--overwrite"):
        ready(tmp_path, plan=Plan({"seed": 1}, "digest", 2))
    with pytest.raises(OutputsError, match=r"sparsespec was .*, is 99\.0"):
        ready(tmp_path, plan=Plan({"seed": 0}, "digest", 2, version="99.0"))
    assert left(tmp_path) == before | {".sparsespec/lock"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    note(tmp_path, "x.jpg")
    (tmp_path / ".sparsespec" / "plan.json").write_bytes(content)
    with pytest.raises(OutputsError, match=r"holds a run that cannot be continued: it is damaged .*--overwrite"):
        ready(tmp_path)
    assert ready(tmp_path, overwrite=True) is PLAN
    assert left(tmp_path) == {".sparsespec/lock"}


def test_the_state_of_a_run_that_nobody_knows_is_no_use(tmp_path: Path) -> None:
    note(tmp_path, "x.jpg")
    (tmp_path / ".sparsespec" / "plan.json").unlink()
    assert ready(tmp_path) is PLAN
    assert left(tmp_path) == {".sparsespec/lock"}


def test_overwriting_that_was_ended_leaves_no_records_without_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "masks/x.png")
    note(tmp_path, "x.jpg", "masks/x.png")
    plan = tmp_path / ".sparsespec" / "plan.json"
    remove = LocalStore.remove

    def watched(self: LocalStore, path: str) -> None:
        others = [other for other in left(tmp_path) if other.startswith(".sparsespec/")]
        assert plan.exists() or others == [".sparsespec/lock"]
        remove(self, path)

    monkeypatch.setattr(LocalStore, "remove", watched)
    assert ready(tmp_path, plan=Plan({"seed": 1}, "digest", 2), overwrite=True).parameters == {"seed": 1}
    assert left(tmp_path) == {".sparsespec/lock"}


def test_overwriting_clears_the_former_run_and_nothing_else(tmp_path: Path) -> None:
    ours = ["masks/old.png", "overlays/old.jpg", "cutouts/old/001.png", "yolo/labels/old.txt", "yolo/data.yaml"]
    ours += ["masks/a/x.png", "instances.json", "instances.csv", "instances/000001.json", "report.html", "run.json"]
    ours += ["report/run.js", "report/images/old.jpg", "report/images/old.js", "report/images/a/x.jpg"]
    unfinished = [".sparsespec-0123.tmp", "masks/a/.sparsespec-4567.tmp", "masks/begun.png"]
    unfinished += ["report/images/begun.js", "report/images/a/.sparsespec-89ab.tmp"]
    foreign = ["masks/by-hand.png", "report/images/mine.jpg", "notes.txt", "secret.png"]
    fill(tmp_path, *ours, *unfinished, *foreign)
    note(tmp_path, "old.jpg", *ours[:4], "report/images/old.jpg", "report/images/old.js")
    journal = State(LocalStore(tmp_path)).journal(1)
    journal.begin(Item("begun.jpg", "begun"))
    journal.close()
    evil = [Outcome(Row(path="evil"), files={"masks/../secret.png": 1, "notes.txt": 2, "/etc/hosts": 3}, name="evil")]
    State(LocalStore(tmp_path)).finish(1, {"evil": evil}, [])
    ready(tmp_path, ["a/x"], overwrite=True)
    assert left(tmp_path) == {*foreign, ".sparsespec/lock"}
    assert not (tmp_path / "overlays").exists()
    assert not (tmp_path / "cutouts").exists()


def test_overwriting_clears_the_run_of_a_version_without_state(tmp_path: Path) -> None:
    fill(tmp_path, "masks/old.png", "overlays/old.jpg", "secret.png", "notes.txt")
    rows = [
        {"path": "old.jpg", "mask": "masks/old.png", "overlay": "overlays/old.jpg"},
        {"path": "evil", "mask": "masks/../secret.png", "overlay": "notes.txt"},
        {"path": "odd", "mask": ".", "overlay": 7},
        {"path": "failed.jpg", "mask": None, "overlay": None},
    ]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    (tmp_path / "run.json").write_text(f'{{\n "program": "sparsespec",\n "images": [\n  {lines}\n ]\n}}\n')
    ready(tmp_path, overwrite=True)
    assert left(tmp_path) == {"secret.png", "notes.txt", ".sparsespec/lock"}


@pytest.mark.parametrize("record", ["", "[]", "{", '{"images": 3}', '{"images": [3]}', ' "images": [\n 3,\n {"path'])
def test_a_broken_record_is_no_obstacle(tmp_path: Path, record: str) -> None:
    fill(tmp_path, "masks/a.png")
    (tmp_path / "run.json").write_text(record)
    ready(tmp_path, ["a"], overwrite=True)
    assert left(tmp_path) == {".sparsespec/lock"}


def test_links_are_not_followed(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "x.png", "journal/000000/1.jsonl")
    out = tmp_path / "out"
    out.mkdir()
    try:
        (out / "masks").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no links here")
    note(out, "x.jpg")
    with pytest.raises(OutputsError, match="a folder of results is a link"):
        remove_or_refuse(out)
    assert (tmp_path / "elsewhere" / "x.png").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".sparsespec").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputsError, match="is a link: remove it"):
        ready(tmp_path / "other")


def remove_or_refuse(out: Path) -> None:
    (out / "masks" / "x.png").stat()
    store = LocalStore(out)
    State(store).finish(0, {"x.jpg": [Outcome(Row(path="x.jpg"), files={"masks/x.png": 7}, name="x")]}, [])
    ready(out, overwrite=True)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="locks of POSIX")
    code = "import sys; from pathlib import Path; from sparsespec.batch.outputs import *\n"
    code += "from sparsespec.batch.store import LocalStore\n"
    code += "with held(LocalStore(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputsError, match="another run is at work in the output folder"):
            ready(tmp_path / "out", overwrite=True)
        # It is not kept by who is gone, in whatever way.
        process.kill()
        process.wait()
        assert ready(tmp_path / "out", overwrite=True) is PLAN


def test_removed_are_files_of_results_and_the_folders_that_they_leave_empty(tmp_path: Path) -> None:
    fill(tmp_path, "masks/a/b/x.png", "masks/a/y.png", "overlays/a/b/x.jpg", "run.json", "mine.txt")
    remove_outputs(LocalStore(tmp_path), ["masks/a/b/x.png", "overlays/a/b/x.jpg", "masks/none.png", "mine.txt"])
    assert left(tmp_path) == {"masks/a/y.png", "run.json", "mine.txt"}
    assert not (tmp_path / "overlays").exists()
    assert not (tmp_path / "masks" / "a" / "b").exists()


def test_planned_files_are_those_of_the_image_and_no_other(tmp_path: Path) -> None:
    own = {"masks/a/x.png", "overlays/a/x.jpg", "yolo/labels/a/x.txt", "cutouts/a/x/001.png"}
    own |= {"report/images/a/x.jpg", "report/images/a/x.js"}
    pages = {"masks/a/x.tif/page-0001.png", "overlays/a/x.tif/page-0001.jpg", "cutouts/a/x.tif/page-0001/001.png"}
    pages |= {"report/images/a/x.tif/page-0001.jpg", "report/images/a/x.tif/page-0001.js"}
    others = {"masks/a/x/y.png", "cutouts/a/x/y/001.png", "masks/a/xx.png", "cutouts/a/xx/001.png"}
    others |= {"report/images/a/x/y.js", "report/run.js"}
    # Somebody else may be at work on the same image.
    others |= {"cutouts/a/x/.sparsespec-1.tmp", "masks/a/x.tif/.sparsespec-2.tmp"}
    fill(tmp_path, *own, *pages, *others)
    assert set(planned_files(LocalStore(tmp_path), Item("a/x.tif", "a/x"))) == own | pages


def test_what_is_unfinished_is_swept_wherever_a_run_writes(tmp_path: Path) -> None:
    name = ".sparsespec-0123456789abcdef.tmp"
    folders = ["", "masks/a/", "overlays/", "cutouts/a/b/", "yolo/", "yolo/labels/a/", "instances/", ".sparsespec/"]
    folders += ["report/", "report/images/a/"]
    folders += [".sparsespec/records/", ".sparsespec/times/"]
    fill(tmp_path, *(folder + name for folder in folders), f"elsewhere/{name}", "masks/.sparsespec-x", "masks/x.tmp")
    sweep(LocalStore(tmp_path))
    assert left(tmp_path) == {f"elsewhere/{name}", "masks/.sparsespec-x", "masks/x.tmp"}


def test_overwriting_leaves_files_that_only_have_names_of_ours(tmp_path: Path) -> None:
    kept = ("instances/000001.json", "instances/mine.txt", "instances.csv", "yolo/data.yaml")
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("somebody's", encoding="utf-8")
    prepare(LocalStore(tmp_path), Plan({}, "", 1), ["a"], overwrite=True)
    assert all((tmp_path / name).is_file() for name in kept)
    State(LocalStore(tmp_path)).write_plan(Plan({}, "", 1))
    prepare(LocalStore(tmp_path), Plan({"seed": 1}, "", 1), ["a"], overwrite=True)
    assert [name for name in kept if (tmp_path / name).is_file()] == ["instances/mine.txt"]
