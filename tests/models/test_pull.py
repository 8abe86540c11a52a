from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.models import UnknownModelError, get_model, read_trunk_metadata, registry, resolve
from sparsespec.models import build as building
from sparsespec.models.hub import DownloadError, OfflineError
from sparsespec.models.pull import pull, remove, verify
from sparsespec.models.registry import SourceFile
from sparsespec.models.store import ChecksumError, Store, StoreError, source_key
from sparsespec.position_table import PositionRule
from tests import tiny_models
from tests.models.conftest import write_trunk
from tests.models.hub_server import HubServer

NAME, REPOSITORY, FILE = "dino-vits16", "Xenova/dino-vits16", "onnx/model.onnx"
KEY = source_key(REPOSITORY, "main", FILE)
WEIGHTS = b"published weights " * 1000
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
STYLE = "transformers-registers"


@pytest.fixture
def commit(server: HubServer, builds: list[dict[str, Any]]) -> str:
    return server.publish(REPOSITORY, {FILE: WEIGHTS})


def _files(home: Path) -> list[str]:
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())


def test_a_pull(server: HubServer, commit: str, home: Path, builds: list[dict[str, Any]]) -> None:
    path = pull(NAME)
    assert path == get_model(NAME).path == home / "models/dino-vits16-float32.onnx"
    (build,) = builds
    assert build == {
        "source": home / "downloads/Xenova--dino-vits16/main/onnx/model.onnx",
        "precision": "float32",
        "name": NAME,
        "rule": get_model(NAME).rule,
        "origin": f"{REPOSITORY}@{commit}, {FILE}",
    }
    # The download is gone, its record stays.
    assert _files(home) == ["locks/dino-vits16.lock", "locks/models.lock.lock", "models.lock", f"models/{path.name}"]
    assert not (home / "downloads/Xenova--dino-vits16").exists()
    record = json.loads((home / "models.lock").read_bytes())
    assert record["sources"] == {
        KEY: {
            "repository": REPOSITORY,
            "revision": "main",
            "commit": commit,
            "file": FILE,
            "sha256": SHA256,
            "size": len(WEIGHTS),
        }
    }
    content = path.read_bytes()
    assert record["models"] == {
        path.name: {
            "name": NAME,
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "sources": [KEY],
        }
    }
    server.requests.clear()
    assert pull(NAME) == path
    assert server.requests == []


def test_each_precision_is_a_file(server: HubServer, commit: str, home: Path, builds: list[dict[str, Any]]) -> None:
    first = pull(NAME, precision="int8", keep_download=True)
    assert (home / "downloads/Xenova--dino-vits16/main/onnx/model.onnx").read_bytes() == WEIGHTS
    second = pull("dino_vits16_float16")
    assert [first.name, second.name] == ["dino-vits16-int8.onnx", "dino-vits16-float16.onnx"]
    assert [(build["precision"], build["name"]) for build in builds] == [
        ("int8", "dino-vits16-int8"),
        ("float16", "dino-vits16-float16"),
    ]
    # The second was built from what the first had kept, and that still isn't its own to delete.
    assert len(server.of("GET")) == 1
    assert (home / "downloads/Xenova--dino-vits16/main/onnx/model.onnx").exists()


def test_the_branch_stands_for_the_first_commit(server: HubServer, commit: str, home: Path) -> None:
    pull(NAME)
    server.publish(REPOSITORY, {FILE: b"newer weights"})
    pull(NAME, precision="int8")
    assert {request.path.split("/")[4] for request in server.requests} == {"main", commit}
    assert server.requests[-1].path == f"/{REPOSITORY}/resolve/{commit}/{FILE}"
    assert Store().read_record()["sources"][KEY]["sha256"] == SHA256


def test_content_that_changed_under_its_commit(server: HubServer, commit: str, home: Path) -> None:
    path = pull(NAME)
    server.repositories[REPOSITORY][commit][FILE] = b"other weights"
    other = hashlib.sha256(b"other weights").hexdigest()
    for _ in range(2):  # what was refused isn't taken from the disk the second time
        with pytest.raises(ChecksumError, match=rf"{other}.*{SHA256}.*remove NAME --forget"):
            pull(NAME, precision="int8")
    with pytest.raises(ChecksumError):
        pull(NAME, force=True)
    assert pull(NAME) == path  # what was built before still runs
    remove(NAME, forget=True)
    pull(NAME)
    assert Store().read_record()["sources"][KEY]["sha256"] == other


def _pinned(monkeypatch: pytest.MonkeyPatch, commit: str, sha256: str, *files: str, **changes: Any) -> None:
    entry = replace(
        get_model(NAME),
        name="pinned",
        file="pinned-float32.onnx",
        revision=commit,
        files=(SourceFile(FILE, len(WEIGHTS), sha256), *map(SourceFile, files)),
        **changes,
    )
    monkeypatch.setattr(registry, "_MODELS", (*registry._MODELS, entry))


def test_a_pinned_file(server: HubServer, commit: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish(REPOSITORY, {FILE: b"newer weights"})
    _pinned(monkeypatch, commit, SHA256)
    assert pull("pinned").is_file()
    assert {request.path.split("/")[4] for request in server.requests} == {commit}


def test_a_pinned_file_that_is_another(
    server: HubServer, commit: str, home: Path, monkeypatch: pytest.MonkeyPatch, builds: list[dict[str, Any]]
) -> None:
    _pinned(monkeypatch, commit, "0" * 64)
    with pytest.raises(ChecksumError, match=rf"SHA-256 is {SHA256}, expected {'0' * 64}.*models build FILE"):
        pull("pinned")
    assert builds == []
    assert Store().read_record() == {"sources": {}, "models": {}}
    assert not [file for file in _files(home) if file.startswith(("models/", "downloads/"))]


@pytest.mark.parametrize("file", ["../../../outside.json", "/outside.json", "a/../../b.json", "..\\outside.json"])
def test_files_that_lead_elsewhere(
    server: HubServer, commit: str, home: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    _pinned(monkeypatch, commit, SHA256, file)
    with pytest.raises(StoreError, match="isn't allowed as the name of a file"):
        pull("pinned")
    assert not list(home.parent.rglob("outside*"))
    assert not any("outside" in request.path for request in server.requests)


def test_no_pickle(server: HubServer, commit: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pinned(monkeypatch, commit, SHA256, "pytorch_model.bin")
    with pytest.raises(ValueError, match="isn't downloaded"):
        pull("pinned")


def test_what_was_built_is_not_the_model(
    server: HubServer, commit: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pinned(monkeypatch, commit, SHA256, patch_size=8, dim=768)
    with pytest.raises(
        StoreError, match=r"isn't the network of model 'pinned': patch size 16, .*8; channels 384, .*768"
    ):
        pull("pinned")
    assert not list((home / "models").iterdir())
    # The download needn't be made again.
    assert (home / f"downloads/Xenova--dino-vits16/{commit}/onnx/model.onnx").exists()


def test_a_build_that_fails(server: HubServer, commit: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec.models.vit import UnrecognisedModelError

    def fail(source: Path, output: Path, **_: Any) -> None:
        output.write_bytes(b"half")
        raise UnrecognisedModelError("the last block was not found")

    with monkeypatch.context() as patch:
        patch.setattr(building, "build_model", fail)
        with pytest.raises(UnrecognisedModelError, match="the last block"):
            pull(NAME)
    assert not list((home / "models").iterdir())
    server.requests.clear()
    pull(NAME)
    assert server.of("GET") == []


def test_the_disk_fills_up_while_building(
    server: HubServer, commit: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, output: Path, **_: Any) -> None:
        output.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(building, "build_model", fail)
    with pytest.raises(StoreError, match=r"dino-vits16-float32\.onnx.*make room"):
        pull(NAME)
    assert not list((home / "models").iterdir())


# The real build


@pytest.fixture
def tiny(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Publish a tiny DINOv2 with registers, as facebook does, and register it."""
    pytest.importorskip("onnx", reason="building a model needs the extra 'build'")
    numpy = pytest.importorskip("safetensors.numpy", reason="reading weights needs the extra 'hub'")
    numpy.save_file(tiny_models.tensors(STYLE), tmp_path / "published.safetensors")
    files = {
        "model.safetensors": (tmp_path / "published.safetensors").read_bytes(),
        "config.json": json.dumps(tiny_models.config(STYLE)).encode(),
    }
    entry = replace(
        get_model("dinov2-vits14-reg"),
        name="tiny",
        file="tiny-float32.onnx",
        patch_size=tiny_models.PATCH,
        dim=16,
        heads=tiny_models.HEADS,
        blocks=2,
        registers=3,
        repository="someone/tiny",
        revision=server.publish("someone/tiny", files),
        files=tuple(SourceFile(name, len(body), hashlib.sha256(body).hexdigest()) for name, body in files.items()),
    )
    monkeypatch.setattr(registry, "_MODELS", (*registry._MODELS, entry))
    return entry.name


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_from_the_hub_to_the_keys(tiny: str, server: HubServer, home: Path, precision: str) -> None:
    import onnxruntime

    from sparsespec.position_table import resize_positions

    server.gets.append(("cut", 10_000))
    path = resolve(f"{tiny}_{precision}")
    assert path == home / f"models/tiny-{precision}.onnx"
    metadata = read_trunk_metadata(path)
    assert metadata.name == ("tiny" if precision == "float32" else "tiny-int8")
    assert metadata.rule == PositionRule(antialias=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for grid in tiny_models.GRIDS:
        table = resize_positions(metadata.positions, grid, rule=metadata.rule).reshape(grid[0] * grid[1], -1)
        feed = {"image": tiny_models.image(grid)[None], "positions": np.concatenate([metadata.prefix, table])[None]}
        (keys,) = session.run(["keys"], feed)
        expected = tiny_models.expected(STYLE, grid)[-1][1].astype(float)
        error = np.abs(keys[0] - expected).max() / np.abs(expected).max()
        # The golden numbers are in half precision.
        assert error < {"float32": 1e-3, "int8": 0.1}[precision]
    assert verify([f"{tiny}-{precision}"])[0].problem is None


def test_a_file_of_weights_in_place_of_a_name(tiny: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.config(STYLE)))
    path = resolve(tmp_path / "published.safetensors")
    assert path.parent == home / "models"
    pulled = read_trunk_metadata(resolve(tiny))
    mine = read_trunk_metadata(path)
    np.testing.assert_array_equal(mine.positions, pulled.positions)
    assert mine.source_sha256 == pulled.source_sha256


def test_a_name_built_to_order(tiny: str, home: Path, tmp_path: Path) -> None:
    path = building.build_model(f"{tiny}-int8", tmp_path / "out.onnx", precision="float16", blocks=(0, 1))
    metadata = read_trunk_metadata(path)
    assert (metadata.name, metadata.precision, metadata.output_blocks) == ("tiny-float16", "float16", (0, 1))
    assert metadata.source == f"someone/tiny@{get_model(tiny).revision}, model.safetensors"
    assert metadata.rule == PositionRule(antialias=True)
    # Checked and recorded as by a pull, but nothing is kept.
    record = json.loads((home / "models.lock").read_bytes())
    assert {entry["file"] for entry in record["sources"].values()} == {"model.safetensors", "config.json"}
    assert record["models"] == {}
    assert not list(home.rglob("*.safetensors"))
    assert read_trunk_metadata(resolve(tiny)).source_sha256 == metadata.source_sha256


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_pulled_or_built_by_name_it_is_the_same_file(tiny: str, home: Path, tmp_path: Path, precision: str) -> None:
    built = building.build_model(tiny, tmp_path / "out.onnx", precision=precision)
    assert pull(tiny, precision=precision).read_bytes() == built.read_bytes()


def test_a_published_file_that_is_no_network(
    tiny: str, server: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without pins, as for the first pull of DINO.
    entry = replace(get_model(tiny), files=(SourceFile("model.safetensors"),), revision="main")
    monkeypatch.setattr(registry, "_MODELS", (entry,))
    server.publish("someone/tiny", {"model.safetensors": b"not weights"})
    with pytest.raises(building.BuildError):
        resolve(tiny)
    # What couldn't be built is not recorded: a good file may follow.
    assert Store().read_record() == {"sources": {}, "models": {}}
    assert not list((home / "models").iterdir())


# Without network


def test_what_to_copy_where(
    server: HubServer, home: Path, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.close()
    with pytest.raises(DownloadError) as failure:
        pull("dino-vits8-int8")
    said = " ".join(str(failure.value).split())
    place = home / "downloads/Xenova--dino-vits8/main/onnx/model.onnx"
    assert f"{server.url}/Xenova/dino-vits8/resolve/main/onnx/model.onnx can't be reached" in said
    assert f"copy https://huggingface.co/Xenova/dino-vits8/resolve/main/onnx/model.onnx to {str(place)!r}" in said
    assert "and call 'sparsespec models pull dino-vits8-int8 --offline'" in said
    assert "'sparsespec models pull dino-vits8-int8 --from FILE'" in said
    # Both do work.
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(WEIGHTS)
    monkeypatch.setenv("SPARSESPEC_OFFLINE", "1")
    path = pull("dino-vits8-int8")
    assert path.is_file()
    assert place.exists()  # who put it there may want it
    assert Store().read_record()["sources"][source_key("Xenova/dino-vits8", "main", FILE)]["commit"] == "unknown"
    elsewhere = home.parent / "fetched.onnx"
    elsewhere.write_bytes(WEIGHTS)
    assert pull("dino-vits8-float16", source=elsewhere).is_file()
    assert [build["source"] for build in builds] == [place, elsewhere]
    assert elsewhere.exists()


@pytest.mark.parametrize("how", ["argument", "SPARSESPEC_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(server: HubServer, commit: str, home: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how != "argument":
        monkeypatch.setenv(how, "1")
    said = (
        rf"which {'the option .offline.' if how == 'argument' else how} rules out\.\nWithout network, copy\n  https://"
    )
    with pytest.raises(OfflineError, match=said):
        pull(NAME, offline=True if how == "argument" else None)
    assert server.requests == []
    monkeypatch.delenv(how, raising=False)
    path = pull(NAME)
    assert pull(NAME, offline=True) == path


def test_a_file_of_weights_with_its_configuration(server: HubServer, home: Path, builds: list[dict[str, Any]]) -> None:
    with pytest.raises(DownloadError) as failure:
        pull("dinov2-vits14")
    folder = home / "downloads/facebook--dinov2-small/ed25f3a31f01632728cabb09d1542f84ab7b0056"
    for file in ("model.safetensors", "config.json"):
        assert f"{file}\n  to {str(folder / file)!r}" in str(failure.value)
    # Pinned: not any file will do.
    other = home.parent / "model.safetensors"
    other.write_bytes(WEIGHTS)
    with pytest.raises(ChecksumError, match="expected ae1e99fcefd534ed"):
        pull("dinov2-vits14", source=other)
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*absent' to build 'dino-vits16' from"):
        pull(NAME, source=home / "absent")
    assert builds == []


def test_a_mirror(server: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pull(NAME, endpoint=server.url).is_file()


@pytest.mark.parametrize("package", ["huggingface_hub", "onnx", "safetensors"])
def test_missing_packages_are_named_before_the_download(
    server: HubServer, builds: list[dict[str, Any]], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'sparsespec\[hub\]'"):
        pull("dinov2-vits14")
    assert server.requests == []


# Several at once


def test_two_processes_pull_the_same(server: HubServer, home: Path, tmp_path: Path) -> None:
    commit = server.publish(REPOSITORY, {FILE: WEIGHTS})
    template = write_trunk(tmp_path / "template.onnx", name=NAME, precision="float32", patch_size=16)
    code = (
        "import shutil, sys, time; from sparsespec.models import build, pull\n"
        "def build_model(source, output, **_):\n"
        "    time.sleep(0.3); open(sys.argv[2], 'a').write('built ')\n"
        f"    shutil.copy({str(template)!r}, output)\n"
        "build.build_model = build_model\n"
        "while not __import__('os').path.exists(sys.argv[1]): time.sleep(0.01)\n"
        f"print(pull.pull({NAME!r}))"
    )
    start, log = tmp_path / "start", tmp_path / "log"
    command = [sys.executable, "-P", "-c", code, str(start), str(log)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    start.touch()
    said = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said == [str(home / "models/dino-vits16-float32.onnx")] * 3
    assert len(server.of("GET")) == 1
    assert log.read_text() == "built "
    assert Store().read_record()["sources"][KEY]["commit"] == commit


# Verify and remove


def test_verify(server: HubServer, commit: str, home: Path) -> None:
    assert [(finding.name, finding.problem) for finding in verify()] == [("dinov2-vits14-int8", None)]
    path = pull(NAME, keep_download=True)
    pull(NAME, precision="int8")
    found = verify()
    assert [finding.name for finding in found] == ["dinov2-vits14-int8", NAME, "dino-vits16-int8", KEY]
    assert [finding.problem for finding in found] == [None] * 4
    assert found[1].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    # Size and time of change stay as they were: only the checksum tells.
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert pull(NAME) == path
    found = verify()
    assert [finding.failed for finding in found] == [False, True, False, False]
    assert found[1].problem is not None
    assert found[1].problem.endswith("'sparsespec models pull dino-vits16 --force'")
    assert [finding.name for finding in verify(["dino-vits16-int8"])] == ["dino-vits16-int8"]
    pull(NAME, force=True)
    assert not any(finding.failed for finding in verify())
    with pytest.raises(UnknownModelError):
        verify(["nothing"])


def test_verify_sees_a_damaged_download_and_an_unknown_file(server: HubServer, commit: str, home: Path) -> None:
    pull(NAME, keep_download=True)
    (home / "downloads/Xenova--dino-vits16/main/onnx/model.onnx").write_bytes(b"damaged")
    (home / "models/copied.onnx").write_bytes(b"x")
    found = {finding.name: finding for finding in verify()}
    assert found[KEY].failed
    assert not found["copied"].failed
    assert found["copied"].problem is not None
    assert "isn't in the record yet" in found["copied"].problem


def test_a_damaged_model_is_not_used(server: HubServer, commit: str, home: Path) -> None:
    path = pull(NAME)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ChecksumError, match=r"pull dino-vits16 --force"):
        pull(NAME)
    assert pull(NAME, force=True) == path
    assert pull(NAME) == path


def test_remove(server: HubServer, commit: str, home: Path) -> None:
    path = pull(NAME, keep_download=True)
    other = pull(NAME, precision="int8")
    download = home / "downloads/Xenova--dino-vits16/main/onnx/model.onnx"
    assert remove(NAME) == [path, download]
    assert not path.exists()
    assert other.exists()
    assert list((home / "downloads").iterdir()) == []
    record = Store().read_record()
    assert set(record["sources"]) == {KEY}
    assert set(record["models"]) == {other.name}
    assert remove("dino-vits16-int8", forget=True) == [other]
    assert Store().read_record() == {"sources": {}, "models": {}}
    assert remove(NAME) == []
    with pytest.raises(ValueError, match="comes with the package"):
        remove("default")


def test_the_embedded_model_is_never_pulled(server: HubServer, home: Path) -> None:
    assert pull("default") == pull("dinov2-vits14", precision="int8") == get_model("default").path
    with pytest.raises(ValueError, match="isn't made from a file"):
        pull("default", source="x")
    assert server.requests == []
    assert not home.exists()


def test_verify_names_a_file_without_a_record(server: HubServer, commit: str, home: Path) -> None:
    pull("dino-vits16-int8")
    (home / "models.lock").unlink()
    [finding] = verify(["dino-vits16-int8"])
    assert "isn't in the record yet" in str(finding.problem)
    assert not finding.failed
    assert verify(["dino-vits16"]) == []
