from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sparsespec.models import store as stores
from sparsespec.models.store import ChecksumError, Store, StoreError, disk_is_full, file_sha256, home, source_key

KEY = source_key("a/b", "main", "onnx/model.onnx")


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _put(store: Store, content: bytes, file: str = "m-float32.onnx") -> Path:
    path = store.model_path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Where


def test_home_is_what_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSESPEC_HOME", str(tmp_path / "x"))
    assert home() == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSESPEC_HOME", "here")
    assert home() == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("SPARSESPEC_HOME", "~/there")
    assert home() == tmp_path / "there"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "user/.cache/sparsespec"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/sparsespec"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "user/Library/Caches/sparsespec"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/sparsespec"),
        ("win32", {}, "user/AppData/Local/sparsespec"),
    ],
)
def test_home_is_in_the_users_cache(
    platform: str, variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SPARSESPEC_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "user")
    assert home() == tmp_path / expected


def test_a_relative_cache_directory_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSESPEC_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert home() == tmp_path / ".cache/sparsespec"


@pytest.mark.parametrize("found", ["nothing", "~"])
def test_a_user_without_a_home(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        if found == "nothing":
            raise RuntimeError("could not determine home directory")
        return Path(found)

    for name in ("SPARSESPEC_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(StoreError, match="set SPARSESPEC_HOME to a folder that can be written"):
        home()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/x", "a\\b", "C:x", ".hidden", "x.", "con", "NUL.onnx", "a\0b", "a\n", "x" * 200],
)
def test_names_that_lead_elsewhere(home: Path, name: str) -> None:
    store = Store()
    with pytest.raises(StoreError):
        store.model_path(name if name.endswith(".onnx") else f"{name}/m.onnx")
    with pytest.raises(StoreError, match=r"isn't allowed|isn't the name of a repository"):
        store.download_path(f"owner/{name}", "main", "model.onnx")
    with pytest.raises(StoreError, match="isn't allowed"):
        store.download_path("owner/name", name, "model.onnx")
    with pytest.raises(StoreError, match="isn't allowed"):
        store.download_path("owner/name", "main", f"{name}/model.onnx")
    with pytest.raises(StoreError, match="isn't allowed"), store.exclusive(name):
        pass
    assert not home.exists() or os.listdir(home) == ["locks"]


def test_where_things_lie(home: Path) -> None:
    store = Store()
    assert store.model_path("dino-vits16-int8.onnx") == home / "models/dino-vits16-int8.onnx"
    downloaded = store.download_path("Xenova/dino-vits16", "main", "onnx/model.onnx")
    assert downloaded == home / "downloads/Xenova--dino-vits16/main/onnx/model.onnx"
    assert not home.exists()  # nothing is made by asking
    with pytest.raises(StoreError, match=r"isn't the name of an \.onnx file"):
        store.model_path("m.pkl")
    with pytest.raises(StoreError, match="isn't allowed"):
        store.model_path("a/m.onnx")
    for repository in ("alone", "a/b/c", "", "/"):
        with pytest.raises(StoreError):
            store.download_path(repository, "main", "model.onnx")


def test_a_folder_that_cannot_be_made(home: Path) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_bytes(b"a file stands in the way")
    with pytest.raises(StoreError, match=r"cannot write .*SPARSESPEC_HOME.*models build FILE -o"):
        Store().make_folder(home / "models")


def test_a_folder_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(StoreError, match=r"cannot write .*home.*SPARSESPEC_HOME"):
        Store().make_folder(home)


# The record


def test_a_source_is_recorded_and_enforced(home: Path) -> None:
    store = Store()
    assert store.read_record() == {"sources": {}, "models": {}}
    entry = {"sha256": _sha(b"1"), "size": 1, "commit": "c" * 40, "repository": "a/b"}
    store.check_source(KEY, _sha(b"2"))  # nothing to compare with yet
    store.record_source(KEY, entry)
    assert Store().read_record()["sources"] == {KEY: entry}
    store.check_source(KEY, _sha(b"1"))
    changed = store.lock_file.stat().st_mtime_ns
    store.record_source(KEY, entry)
    assert store.lock_file.stat().st_mtime_ns == changed
    with pytest.raises(ChecksumError, match=f"{_sha(b'2')}.*{_sha(b'1')}.*--forget"):
        store.record_source(KEY, {**entry, "sha256": _sha(b"2")})
    assert sorted(os.listdir(home)) == ["locks", "models.lock"]


def test_a_model_is_recorded_and_enforced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    path = store.model_path("m-float32.onnx")
    built = _put(store, b"model", "tmp-1.onnx")
    store.keep_model(path.name, built, {"name": "m"})
    assert not built.exists()
    assert store.check_model(path.name) == path
    assert store.check_model(path.name, again=True) == path
    path.write_bytes(b"modem")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ChecksumError, match=rf"{_sha(b'modem')}.*{_sha(b'model')}.*pull m --force"):
        store.check_model(path.name)
    path.write_bytes(b"shorter than it was, or longer")
    with pytest.raises(ChecksumError, match="30 bytes, but 5 when it was built"):
        store.check_model(path.name)


def test_the_sha256_is_computed_once_in_a_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    path = _put(store, b"model")
    computed = []

    def count(path: Path) -> str:
        computed.append(path)
        return _sha(path.read_bytes())

    monkeypatch.setattr(stores, "file_sha256", count)
    for _ in range(3):
        store.check_model(path.name)
    assert computed == [path]
    os.utime(path, ns=(1, 1))
    store.check_model(path.name)
    assert len(computed) == 2


def test_a_model_that_was_copied_here_is_recorded(home: Path) -> None:
    store = Store()
    path = _put(store, b"model")
    store.check_model(path.name)
    assert store.read_record()["models"] == {path.name: {"sha256": _sha(b"model"), "size": 5}}
    path.write_bytes(b"modem")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ChecksumError, match="delete it"):
        store.check_model(path.name)


def test_a_model_is_read_where_nothing_can_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    path = _put(store, b"model")

    def refuse(self: Store, folder: Path) -> None:
        raise self.unwritable(folder, PermissionError(13, "Permission denied"))

    monkeypatch.setattr(Store, "make_folder", refuse)
    assert store.check_model(path.name) == path
    with pytest.raises(StoreError, match="Permission denied"):
        store.update_record(lambda record: None)


def test_a_model_that_is_not_there(home: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*m\.onnx"):
        Store().check_model("m.onnx")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 2, "sources": {}, "models": {}}',
        b'{"version": 1, "models": {}}',
        b'{"version": 1, "sources": [], "models": {}}',
        b'{"version": 1, "sources": {}, "models": {"m.onnx": {"size": 5, "sha256": "short"}}}',
        b'{"version": 1, "sources": {}, "models": {"m.onnx": 5}}',
    ],
)
def test_a_damaged_record(home: Path, content: bytes) -> None:
    store = Store()
    home.mkdir()
    store.lock_file.write_bytes(content)
    _put(store, b"model")
    for call in (
        store.read_record,
        lambda: store.check_model("m-float32.onnx"),
        lambda: store.update_record(lambda record: None),
    ):
        with pytest.raises(StoreError, match=r"models\.lock.* is damaged .*restore it, or delete it"):
            call()
    assert store.lock_file.read_bytes() == content


def test_the_record_is_written_whole_or_not_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.record_source(KEY, {"sha256": _sha(b"1"), "size": 1})
    before = store.lock_file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device; make room"):
        store.record_source("other", {"sha256": _sha(b"1"), "size": 1})
    assert store.lock_file.read_bytes() == before
    assert sorted(os.listdir(home)) == ["locks", "models.lock"]


def test_which_errors_mean_a_full_disk() -> None:
    assert disk_is_full(OSError(28, "x"))
    assert not disk_is_full(OSError(13, "x"))
    assert not disk_is_full(OSError("x"))
    assert not disk_is_full(ValueError(28))


# Several at once


def test_threads_take_turns(home: Path) -> None:
    store = Store()
    inside: list[str] = []

    def work() -> None:
        with store.exclusive("m"):
            inside.append("in")
            time.sleep(0.02)
            inside.append("out")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == ["in", "out"] * 4


def test_different_names_do_not_wait(home: Path) -> None:
    store = Store()
    with store.exclusive("one"), store.exclusive("other"):
        assert sorted(os.listdir(home / "locks")) == ["one.lock", "other.lock"]


def test_a_lock_ends_with_its_holder(home: Path) -> None:
    store = Store()
    with pytest.raises(ZeroDivisionError), store.exclusive("m"):
        _ = 1 / 0
    code = "import os; from sparsespec.models.store import Store; Store().exclusive('m').__enter__(); os._exit(3)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60, check=False).returncode == 3
    with store.exclusive("m"):
        pass


def test_processes_that_record_at_once(home: Path) -> None:
    code = (
        "import sys; from sparsespec.models.store import Store; store = Store()\n"
        "for i in range(10): store.record_source(f'{sys.argv[1]}-{i}', {'sha256': 'a' * 64, 'size': i})"
    )
    running = [subprocess.Popen([sys.executable, "-P", "-c", code, name]) for name in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(Store().read_record()["sources"]) == 20
    assert json.loads(Store().lock_file.read_bytes())["version"] == 1


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == _sha(b"abc")


def test_import_is_light() -> None:
    code = (
        "import sys; from sparsespec.models import store, hub, pull;"
        "sys.exit(', '.join({'huggingface_hub', 'onnx', 'onnxruntime', 'requests', 'httpx'} & set(sys.modules)) or 0)"
    )
    done: Any = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
