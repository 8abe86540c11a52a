from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparsespec.models import hub
from sparsespec.models.hub import DownloadError, OfflineError, fetch
from sparsespec.models.store import ChecksumError, StoreError
from tests.models.hub_server import HubServer

REPOSITORY, FILE = "someone/some-model", "onnx/model.onnx"
CONTENT = np.random.default_rng(0).bytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder / "model.onnx"


@pytest.fixture
def commit(server: HubServer) -> str:
    return server.publish(REPOSITORY, {FILE: CONTENT, "config.json": b"{}"})


def test_a_good_download(server: HubServer, commit: str, target: Path) -> None:
    fetched = fetch(REPOSITORY, FILE, target)
    assert target.read_bytes() == CONTENT
    assert fetched == hub.Fetched(target, commit, len(CONTENT), SHA256)
    assert [path.name for path in target.parent.iterdir()] == ["model.onnx"]
    assert [request.method for request in server.requests] == ["HEAD", "GET"]
    # The branch is asked for once; what is downloaded is the commit it stood for then.
    assert server.of("HEAD")[0].path == f"/{REPOSITORY}/resolve/main/{FILE}"
    assert server.of("GET")[0].path == f"/{REPOSITORY}/resolve/{commit}/{FILE}"
    assert server.of("GET")[0].headers["user-agent"].startswith("sparsespec/")
    assert "authorization" not in server.of("GET")[0].headers
    config = fetch(REPOSITORY, "config.json", target.with_name("config.json"), revision=commit)
    assert config.path.read_bytes() == b"{}"


def test_a_file_that_is_there_is_replaced(server: HubServer, commit: str, target: Path) -> None:
    target.write_bytes(b"old")
    fetch(REPOSITORY, FILE, target)
    assert target.read_bytes() == CONTENT


def test_cut_off_and_continued(server: HubServer, commit: str, target: Path) -> None:
    server.gets.append(("cut", 60_000))
    fetch(REPOSITORY, FILE, target)
    assert target.read_bytes() == CONTENT
    first, second = server.of("GET")
    assert first.range is None
    assert second.status == 206
    assert second.range is not None
    assert int(second.range.removeprefix("bytes=").rstrip("-")) > 50_000
    assert second.sent < 50_000


def test_given_up_and_continued_by_the_next_call(server: HubServer, commit: str, target: Path) -> None:
    server.gets.append(("cut", 60_000))
    server.down = True
    server.heads.append(None)
    with pytest.raises(DownloadError, match="status 503"):
        fetch(REPOSITORY, FILE, target)
    assert not target.exists()
    (part,) = target.parent.iterdir()
    assert part.name.endswith(".part")
    kept = part.read_bytes()
    assert CONTENT.startswith(kept)
    assert len(kept) > 50_000
    server.down = False
    server.requests.clear()
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert [request.range for request in server.of("GET")] == [f"bytes={len(kept)}-"]
    assert server.of("GET")[0].sent == len(CONTENT) - len(kept)
    assert list(target.parent.iterdir()) == [target]


def _leave_a_part(server: HubServer, target: Path) -> Path:
    """Let a download break off; give what it left."""
    server.gets.append(("cut", 60_000))
    server.heads.append(None)
    server.down = True
    with pytest.raises(DownloadError):
        fetch(REPOSITORY, FILE, target)
    server.down = False
    server.requests.clear()
    (part,) = target.parent.glob("*.part")
    return part


def test_a_server_without_ranges(server: HubServer, commit: str, target: Path) -> None:
    _leave_a_part(server, target)
    server.gets.extend([("whole",)] * 2)
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert target.read_bytes() == CONTENT
    assert server.of("GET")[0].status == 200


def test_a_range_that_is_refused(server: HubServer, commit: str, target: Path) -> None:
    _leave_a_part(server, target)
    server.gets.append(416)
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert [request.range is None for request in server.of("GET")] == [False, True]


def test_a_part_that_is_too_long(server: HubServer, commit: str, target: Path) -> None:
    part = _leave_a_part(server, target)
    part.write_bytes(CONTENT + b"more")
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert [request.range for request in server.of("GET")] == [None]


def test_a_whole_part_needs_no_download(server: HubServer, commit: str, target: Path) -> None:
    part = _leave_a_part(server, target)
    part.write_bytes(CONTENT)
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert server.of("GET") == []


def test_a_part_that_rotted(server: HubServer, commit: str, target: Path) -> None:
    part = _leave_a_part(server, target)
    part.write_bytes(bytes(len(part.read_bytes())))
    with pytest.raises(ChecksumError, match=rf"the server had announced {SHA256}.*Try again"):
        fetch(REPOSITORY, FILE, target)
    assert list(target.parent.iterdir()) == []
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256


def test_a_part_of_another_version_is_dropped(server: HubServer, commit: str, target: Path) -> None:
    _leave_a_part(server, target)
    server.publish(REPOSITORY, {FILE: CONTENT[::-1]})
    fetch(REPOSITORY, FILE, target)
    assert target.read_bytes() == CONTENT[::-1]
    assert [request.range for request in server.of("GET")] == [None]
    assert list(target.parent.iterdir()) == [target]


def test_a_pause_longer_than_the_timeout(
    server: HubServer, commit: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    server.gets.append(("pause", 60_000, 1.0))
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert server.of("GET")[1].range is not None


def test_slow_but_steady(server: HubServer, commit: str, target: Path) -> None:
    server.gets.append(("pause", 30_000, 0.3))
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert len(server.of("GET")) == 1


@pytest.mark.parametrize("status", [429, 500, 502])
def test_busy_and_then_good(server: HubServer, commit: str, target: Path, status: int) -> None:
    server.heads.append(status)
    server.gets.append(status)
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert [request.status for request in server.of("GET")] == [status, 200]


def test_busy_for_ever(server: HubServer, commit: str, target: Path) -> None:
    server.down = True
    with pytest.raises(DownloadError, match=rf"{server.url}/{REPOSITORY}/resolve/main/{FILE}.* status 503"):
        fetch(REPOSITORY, FILE, target)


def test_what_is_not_there(server: HubServer, commit: str, target: Path) -> None:
    with pytest.raises(DownloadError, match=r"no such repository .*\(status 401; no token is set in HF_TOKEN\)"):
        fetch("someone/nothing", FILE, target)
    with pytest.raises(DownloadError, match=r"resolve/main/other\.onnx: the server has no such file \(status 404\)"):
        fetch(REPOSITORY, "other.onnx", target)
    with pytest.raises(DownloadError, match=r"no such revision \(status 404\)"):
        fetch(REPOSITORY, FILE, target, revision="0" * 40)
    # None of these gets better by asking again.
    assert len(server.requests) == 3
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("status", [401, 403])
def test_not_allowed(
    server: HubServer, commit: str, target: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    server.heads.append(status)
    with pytest.raises(DownloadError, match=rf"\(status {status}; there is a token in HF_TOKEN\)") as failure:
        fetch(REPOSITORY, FILE, target)
    assert "hf_expired" not in str(failure.value)
    assert server.requests[0].headers["authorization"] == "Bearer hf_expired"
    assert len(server.requests) == 1


def test_access_to_be_granted(server: HubServer, commit: str, target: Path) -> None:
    server.gated.add(REPOSITORY)
    with pytest.raises(DownloadError, match="access has to be granted"):
        fetch(REPOSITORY, FILE, target)


@pytest.fixture
def cdn(server: HubServer) -> Iterator[HubServer]:
    server.cdn = HubServer()
    yield server.cdn
    server.cdn.close()


def test_redirected_elsewhere(
    server: HubServer, cdn: HubServer, commit: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    cdn.gets.append(("cut", 60_000))
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer hf_secret"}
    assert [request.status for request in cdn.of("GET")] == [200, 206]
    # The token is for the hub only.
    assert not any("authorization" in request.headers for request in cdn.requests)


def test_not_a_hub(server: HubServer, commit: str, target: Path) -> None:
    server.heads.append(("bare",))
    with pytest.raises(DownloadError, match=r"without the header .* isn't a Hugging Face hub.*HF_ENDPOINT"):
        fetch(REPOSITORY, FILE, target)


def test_nobody_answers(server: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/")
    with pytest.raises(DownloadError, match=rf"http://127\.0\.0\.1:{port}/{REPOSITORY}/.* can't be reached: Connect"):
        fetch(REPOSITORY, FILE, target)


@pytest.mark.parametrize("variable", ["SPARSESPEC_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(server: HubServer, target: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(OfflineError, match=f"{server.url}.*{variable}"):
        fetch(REPOSITORY, FILE, target)
    assert server.requests == []
    monkeypatch.setenv(variable, "0")
    assert not hub.is_offline()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pkl", "model.onnx.exe", "weights"])
def test_only_data_is_downloaded(server: HubServer, target: Path, file: str) -> None:
    with pytest.raises(ValueError, match=r"only \.onnx, \.safetensors, \.json"):
        fetch(REPOSITORY, file, target)
    assert server.requests == []


@pytest.mark.parametrize("endpoint", ["huggingface.co", "file:///srv", "http://"])
def test_an_endpoint_that_is_no_address(server: HubServer, target: Path, endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"endpoint must be an address such as https://huggingface.co"):
        fetch(REPOSITORY, FILE, target, endpoint=endpoint)


def test_the_endpoint_given_wins(server: HubServer, commit: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(REPOSITORY, FILE, target, endpoint=server.url + "/").sha256 == SHA256


def test_too_little_room(server: HubServer, commit: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(StoreError, match=r"0\.1 MB are needed in .*, which has 0\.0 MB left.*SPARSESPEC_HOME"):
        fetch(REPOSITORY, FILE, target)
    assert server.of("GET") == []


def test_the_disk_fills_up(server: HubServer, commit: str, target: Path) -> None:
    pytest.importorskip("resource", reason="limits on the size of files are POSIX")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
        "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 4096;"
        "from sparsespec.models.hub import fetch; from sparsespec.models.store import StoreError\n"
        f"try: fetch({REPOSITORY!r}, {FILE!r}, {str(target)!r})\n"
        "except StoreError as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "SPARSESPEC_HOME" in done.stderr
    assert not target.exists()
    # With room again, the rest is fetched.
    server.requests.clear()
    assert fetch(REPOSITORY, FILE, target).sha256 == SHA256
    (request,) = server.of("GET")
    assert request.range is not None
    assert request.sent <= len(CONTENT) - 36_000


def test_without_huggingface_hub(home: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"sparsespec\[hub\]"):
        fetch(REPOSITORY, FILE, target)


def test_nobody_is_counted() -> None:
    pytest.importorskip("huggingface_hub", reason="downloads need the extra 'hub'")
    code = (
        "from sparsespec.models.hub import _huggingface_hub; _huggingface_hub();"
        "from huggingface_hub import constants; raise SystemExit(not constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    assert subprocess.run([sys.executable, "-P", "-c", code], env=env, timeout=60, check=False).returncode == 0
