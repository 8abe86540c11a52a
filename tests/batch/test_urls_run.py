"""Runs from a bucket to a bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch import find_inputs, run_batch
from sparsespec.batch.store import open_store

from .servers import ObjectStore, object_store

for needed in ("fsspec", "s3fs", "moto", "flask"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'sparsespec[remote]' 'moto[server]'")

_IMAGES = 24

_SCRIPT = """
import sys, time
from types import SimpleNamespace
import numpy as np
from sparsespec.batch import find_inputs, run_batch
from sparsespec.batch.store import open_store

def segment(image):
    time.sleep(0.05)
    labels = (image.max(axis=2) > 127).astype(np.int32)
    return SimpleNamespace(labels=labels, scores=np.array([0.5], np.float32), info={})

if __name__ == "__main__":
    source, target, endpoint = sys.argv[1:]
    options = {"endpoint_url": endpoint}
    run_batch(segment, find_inputs(source, storage_options=options), open_store(target, options))
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AWS_", "FSSPEC_")):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-word")


@pytest.fixture
def server(tmp_path: Path, _own_environment: None) -> Iterator[ObjectStore]:
    with object_store(tmp_path / "log") as running:
        running.client().create_bucket(Bucket="photos")
        running.client().create_bucket(Bucket="results")
        yield running


@pytest.fixture
def photos(tmp_path: Path, server: ObjectStore, photo: Callable[..., Path]) -> Path:
    client = server.client()
    for number in range(_IMAGES):
        path = photo(tmp_path / "in" / f"{number % 3}" / f"{number}.png", grey=10 + number)
        client.upload_file(str(path), "photos", f"in/{path.relative_to(tmp_path / 'in').as_posix()}")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    client.put_object(Bucket="photos", Key="in/broken.jpg", Body=b"no image")
    return tmp_path / "in"


def results(store: Any) -> dict[str, bytes]:
    """All files of a run but what is about its course."""
    return {path: store.read(path) for path in store.list("") if not path.startswith(".sparsespec/")}


def rows(content: bytes) -> list[dict[str, Any]]:
    return [{**row, "seconds": None, "fingerprint": None} for row in json.loads(content)["images"]]


def same(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        if name == "run.json":
            assert rows(one[name]) == rows(other[name])
        elif name != "report/run.js":
            assert one[name] == other[name], name


def test_a_bucket_gives_what_a_folder_gives(tmp_path: Path, server: ObjectStore, photos: Path, segmenter: Any) -> None:
    options = {"endpoint_url": server.address}
    local = run_batch(segmenter, find_inputs(photos), tmp_path / "out")
    assert (local.count("done"), local.count("failed")) == (_IMAGES, 1)
    inputs = find_inputs("s3://photos/in", storage_options=options)
    target = open_store("s3://results/out", options)
    before = server.count()
    remote = run_batch(segmenter, inputs, target)
    requests = server.count() - before
    assert remote.counts == local.counts
    same(results(target), results(open_store(tmp_path / "out")))
    # One download for each image, and an upload for each of its four files; all else does not grow with every image.
    assert requests["PUT"] - 4 * _IMAGES < 20
    assert requests["GET"] - _IMAGES < 20
    assert requests["HEAD"] < 10
    before = server.count()
    again = run_batch(segmenter, inputs, target)
    assert again.counts == local.counts
    assert len(segmenter.seen) == 2 * _IMAGES, "nothing is done again"
    assert (server.count() - before).total() < 40
    same(results(target), results(open_store(tmp_path / "out")))


@pytest.mark.slow
def test_a_killed_run_goes_on_in_its_bucket(tmp_path: Path, server: ObjectStore, photos: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)

    def command(source: str, target: str) -> list[str]:
        return [sys.executable, "-P", str(script), source, target, server.address]

    subprocess.run(command(str(photos), str(tmp_path / "out")), check=True)
    killed = subprocess.Popen(command("s3://photos/in", "s3://results/out"))
    store = open_store("s3://results/out", {"endpoint_url": server.address})
    try:
        deadline = time.monotonic() + 60
        while len(list(store.list("masks"))) < _IMAGES * 3 // 4:
            assert killed.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        killed.kill()
        killed.wait()
    assert json.loads(store.read("run.json"))["state"] == "running"
    settled = sum(store.read(path).count(b'"settled"') for path in store.list(".sparsespec/journal"))
    before = server.count()
    subprocess.run(command("s3://photos/in", "s3://results/out"), check=True)
    same(results(store), results(open_store(tmp_path / "out")))
    record = json.loads(store.read("run.json"))
    assert record["state"] == "finished"
    assert len(record["images"]) == len({row["path"] for row in record["images"]}) == _IMAGES + 1
    # What had been noted was not done again.
    assert settled > 0
    assert (server.count() - before)["PUT"] < 4 * (_IMAGES - settled) + 20
