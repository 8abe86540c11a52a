from __future__ import annotations

import asyncio
import io
import json
import logging
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsespec.formats.coco import decode_rle
from tests import malformed
from tests.server.server_stubs import NO_MEMORY, RAISE
from tests.server.serving import (
    Answer,
    Inline,
    Limits,
    Stub,
    ask,
    call,
    create_app,
    form,
    in_a_loop,
    inline_app,
    photo,
    running,
)

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def app() -> Any:
    return inline_app()


def labels_of(answer: Answer) -> np.ndarray:
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.body))).astype(np.int64)


# The answers


def test_coco(app: Any) -> None:
    answer = ask(app, headers=PNG, body=photo(32, 24))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    document = answer.document
    assert document["images"] == [{"id": 1, "file_name": "", "width": 32, "height": 24}]
    assert [a["label"] for a in document["annotations"]] == [1, 2]
    assert [a["score"] for a in document["annotations"]] == [0.9, 0.5]
    masks = [decode_rle(a["segmentation"]) for a in document["annotations"]]
    labels = labels_of(ask(app, headers={**PNG, "Accept": "image/png"}, body=photo(32, 24)))
    assert all((mask == (labels == k)).all() for k, mask in enumerate(masks, start=1))
    assert labels.shape == (24, 32)
    assert int(labels.max()) == 2


def test_the_same_document_as_a_run_writes(app: Any, tmp_path: Any) -> None:
    from sparsespec.formats.coco import CocoWriter, instance_annotations

    labels = labels_of(ask(app, headers={**PNG, "Accept": "image/png"}, body=photo()))
    writer = CocoWriter(tmp_path / "instances.json", description="sparsespec", version="0")
    writer.add(1, "", 32, 24, instance_annotations(labels, [0.9, 0.5]))
    writer.close()
    written = json.loads((tmp_path / "instances.json").read_text())
    document = ask(app, headers=PNG, body=photo()).document
    assert document["info"].keys() == written["info"].keys()
    assert {**document, "info": 0} == {**written, "info": 0}


def test_polygons_and_layers(app: Any) -> None:
    document = ask(app, target="/segment?polygons=true&layers=2", headers=PNG, body=photo()).document
    for annotation in document["annotations"]:
        assert isinstance(annotation["segmentation"][0][0], (int, float))
        assert "polygons" not in annotation
    assert [layer["name"] for layer in document["layers"]] == ["foreground", "eigenvector 1", "eigenvector 2"]
    layer = document["layers"][1]
    assert (layer["grid"], layer["extent"], layer["range"]) == ([2, 3], [2.0, 3.0], [-1.0, 1.0])
    assert "layers" not in ask(app, headers=PNG, body=photo()).document


def test_large_layers_are_averaged_down() -> None:
    from sparsespec.server.work import _layer

    values = np.arange(130 * 5, dtype=np.float32).reshape(130, 5)
    layer = _layer("foreground", values, [128.5, 5.0])
    assert layer["grid"] == [44, 2]
    assert layer["extent"] == [128.5 / 3, 5 / 3]
    assert layer["range"][0] == pytest.approx(values[:3, :3].mean())
    flat = _layer("foreground", np.zeros((2, 2), np.float32), None)
    assert (flat["data"], flat["extent"]) == ("AAAAAA==", [2.0, 2.0])


def test_overlay(app: Any) -> None:
    answer = ask(app, target="/segment?max_side=16", headers={**PNG, "Accept": "image/jpeg"}, body=photo(32, 24))
    with Image.open(io.BytesIO(answer.body)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (16, 12))


def test_count_and_headers(app: Any) -> None:
    answer = ask(app, target="/segment?n_instances=5", headers={**PNG, "X-Request-ID": "abc-1.2_3"}, body=photo())
    assert len(answer.document["annotations"]) == 5
    assert answer.headers["x-request-id"] == "abc-1.2_3"
    assert answer.headers["vary"] == "Accept"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert {part.split(";")[0].strip() for part in answer.headers["server-timing"].split(",")} >= {
        "upload",
        "wait",
        "read",
    }


@pytest.mark.parametrize("asked", ["", "a b", "x" * 65, 'a"b', "ä"])
def test_request_ids_that_are_not_taken_over(app: Any, asked: str) -> None:
    given = ask(app, headers={**PNG, "X-Request-ID": asked}, body=photo()).headers["x-request-id"]
    assert given != asked
    assert len(given) == 32


# What images there are


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"), ("JPEG", "CMYK"), ("TIFF", "RGB"),
                       ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("PNG", "I;16")]
)  # fmt: skip
def test_kinds_of_images(app: Any, kind: str, mode: str) -> None:
    answer = ask(
        app,
        headers={"Content-Type": "application/octet-stream", "Accept": "image/png"},
        body=photo(kind=kind, mode=mode),
    )
    assert labels_of(answer).shape == (24, 32)


def test_one_pixel(app: Any) -> None:
    answer = ask(app, headers={**PNG, "Accept": "image/png"}, body=photo(1, 1))
    assert labels_of(answer).shape == (1, 1)
    assert ask(app, headers={**PNG, "Accept": "image/jpeg"}, body=photo(1, 1)).status == 200


def test_exif_orientation_turns_the_answer(app: Any) -> None:
    exif = Image.Exif()
    exif[274] = 6
    answer = ask(app, headers={**PNG, "Accept": "image/png"}, body=photo(32, 24, kind="JPEG", exif=exif))
    assert labels_of(answer).shape == (32, 24)


def test_sixteen_bits_animations_and_pages(app: Any) -> None:
    deep = io.BytesIO()
    Image.fromarray(np.full((24, 32), 40_000, np.uint16)).save(deep, "TIFF")
    assert ask(app, headers=PNG, body=deep.getvalue()).status == 200
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue", "green")]
    moving, pages = io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    assert ask(app, headers=PNG, body=moving.getvalue()).document["images"][0]["width"] == 32
    frames[0].save(pages, "TIFF", save_all=True, append_images=[Image.new("RGB", (8, 9))])
    assert ask(app, headers=PNG, body=pages.getvalue()).document["images"][0]["width"] == 32
    second = ask(app, target="/segment?page=2", headers=PNG, body=pages.getvalue()).document
    assert second["images"] == [{"id": 1, "file_name": "", "width": 8, "height": 9, "page": 2}]
    third = ask(app, target="/segment?page=3", headers=PNG, body=pages.getvalue())
    assert (third.status, third.kind, third.document["parameter"]) == (422, "page", "page")
    assert "2 pages" in third.document["detail"]
    assert ask(app, target="/segment?page=2", headers=PNG, body=photo()).kind == "page"


# What is no good


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"", 400, "empty"),
        (b"<!doctype html><html>", 415, "not-an-image"),
        (b"%PDF-1.7 ...", 415, "not-an-image"),
        (b"%!PS-Adobe", 415, "not-an-image"),
        (b'{"a": 1}', 415, "not-an-image"),
        (b"\0" * 1000, 415, "not-an-image"),
        (photo(300, 200)[:-200], 422, "unreadable"),
        (photo(300, 200, kind="JPEG")[:400], 422, "unreadable"),
        (photo(300, 200)[:7], 415, "not-an-image"),
    ],
)
def test_bodies_that_are_no_images(app: Any, body: bytes, status: int, kind: str) -> None:
    answer = ask(app, headers={"Content-Type": "image/jpeg"}, body=body)
    assert (answer.status, answer.kind) == (status, kind)


@pytest.mark.parametrize(
    "kind", ["text/html", "application/json", "video/mp4", "multipart/mixed; boundary=x", "nonsense"]
)
def test_content_types_that_are_no_images(app: Any, kind: str) -> None:
    answer = ask(app, headers={"Content-Type": kind}, body=photo())
    assert (answer.status, answer.kind) == (415, "content-type")
    assert "image/*" in answer.headers["accept-post"]


@pytest.mark.parametrize(
    "kind", ["image/gif", "image/anything", "IMAGE/PNG; x=y", "application/x-www-form-urlencoded", ""]
)
def test_the_bytes_decide_what_it_is(app: Any, kind: str) -> None:
    assert ask(app, headers={"Content-Type": kind} if kind else {}, body=photo()).status == 200


def test_compressed_uploads(app: Any) -> None:
    answer = ask(app, headers={**PNG, "Content-Encoding": "gzip"}, body=photo())
    assert (answer.status, answer.kind) == (415, "content-encoding")


def test_too_many_bytes_by_the_header_alone() -> None:
    app = inline_app(Limits(max_body=1000))

    def never() -> Any:
        raise AssertionError("the body was read")
        yield b""

    async def run() -> Answer:
        return await call(app, headers={**PNG, "Content-Length": "1001"}, body=iter_lazily(never))

    answer = in_a_loop(run())
    assert (answer.status, answer.kind) == (413, "too-many-bytes")
    assert answer.document["max_bytes"] == 1000
    assert "1,001" in answer.document["detail"]


def iter_lazily(make: Any) -> Any:
    class Chunks:
        def __iter__(self) -> Any:
            yield b"x"
            yield from make()

    return Chunks()


def test_too_many_bytes_without_a_length() -> None:
    app = inline_app(Limits(max_body=1000))
    read = []

    def chunks() -> Any:
        for number in range(100):
            read.append(number)
            yield b"x" * 300

    answer = ask(app, headers=PNG, body=chunks())
    assert (answer.status, answer.kind) == (413, "too-many-bytes")
    assert len(read) <= 5
    content = photo()
    app = inline_app(Limits(max_body=len(content)))
    assert ask(app, headers=PNG, body=[content[:50], b"", content[50:]]).status == 200
    assert ask(app, headers=PNG, body=[content, b"x"]).kind == "too-many-bytes"


def test_too_many_pixels() -> None:
    app = inline_app(Limits(max_pixels=700))
    answer = ask(app, headers=PNG, body=photo(32, 24))
    assert (answer.status, answer.kind) == (413, "too-many-pixels")
    assert "32 x 24" in answer.document["detail"]
    assert ask(app, headers=PNG, body=photo(29, 24)).status == 200


def test_bombs() -> None:
    app = inline_app(Limits(max_pixels=1_000_000))
    for name, content, _ in malformed.bombs():
        answer = ask(app, headers=PNG, body=content)
        assert answer.status in (413, 415, 422), (name, answer.body)
        answer.problem()
    lie = struct.pack(">II5B", 100_000, 100_000, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + lie + struct.pack(">I", zlib.crc32(b"IHDR" + lie))
    answer = ask(app, headers=PNG, body=header + photo()[33:])
    assert (answer.status, answer.kind) == (413, "too-many-pixels")
    assert "100000 x 100000" in answer.document["detail"]


def test_two_hundred_malformed_images(app: Any) -> None:
    files = list(malformed.mutated(each=1))
    random.Random(7).shuffle(files)

    async def run() -> dict[int, int]:
        counts: dict[int, int] = {}
        for name, content in files[:200]:
            answer = await call(app, headers={"Content-Type": "application/octet-stream"}, body=content)
            counts[answer.status] = counts.get(answer.status, 0) + 1
            assert answer.status in (200, 400, 413, 415, 422), (name, answer.body)
            if answer.status != 200:
                answer.problem()
        return counts

    counts = in_a_loop(run())
    # Not every flipped bit is noticed.
    assert counts.pop(200) < 150
    assert sum(counts.values()) > 50


def test_a_count_that_the_image_is_too_small_for(app: Any) -> None:
    answer = ask(app, target="/segment?n_instances=5", headers=PNG, body=photo(2, 2))
    assert (answer.status, answer.kind, answer.document["parameter"]) == (422, "parameter", "n_instances")
    assert "2 x 2 pixels" in answer.document["detail"]


def test_errors_in_the_model_go_to_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(inline_app(), headers=PNG, body=photo(red=RAISE))
    assert (answer.status, answer.kind) == (500, "internal")
    assert "secret" not in answer.body.decode()
    assert "a secret of the server" in caplog.text
    memory = ask(inline_app(), headers=PNG, body=photo(red=NO_MEMORY))
    assert (memory.status, memory.kind) == (503, "memory")
    assert "32 x 24" in memory.document["detail"]
    assert int(memory.headers["retry-after"]) > 0


def test_errors_in_the_server_itself(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    app = inline_app()

    async def fail(wish: Any, body: bytes) -> Any:
        raise LookupError("a secret")

    monkeypatch.setattr(app.state.pool, "work", fail)
    answer = ask(app, headers=PNG, body=photo())
    assert (answer.status, answer.kind) == (500, "internal")
    assert "secret" not in answer.body.decode()
    assert "a secret" in caplog.text


# Forms


@pytest.mark.parametrize("pieces", [1, 7, 10_000])
def test_forms(app: Any, pieces: int) -> None:
    headers, body = form(photo())
    chunks = [body[k : k + pieces] for k in range(0, len(body), pieces)]
    assert ask(app, headers=headers, body=chunks).status == 200


def test_forms_with_other_fields(app: Any) -> None:
    more = b'--border\r\nContent-Disposition: form-data; name="title"\r\n\r\nCats\r\n'
    headers, body = form(photo(), more=more)
    assert ask(app, headers=headers, body=body).status == 200


@pytest.mark.parametrize(
    ("headers", "body", "says"),
    [
        ({"Content-Type": "multipart/form-data"}, b"x", "no boundary"),
        (*form(photo(), name="picture"), "no field"),
        ({"Content-Type": "multipart/form-data; boundary=other"}, form(photo())[1], ""),
        (form(photo())[0], form(photo())[1][:-20], "ends before"),
        (form(photo())[0], b"", "ends before"),
        (form(photo())[0], b"--border\r\nnonsense", ""),
        (form(photo())[0], b"a preamble\r\n" + form(photo())[1], "damaged"),
        (*form(photo(), more=b'--border\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n'), "2 fields"),
        (
            *form(photo(), more=b'--border\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 20),
            "more than 16",
        ),
    ],
)
def test_forms_that_are_no_good(app: Any, headers: dict[str, str], body: bytes, says: str) -> None:
    answer = ask(app, headers=headers, body=body)
    assert (answer.status, answer.kind) == (400, "form")
    assert says in answer.document["detail"]


def test_an_empty_file_in_a_form(app: Any) -> None:
    headers, body = form(b"")
    assert ask(app, headers=headers, body=body).kind == "empty"


def test_a_form_may_be_a_little_larger_than_its_image() -> None:
    content = photo()
    headers, body = form(content)
    assert ask(inline_app(Limits(max_body=len(content))), headers=headers, body=body).status == 200
    assert ask(inline_app(Limits(max_body=len(content) - 1)), headers=headers, body=body).kind == "too-many-bytes"


# Time, room and clients that go away


def test_slow_uploads() -> None:
    content = photo()
    pieces = [content[k : k + 8] for k in range(0, len(content), 8)]
    answer = ask(inline_app(Limits(upload_limit=0.2)), headers=PNG, body=pieces, pauses=0.03)
    assert (answer.status, answer.kind, answer.headers["connection"]) == (408, "slow-upload", "close")
    assert "0.2 s" in answer.document["detail"]
    answer = ask(inline_app(Limits(idle_limit=0.05)), headers=PNG, body=pieces, pauses=0.4)
    assert answer.kind == "slow-upload"
    assert "0.05 s" in answer.document["detail"]


def test_truncated_uploads(app: Any) -> None:
    answer = ask(app, headers={**PNG, "Content-Length": "5000"}, body=photo()[:60], truncated=True)
    assert answer.status == 499


def test_all_uploads_share_the_memory() -> None:
    content = photo()
    limits = Limits(max_body=len(content), max_held=len(content) + 10)

    async def run() -> None:
        app = create_app({"default": Stub()}, limits=limits, workers=Inline(limits=limits))
        pool = app.state.pool
        pool.door.clear()
        first = asyncio.create_task(call(app, headers=PNG, body=content))
        await asyncio.sleep(0.01)
        second = await call(app, headers=PNG, body=content)
        assert (second.status, second.kind) == (429, "busy")
        assert int(second.headers["retry-after"]) > 0
        pool.door.set()
        assert (await first).status == 200
        assert (await call(app, headers=PNG, body=content)).status == 200
        assert "sparsespec_held_bytes 0\n" in (await call(app, "GET", "/metrics")).body.decode()

    in_a_loop(run())


def test_a_full_queue_is_said_before_the_body_is_read(app: Any) -> None:
    app = inline_app()
    app.state.pool.full = True
    app.state.pool.at_work, app.state.pool.waiting = 1, 32

    async def run() -> Answer:
        return await call(app, headers=PNG, body=iter_lazily(lambda: pytest.fail("the body was read")))

    answer = in_a_loop(run())
    assert (answer.status, answer.kind) == (429, "busy")
    assert answer.headers["retry-after"] == "17"
    assert ask(app, "GET", "/readyz").document["status"] == "queue full"


def test_a_client_that_goes_away_while_it_waits() -> None:
    async def run() -> None:
        app = inline_app()
        pool = app.state.pool
        pool.door.clear()
        gone = asyncio.Event()
        waiting = asyncio.create_task(call(app, headers=PNG, body=photo(), gone=gone))
        await asyncio.sleep(0.01)
        gone.set()
        assert (await waiting).status == 499
        pool.door.set()
        await asyncio.sleep(0.01)
        assert pool.begun == 0

    in_a_loop(run())


# The other addresses


def test_probes() -> None:
    app = inline_app()
    assert ask(app, "GET", "/healthz").document == {"status": "alive"}
    assert ask(app, "GET", "/readyz").document["status"] == "ready"
    pool = app.state.pool
    pool.ready = 0
    starting = ask(app, "GET", "/readyz")
    assert (starting.status, starting.document["status"]) == (503, "starting")
    pool.unusable = "why"
    assert ask(app, "GET", "/readyz").document["status"] == "model cannot be opened"
    assert ask(app, headers=PNG, body=photo()).kind == "not-open"
    pool.refuse()
    stopping = ask(app, "GET", "/readyz")
    assert (stopping.status, stopping.document["status"]) == (503, "stopping")
    assert ask(app, headers=PNG, body=photo()).kind == "stopping"
    assert ask(app, "GET", "/healthz").status == 200


@pytest.mark.parametrize(
    ("method", "target", "status", "allow"),
    [
        ("GET", "/segment", 405, "POST"),
        ("OPTIONS", "/segment", 405, "POST"),
        ("PUT", "/segment", 405, "POST"),
        ("BREW", "/segment", 405, "POST"),
        ("POST", "/healthz", 405, "GET, HEAD"),
        ("GET", "/nothing", 404, None),
        ("GET", "/segment/", 404, None),
        ("GET", "/page.css/../../../etc/passwd", 404, None),
        ("POST", "//segment", 404, None),
    ],
)
def test_methods_and_addresses(app: Any, method: str, target: str, status: int, allow: str | None) -> None:
    answer = ask(app, method, target)
    assert answer.status == status
    answer.problem()
    if allow is not None:
        assert sorted(answer.headers["allow"].split(", ")) == sorted(allow.split(", "))


def test_head(app: Any) -> None:
    for target in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json"):
        answer = ask(app, "HEAD", target)
        assert answer.status == 200
        assert answer.headers["content-length"] == str(len(ask(app, "GET", target).body)) or target == "/metrics"


def test_metrics() -> None:
    app = inline_app()
    in_a_loop(_some_traffic(app))
    answer = ask(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = metrics_of(answer.body.decode())
    assert values['sparsespec_requests_total{method="POST",path="/segment",status="200"}'] == 2
    assert values['sparsespec_requests_total{method="POST",path="/segment",status="415"}'] == 1
    assert values['sparsespec_requests_total{method="other",path="other",status="404"}'] == 1
    assert values["sparsespec_images_total"] == 2
    assert values["sparsespec_pixels_total"] == 2 * 32 * 24
    assert values["sparsespec_instances_total"] == 4
    assert values["sparsespec_received_bytes_total"] == 2 * len(photo()) + 5
    assert values['sparsespec_stage_seconds_count{stage="read"}'] == 2
    assert values['sparsespec_stage_seconds_bucket{stage="total",le="+Inf"}'] == 2
    assert values['sparsespec_worker_memory_bytes{worker="0"}'] == 123
    assert values["sparsespec_resident_memory_bytes"] > 1e6
    assert values["sparsespec_queue_length"] == 0


async def _some_traffic(app: Any) -> None:
    for body in (photo(), photo(), b"12345"):
        await call(app, headers=PNG, body=body)
    await call(app, "BREW", "/x" * 50)


def metrics_of(text: str) -> dict[str, float]:
    """Parse the text format, strictly."""
    values: dict[str, float] = {}
    typed: set[str] = set()
    for line in text.splitlines():
        if line.startswith("#"):
            _, word, name, rest = line.split(" ", 3)
            assert rest
            if word == "TYPE":
                assert rest in ("counter", "gauge", "histogram")
                typed.add(name)
            continue
        key, _, value = line.rpartition(" ")
        name = key.partition("{")[0]
        assert name in typed or name.rpartition("_")[0] in typed
        assert key not in values
        values[key] = float(value)
    assert text.endswith("\n")
    return values


def test_metrics_parse_with_the_client_of_prometheus() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    app = inline_app()
    in_a_loop(_some_traffic(app))
    families = {
        family.name: family
        for family in parser.text_string_to_metric_families(ask(app, "GET", "/metrics").body.decode())
    }
    assert families["sparsespec_stage_seconds"].type == "histogram"
    assert families["sparsespec_requests"].type == "counter"


def test_hosts() -> None:
    app = inline_app(allowed_hosts=("localhost", "[::1]"))
    for host in ("localhost", "LOCALHOST:8000", "[::1]:8000"):
        assert ask(app, "GET", "/healthz", headers={"Host": host}).status == 200
    for host in ("evil.example", "localhost.evil.example", "", "[::2]:8000", "evil.example:80@localhost"):
        answer = ask(app, "GET", "/healthz", headers={"Host": host})
        assert (answer.status, answer.kind) == (421, "host")
    assert ask(inline_app(), "GET", "/healthz", headers={"Host": "anything"}).status == 200


def test_pages_of_other_origins() -> None:
    app = inline_app()
    foreign = {**PNG, "Origin": "https://evil.example"}
    assert ask(app, headers=foreign, body=photo()).kind == "origin"
    assert ask(app, headers={**PNG, "Origin": "null"}, body=photo()).kind == "origin"
    assert ask(app, headers={**PNG, "Origin": "http://testserver"}, body=photo()).status == 200
    assert "access-control-allow-origin" not in ask(app, "GET", "/healthz", headers=foreign).headers
    open_ = inline_app(cors_origins=("https://good.example",))
    good = {**PNG, "Origin": "https://good.example"}
    answer = ask(open_, headers=good, body=photo())
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://good.example")
    assert ask(open_, headers=foreign, body=photo()).kind == "origin"
    ahead = ask(open_, "OPTIONS", headers={**good, "Access-Control-Request-Method": "POST"})
    assert (ahead.status, ahead.headers["access-control-allow-origin"]) == (200, "https://good.example")


def test_the_log_has_a_line_for_each_request_and_nothing_of_the_upload(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparsespec.server")
    app = inline_app()
    headers, body = form(photo())
    ask(app, target="/segment?model=default", headers={**headers, "X-Request-ID": "r1"}, body=body)
    ask(app, headers={**PNG, "X-Request-ID": "r2"}, body=b"secret words")
    ask(app, "GET", "/healthz")
    lines = [vars(record) for record in caplog.records if record.name == "sparsespec.server"]
    assert [(line["request_id"], line["status"]) for line in lines] == [("r1", 200), ("r2", 415)]
    first = lines[0]
    assert (first["path"], first["width"], first["height"], first["instances"]) == ("/segment", 32, 24, 2)
    assert first["received"] == len(body)
    assert first["sent"] > 100
    assert {"upload", "wait", "read", "features", "write"} <= set(first["stages"])
    assert lines[1]["kind"] == "not-an-image"
    assert "secret" not in caplog.text
    assert "cat.png" not in str(lines)


def test_the_page_and_its_parts(app: Any) -> None:
    page = ask(app, "GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = page.body.decode()
    for name, kind in (
        ("page.css", "text/css"),
        ("page.js", "text/javascript"),
        ("viewer.css", "text/css"),
        ("viewer.js", "text/javascript"),
    ):
        assert f'"{name}"' in text
        part = ask(app, "GET", f"/{name}")
        assert (part.status, part.headers["content-type"].partition(";")[0]) == (200, kind)
        assert b"innerHTML" not in part.body
    assert "http://" not in text
    assert "https://" not in text


def test_a_description_that_is_valid(app: Any) -> None:
    document = ask(app, "GET", "/openapi.json").document
    assert document["openapi"].startswith("3.1")
    for path in document["paths"]:
        for method in document["paths"][path]:
            assert ask(app, method.upper(), path).status != 404
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(document)


def test_answers_are_as_described(app: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    description = ask(app, "GET", "/openapi.json").document

    def check(name: str, document: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
        jsonschema.Draft202012Validator(schema).validate(document)

    check("Coco", ask(app, target="/segment?layers=1", headers=PNG, body=photo()).document)
    check("Coco", ask(app, target="/segment?polygons=1", headers=PNG, body=photo()).document)
    check("Problem", ask(app, headers=PNG, body=b"x").document)
    check("Status", ask(app, "GET", "/readyz").document)


def test_several_models() -> None:
    app = inline_app(models={"small": Stub(), "large": Stub()})
    assert ask(app, target="/segment?model=large", headers=PNG, body=photo()).status == 200
    answer = ask(app, target="/segment?model=huge", headers=PNG, body=photo())
    assert (answer.status, answer.kind, answer.document["models"]) == (404, "unknown-model", ["small", "large"])
    with pytest.raises(ValueError, match="at least one model"):
        create_app({})


def test_under_a_path_of_a_proxy() -> None:
    app = inline_app(root_path="/masks")
    assert ask(app, "GET", "/openapi.json").document["servers"] == [{"url": "/masks"}]


def test_the_lifespan_starts_and_stops_the_workers() -> None:
    async def run() -> None:
        app = inline_app()
        app.state.pool.ready = 0
        async with running(app):
            assert app.state.pool.ready == 1
        assert app.state.pool.stopping

    in_a_loop(run())
