from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsespec.models import get_model, hub, store
from sparsespec.models.metadata import PREFIX, read_metadata_props
from tests.models.hub_server import HubServer

HUB_VARIABLES = ("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "SPARSESPEC_OFFLINE")


class _Hurried:
    """The module ``time``, without its pauses."""

    def sleep(self, seconds: float) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own, which isn't there yet, and no settings of the machine."""
    for name in HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home"
    monkeypatch.setenv("SPARSESPEC_HOME", str(folder))
    monkeypatch.setattr(store, "_compared", {})
    return folder


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine that everything downloads from, through the real huggingface_hub."""
    pytest.importorskip("huggingface_hub", reason="downloads need the extra 'hub'")
    from huggingface_hub import constants, file_download
    from huggingface_hub import utils as hub_utils

    monkeypatch.setenv("NO_PROXY", "*")
    # A part is written when it is this long: ten megabytes would make every test file one part.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    monkeypatch.setattr(file_download, "time", _Hurried())
    monkeypatch.setattr(hub, "_WAITS", (0.0, 0.0, 0.0))
    for name in ("close_session", "reset_sessions"):  # from 1.0 on, before 1.0
        getattr(hub_utils, name, lambda: None)()
    running = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    yield running
    running.close()


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def write_trunk(path: Path, **changes: object) -> Path:
    """Write the smallest file of our format: the description of the embedded model, changed, and an empty graph."""
    props = read_metadata_props(get_model("default").path)
    props |= {PREFIX + key: str(value) for key, value in changes.items()}
    entries = [_field(14, _field(1, k.encode()) + _field(2, v.encode())) for k, v in props.items()]
    path.write_bytes(bytes([8, 8]) + _field(7, b"") + b"".join(entries))
    return path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the build by one that writes a description only; the list says what was built from what."""
    from sparsespec.models import build
    from sparsespec.models.store import file_sha256

    built: list[dict[str, Any]] = []

    def build_model(source: Path, output: Path, **options: Any) -> None:
        built.append({"source": Path(source), **options})
        name = options.get("name") or "own"
        patch_size = 8 if "s8" in name else 16
        write_trunk(
            Path(output),
            name=name,
            precision=options["precision"],
            patch_size=patch_size,
            source_sha256=file_sha256(source),
        )

    monkeypatch.setattr(build, "build_model", build_model, raising=False)
    return built
