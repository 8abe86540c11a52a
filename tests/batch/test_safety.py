from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparsespec._atomic import TEMPORARY_PATTERN
from sparsespec.batch import BatchResult, InputsError, OutputsError, Row, find_inputs, run_batch

Photo = Callable[..., Path]
Segmenter = Callable[..., Any]

posix_only = pytest.mark.skipif(os.name == "nt", reason="this system does not allow such names")


def run(segmenter: Segmenter, source: Path, output: Path, **options: Any) -> BatchResult:
    return run_batch(segmenter, find_inputs(source, output=output), output, **options)


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def results(root: Path) -> dict[str, bytes]:
    """All that a run has left but its state, and what has times."""
    return {
        name: data
        for name, data in files(root).items()
        if not name.startswith(".sparsespec/") and name not in ("run.json", "report/run.js")
    }


def link(path: Path, target: str | Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=Path(path.parent, target).is_dir())
    except OSError:
        pytest.skip("this system does not let us make symbolic links")


HOSTILE = [
    "<img src=x onerror=alert(1)>.jpg",
    "\"><script>alert(1)<",  # a folder
    "'onmouseover='alert(1).jpg",
    "javascript:alert(1).jpg",
    "data:text,html.jpg",
    "a\nb.jpg",
    "a\r\nSet-Cookie: x.jpg",
    "\x1b[31mred\x1b[0m.jpg",
    "\x1b]0;title\x07.jpg",
    "\x9b31m.jpg",
    "\u202egpj.exe.jpg",
    "&lt;b&gt;&amp;.jpg",
    "%3Cimg%3E.jpg",
    "#?a=1&b=2.jpg",
    "a\\..\\..\\x.jpg",
    "{{7*7}}${x}.jpg",
    "</td></tr></table><h1>x.jpg".replace("/", "\u2215"),
    "con.jpg",
    "--overwrite.jpg",
    "~.jpg",
    "$(touch x).jpg",
    "name. .jpg",
    "\u2028line.jpg",
]  # fmt: skip


class Page(HTMLParser):
    """Collects tags and attributes of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "script":
            self.scripts.append(next((value or "" for name, value in attrs if name in ("src", "type")), ""))


@pytest.fixture
def hostile(tmp_path: Path, photo: Photo) -> Path:
    """Photographs with hostile names, and of each of these names also a file that is none."""
    plain = photo(tmp_path / "plain.jpg")
    for folder in ("good", "bad"):
        for name in HOSTILE:
            path = tmp_path / "in" / folder / (name if name.endswith(".jpg") else f"{name}/x.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(plain.read_bytes() if folder == "good" else b"no image\x1b[31m\n")
    if sys.platform == "linux":
        (tmp_path / "in" / "good" / os.fsdecode(b"caf\xe9<b>.jpg")).write_bytes(plain.read_bytes())
    return tmp_path / "in"


def is_harmless(text: str) -> bool:
    """Whether a terminal shows it as it is, on one line."""
    return text.isprintable() and text.encode("utf-8", "ignore").decode() == text


@posix_only
def test_hostile_names_in_everything_that_is_written(tmp_path: Path, hostile: Path, segmenter: Segmenter) -> None:
    out = tmp_path / "out"
    result = run(segmenter, hostile, out)
    images = find_inputs(hostile).images
    good = [image for image in images if image.startswith("good/")]
    assert (result.count("done"), result.count("failed")) == (len(good), len(HOSTILE))
    assert [row.path for row in result.rows] == list(images)
    assert [row["path"] for row in json.loads((out / "run.json").read_text("utf-8"))["images"]] == list(images)
    coco = json.loads((out / "instances.json").read_text("utf-8"))
    assert [image["file_name"] for image in coco["images"]] == good

    written = set(files(out))
    for row in result.rows:
        if row.status == "done":
            assert row.mask in written
            assert row.overlay in written
    for name in written:
        assert is_harmless(name), name
        assert not set('<>:"|?*\\') & set(name), name
        assert not any(part.endswith((".", " ")) for part in name.split("/"))

    source = (out / "report.html").read_bytes().decode("utf-8")
    page = Page(source)
    assert page.tags <= {"html", "head", "meta", "title", "style", "body", "div", "noscript", "h1", "p", "a", "script"}
    assert not any(name.startswith("on") for name in page.attributes)
    assert page.scripts == ["application/json", "", "", "report/run.js"]
    # Nothing in a name ends the script that it stands in, or begins another.
    index = json.loads(source.partition('id="index">')[2].partition("</script>")[0])
    assert "<" not in source.partition('id="index">')[2].partition("</script>")[0]
    columns = {name: number for number, name in enumerate(index["columns"])}
    assert len(index["rows"]) == len(images)
    run_script = (out / "report" / "run.js").read_bytes().decode("ascii")
    told = json.loads(run_script.removeprefix("sparsespec.run(").removesuffix(");\n"))
    assert told["photographs"] == "../in/"
    for number, (image, row) in enumerate(zip(images, index["rows"], strict=True)):
        shown = row[columns["path"]]
        assert is_harmless(shown)
        quoted = told["others"].get(str(number))
        assert (quoted is None) == (shown == image)
        if quoted is not None:
            assert re.fullmatch(r"[A-Za-z0-9_.~%/-]+", quoted)
            assert unquote(quoted, errors="surrogateescape") == image
        if row[columns["status"]] == "done":
            name = row[columns["name"]]
            for ending in ("jpg", "js"):
                assert f"report/images/{name}.{ending}" in written
            card = (out / "report" / "images" / f"{name}.js").read_bytes().decode("ascii")
            assert json.loads(f"[{card.removeprefix('sparsespec.card(').removesuffix(');' + chr(10))}]")[0] == name


@posix_only
def test_hostile_names_take_one_harmless_line_of_the_terminal_each(
    tmp_path: Path, hostile: Path, segmenter: Segmenter
) -> None:
    from sparsespec.cli._progress import Progress

    stream = io.StringIO()
    with redirect_stderr(stream):
        progress = Progress(2 * len(HOSTILE) + 1)
        run(segmenter, hostile, tmp_path / "out", progress=progress.update)
    lines = stream.getvalue().split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(HOSTILE)
    for line in lines:
        assert line.startswith("failed: bad/")
        assert is_harmless(line), line


@posix_only
def test_hostile_texts_of_errors(tmp_path: Path, photo: Photo) -> None:
    def failing(image: np.ndarray) -> Any:
        raise OSError(errno.EACCES, "no\x1b[2J\nnext line <b>", "\u202e</td><script>\n\udce9")

    photo(tmp_path / "in" / "a.jpg")
    out = tmp_path / "out"
    result = run(failing, tmp_path / "in", out)
    assert result.count("failed") == 1
    page = Page((out / "report.html").read_bytes().decode("utf-8"))
    assert not {"b", "td"} & page.tags
    assert page.scripts == ["application/json", "", "", "report/run.js"]
    assert is_harmless(json.loads((out / "run.json").read_text("utf-8"))["images"][0]["error"])


# Links


def test_links_out_of_the_input_fail_alone(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    photo(tmp_path / "elsewhere" / "secret.jpg")
    link(tmp_path / "in" / "inner.jpg", "a.jpg")
    link(tmp_path / "in" / "out.jpg", tmp_path / "elsewhere" / "secret.jpg")
    link(tmp_path / "in" / "broken.jpg", "nothing.jpg")
    link(tmp_path / "in" / "self.jpg", "self.jpg")
    link(tmp_path / "in" / "folder", tmp_path / "elsewhere")
    result = run(segmenter, tmp_path / "in", tmp_path / "out")
    rows = {row.path: row for row in result.rows}
    assert {path: (row.status, row.reason) for path, row in rows.items()} == {
        "a.jpg": ("done", None),
        "broken.jpg": ("failed", "storage"),
        "inner.jpg": ("done", None),
        "out.jpg": ("failed", "refused"),
        "self.jpg": ("failed", "storage"),
    }
    assert "leads out of the input folder" in (rows["out.jpg"].error or "")
    assert "a link leads to a file that does not exist" in (rows["broken.jpg"].error or "")
    assert "a link leads back to itself" in (rows["self.jpg"].error or "")
    assert not [name for name in files(tmp_path / "out") if "/out." in name]
    followed = run(segmenter, tmp_path / "in", tmp_path / "out2", follow_links=True)
    assert {row.path for row in followed.rows if row.status == "done"} == {"a.jpg", "inner.jpg", "out.jpg"}


def test_a_link_that_is_the_input_itself_is_followed(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "elsewhere" / "deep" / "b.jpg")
    (tmp_path / "in").mkdir()
    link(tmp_path / "in" / "b.jpg", tmp_path / "elsewhere" / "deep" / "b.jpg")
    link(tmp_path / "way", tmp_path / "elsewhere")
    assert run(segmenter, tmp_path / "in" / "b.jpg", tmp_path / "out").count("done") == 1
    assert run(segmenter, tmp_path / "way", tmp_path / "out2").count("done") == 1
    assert run(segmenter, tmp_path / "in", tmp_path / "out3").count("failed") == 1


def test_links_in_the_output_lead_nowhere(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    photo(tmp_path / "in" / "sub" / "b.jpg")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "a.jpg", "sub/b.jpg"):
        (elsewhere / name).write_text("precious")
    before = files(elsewhere)
    out = tmp_path / "out"
    out.mkdir()
    link(out / "masks", elsewhere)
    link(out / "overlays", elsewhere)
    result = run(segmenter, tmp_path / "in", out, overwrite=True)
    assert result.count("done") == 0
    assert all("is a link" in (row.error or "") for row in result.rows)
    assert files(elsewhere) == before


def test_files_that_are_links_in_the_output_are_replaced(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    for name in ("masks/a.png", "run.json", "instances.json", "report.html"):
        link(out / name, precious)
    assert run(segmenter, tmp_path / "in", out, overwrite=True).count("done") == 1
    assert precious.read_text() == "precious"
    assert not (out / "masks" / "a.png").is_symlink()


def test_a_record_that_lies_removes_nothing_else(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    out = tmp_path / "out"
    run(segmenter, tmp_path / "in", out)
    precious = tmp_path / "precious.png"
    precious.write_text("precious")
    (out / "notes.txt").write_text("precious")
    paths = [str(precious), "masks/../../precious.png", "../precious.png", "notes.txt", "masks/../notes.txt"]
    record = json.loads((out / "run.json").read_text())
    for name in ("run.json", *(path.relative_to(out).as_posix() for path in (out / ".sparsespec").rglob("*.jsonl"))):
        text = (out / name).read_text()
        for old in ("masks/a.png", "overlays/a.jpg"):
            text = text.replace(old, paths[len(text) % len(paths)])
        (out / name).write_text(text)
    record["images"] = [{"path": "a.jpg", "mask": path, "overlay": path} for path in paths]
    (out / "run.json").write_text(json.dumps(record, indent=1))
    assert run(segmenter, tmp_path / "in", out, overwrite=True).count("done") == 1
    assert precious.read_text() == "precious"
    assert (out / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 200_000, '{"format": ' + "9" * 10_000 + "}", "\x00\xff"])
def test_a_plan_that_is_damaged_is_refused(tmp_path: Path, segmenter: Segmenter, photo: Photo, content: str) -> None:
    photo(tmp_path / "in" / "a.jpg")
    out = tmp_path / "out"
    run(segmenter, tmp_path / "in", out)
    (out / ".sparsespec" / "plan.json").write_text(content, encoding="latin-1")
    with pytest.raises(OutputsError, match=r"cannot be continued.*--overwrite"):
        run(segmenter, tmp_path / "in", out)
    assert run(segmenter, tmp_path / "in", out, overwrite=True).count("done") == 1


# Names that meet


def test_pages_and_folders_of_the_same_name(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    scan = tmp_path / "in" / "scan.tif"
    scan.parent.mkdir()
    with tifffile.TiffWriter(scan) as writer:
        for grey in (10, 60):
            writer.write(np.full((20, 30, 3), grey, np.uint8), photometric="rgb")
    photo(tmp_path / "in" / "scan.jpg")
    folders = ["scan.pages"]
    try:
        (tmp_path / "in" / "SCAN.TIF").mkdir()
        folders.append("SCAN.TIF")
    except FileExistsError:
        pass  # this disk ignores case
    for folder in folders:
        photo(tmp_path / "in" / folder / "page-0001.jpg")
    out = tmp_path / "out"
    result = run(segmenter, tmp_path / "in", out)
    assert result.count("done") == len(result.rows) == 3 + len(folders)
    masks = [row.mask or "" for row in result.rows]
    assert len({mask.lower() for mask in masks}) == len(masks)
    assert all((out / mask).is_file() for mask in masks)
    of_scan = [row.mask for row in result.rows if row.path == "scan.tif"]
    folder = "scan.tif.2" if len(folders) > 1 else "scan.tif"
    assert of_scan == [f"masks/{folder}/page-0001.png", f"masks/{folder}/page-0002.png"]


@posix_only
def test_names_too_long_for_the_disk(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    plain = photo(tmp_path / "plain.jpg").read_bytes()
    (tmp_path / "in").mkdir()
    for name in ("x" * 251 + ".jpg", "<" * 251 + ".jpg", "日" * 83 + "xx.jpg", "\n" * 250 + ".tiff"):
        (tmp_path / "in" / name).write_bytes(plain)
    out = tmp_path / "out"
    result = run(segmenter, tmp_path / "in", out)
    assert [row.error for row in result.rows] == [None] * 4
    assert (out / "masks" / ("x" * 251 + ".png")).is_file()


# Outputs in the way


def test_output_inside_input_finds_no_results_of_its_own(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    out = tmp_path / "in" / "results"
    first = run(segmenter, tmp_path / "in", out)
    again = run(segmenter, tmp_path / "in", out)
    other = run(segmenter, tmp_path / "in", tmp_path / "in" / "other")
    for result in (first, again, other):
        assert [row.path for row in result.rows] == ["a.jpg"]
    with pytest.raises(InputsError, match="the output folder is the folder of the input"):
        run(segmenter, tmp_path / "in", tmp_path / "in")
    with pytest.raises(InputsError, match="lies inside the output folder"):
        run(segmenter, tmp_path / "in", tmp_path)


# A disk that takes no more

_RUN = """
import os, signal, sys
from types import SimpleNamespace
import numpy as np
from sparsespec.batch import OutputsError, find_inputs, run_batch

source, output, *until = sys.argv[1:]
calls = 0

def segment(image, out=None):
    global calls
    calls += 1
    if until and calls == int(until[0]):
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("this image is not done")
    noise = np.random.default_rng(int(image.sum())).random(image.shape[:2])
    return SimpleNamespace(labels=(noise > 0.5).astype(np.int32), scores=np.array([0.5]), info={})

try:
    result = run_batch(segment, find_inputs(source, output=output), output)
except OutputsError as error:
    print(f"refused: {error}")
except OSError as error:
    print(f"stopped: {error}")
else:
    print(f"blocked: {result.blocked}" if result.blocked else f"done: {result.count('done')} of {len(result.rows)}")
"""


@pytest.fixture
def photos(tmp_path: Path, photo: Photo) -> Path:
    for number in range(12):
        photo(tmp_path / "in" / f"{number:02d}.png", 120, 100, grey=number)
    return tmp_path / "in"


def in_namespace(tmp_path: Path, script: str, *arguments: str | Path) -> str:
    """Run commands of a shell that may mount disks nobody else sees; ``$PYTHON`` runs images; or skip."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("this system has no unshare")
    enter = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-e", "-c"]
    probe = 'mount -t tmpfs tmpfs "$1" && umount "$1"'
    (tmp_path / "mount").mkdir()
    tried = subprocess.run([*enter, probe, "sh", tmp_path / "mount"], capture_output=True, text=True, timeout=60)
    if tried.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {tried.stderr.strip()}")
    (tmp_path / "program.py").write_text(_RUN)
    environment = {**os.environ, "PROGRAM": f"{sys.executable} -P {tmp_path / 'program.py'}"}
    done = subprocess.run(
        [*enter, script, "sh", *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_space_continues_it(tmp_path: Path, photos: Path) -> None:
    printed = in_namespace(
        tmp_path,
        """
        $PROGRAM "$1" "$2/undisturbed"
        mount -t tmpfs -o size=200k tmpfs "$2/mount"
        $PROGRAM "$1" "$2/mount/out"
        cp -r "$2/mount/out" "$2/full"
        mount -o remount,size=50m "$2/mount"
        $PROGRAM "$1" "$2/mount/out"
        cp -r "$2/mount/out" "$2/continued"
        """,
        photos,
        tmp_path,
    ).splitlines()
    assert printed[0] == "done: 12 of 12"
    assert re.match("(blocked|stopped): .*No space left on device", printed[1])
    assert printed[2] == "done: 12 of 12"
    assert not list((tmp_path / "full").rglob(TEMPORARY_PATTERN))
    expected = results(tmp_path / "undisturbed")
    assert results(tmp_path / "continued") == expected
    # Whatever is there of an image is whole.
    for name, data in results(tmp_path / "full").items():
        if name.startswith(("masks/", "overlays/")):
            assert data == expected[name]


@pytest.mark.slow
def test_a_read_only_disk_is_refused_and_the_run_goes_on_later(tmp_path: Path, photos: Path) -> None:
    printed = in_namespace(
        tmp_path,
        """
        $PROGRAM "$1" "$2/undisturbed"
        mount -t tmpfs tmpfs "$2/mount"
        mount -o remount,ro "$2/mount"
        $PROGRAM "$1" "$2/mount/out"
        mount -o remount,rw "$2/mount"
        $PROGRAM "$1" "$2/mount/out" 3
        mount -o remount,ro "$2/mount"
        $PROGRAM "$1" "$2/mount/out"
        mount -o remount,rw "$2/mount"
        $PROGRAM "$1" "$2/mount/out"
        cp -r "$2/mount/out" "$2/continued"
        """,
        photos,
        tmp_path,
    ).splitlines()
    assert printed[0] == "done: 12 of 12"
    assert re.match("refused: cannot use the output folder '.*': Read-only file system", printed[1])
    assert printed[2] == "done: 2 of 12"
    assert re.match("refused: cannot use the output folder '.*': Read-only file system", printed[3])
    assert printed[4] == "done: 12 of 12"
    assert results(tmp_path / "continued") == results(tmp_path / "undisturbed")


@pytest.mark.parametrize("what", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_what_no_other_image_would_change_ends_the_run(
    tmp_path: Path, photos: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, what: int
) -> None:
    undisturbed = tmp_path / "undisturbed"
    run(segmenter, photos, undisturbed)
    seen: list[Row] = []
    replace = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target).name == "05.png":
            raise OSError(what, os.strerror(what), str(target))
        replace(source, target)

    out = tmp_path / "out"
    monkeypatch.setattr(os, "replace", full)
    result = run(segmenter, photos, out, progress=lambda row, *_: seen.append(row))
    assert result.blocked is not None
    assert os.strerror(what) in result.blocked
    assert "cannot write the results" in result.blocked
    assert len([row for row in seen if row.status == "failed"]) <= 1
    assert result.count("done") < 12
    assert not list(out.rglob(TEMPORARY_PATTERN))
    monkeypatch.setattr(os, "replace", replace)
    assert run(segmenter, photos, out).count("done") == 12
    assert results(out) == results(undisturbed)


@pytest.mark.skipif(os.name == "nt", reason="this system has no limit on the size of a file")
@pytest.mark.slow
def test_files_larger_than_allowed_cost_their_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (500, 600, 3), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(noise).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "program.py").write_text(
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))\n" + _RUN
    )
    command = [sys.executable, "-P", *map(str, (tmp_path / "program.py", tmp_path / "in", tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done: 0 of 3\n"
    rows = json.loads((tmp_path / "out" / "run.json").read_text())["images"]
    assert all("File too large" in row["error"] for row in rows)
    assert not list((tmp_path / "out").rglob(TEMPORARY_PATTERN))
