from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsespec.evaluation import benchmark
from sparsespec.evaluation.benchmark import backbone, data, gpu, jobs, machine, peers, plain, trunks
from sparsespec.evaluation.benchmark.measure import Contender, Outcome, Workers
from sparsespec.models.graph import write_graph
from sparsespec.models.vit import Vit
from sparsespec.position_table import PositionRule, resize_positions
from tests.reference import vit as reference
from tests.tiny_vit import random_vit

onnx = pytest.importorskip("onnx")

NAMES = ["queries", "keys", "values"]
GRID = (4, 6)


def feed_of(vit: Vit, grid: tuple[int, int] = GRID) -> dict[str, np.ndarray]:
    rows = resize_positions(vit.positions, grid, rule=vit.rule).reshape(-1, vit.embed_dim)
    shape = (1, 3, grid[0] * vit.patch_size, grid[1] * vit.patch_size)
    image = np.random.default_rng(3).standard_normal(shape, dtype=np.float32)
    return {"image": image, "positions": np.concatenate([vit.prefix, rows])[None].astype(np.float32)}


def run_graph(model: Any, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}
    return list(session.run(NAMES, {name: array for name, array in feed.items() if name in wanted}))


def truth(vit: Vit, feed: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return reference.forward(vit, feed["image"][0])[-1]


NETWORKS = [
    {},
    {"prefix": 0, "activation": "gelu_tanh"},
    {"prefix": 5, "activation": "swiglu", "biases": False},
    {"complete": True, "blocks": 2},
]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_plain_export_computes_the_network(network: dict[str, Any]) -> None:
    vit = random_vit(**network)
    feed = feed_of(vit)
    expected = truth(vit, feed)
    for resize in (False, True):
        model = plain.plain_graph(vit, resize=resize)
        onnx.checker.check_model(model)
        found = run_graph(model, feed)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[0], other, rtol=1e-4, atol=1e-4)


def test_the_plain_export_is_plain() -> None:
    kinds = [node.op_type for node in plain.plain_graph(random_vit(blocks=3), resize=True).graph.node]
    assert {domain.domain for domain in plain.plain_graph(random_vit(), resize=True).opset_import} == {""}
    # Two blocks with attention, each of three projections, two products of heads, one behind and two in the layers.
    assert kinds.count("MatMul") == 2 * (3 + 2 + 1 + 2) + 3
    assert kinds.count("Softmax") == 2
    assert kinds.count("Resize") == 1
    assert "Resize" not in [node.op_type for node in plain.plain_graph(random_vit(), resize=False).graph.node]


def test_a_table_that_no_resize_brings_to_size() -> None:
    vit = random_vit(rule=PositionRule(antialias=True))
    assert not plain.can_resize(vit.rule)
    with pytest.raises(ValueError, match="antialias"):
        plain.plain_graph(vit, resize=True)


@pytest.mark.parametrize("network", NETWORKS)
def test_pytorch_computes_the_network(network: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch comes with the extra 'peers'")
    vit = random_vit(**network)
    feed = feed_of(vit)
    plain.save_weights(vit, tmp_path / "weights.npz")
    for dtype, near in (("float32", 1e-4), ("bfloat16", 0.3)):
        found = plain.load_torch(tmp_path / "weights.npz", torch, dtype)(**feed)
        for one, other in zip(found, truth(vit, feed), strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one[0], other, rtol=near, atol=near)


def test_weights_go_to_a_file_without_pickles(tmp_path: Path) -> None:
    vit = random_vit(prefix=5)
    plain.save_weights(vit, tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as content:
        about = json.loads(str(content["about"]))
        first = vit.blocks[0].attention
        stacked = np.concatenate([part.weight.T for part in (first.query, first.key, first.value)])
        np.testing.assert_array_equal(content["0.qkv.weight"], stacked)
        assert "2.out.weight" not in content.files
    assert (about["heads"], about["prefix"], len(about["blocks"])) == (2, 5, 3)


def test_cosines() -> None:
    found = backbone.cosines(np.float32([[1, 0], [1, 1], [0, 2]]), np.float32([[2, 0], [1, 0], [0, -3]]))
    np.testing.assert_allclose(found, [1, 0.5**0.5, -1])


def test_the_small_feed_keeps_the_prefix() -> None:
    vit = random_vit(prefix=5)
    feed = feed_of(vit, (12, 10))
    small = trunks._small(feed, vit.patch_size, 5)
    assert small["image"].shape == (1, 3, 32, 32)
    assert small["positions"].shape == (1, 5 + 64, 16)
    np.testing.assert_array_equal(small["positions"][:, :5], feed["positions"][:, :5])


# The whole part, tiny


@pytest.fixture
def model(tmp_path: Path) -> str:
    written = write_graph(random_vit(channels=32), name="tiny", source="t", source_sha256="0" * 64)
    onnx.save(written, tmp_path / "tiny.onnx")
    return str(tmp_path / "tiny.onnx")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    smooth = np.cumsum(np.random.default_rng(0).normal(size=(50, 60, 3)), axis=0) * 9 + 128
    Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8)).save(folder / "a.png")
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run every contender here, once; the list says what ran."""
    ran: list[str] = []

    def race(self: Workers, contenders: Mapping[str, Contender], **options: Any) -> dict[str, Outcome]:
        outcomes = {}
        for name, contender in contenders.items():
            ran.append(contender.task)
            job = jobs.TASKS[contender.task](**json.loads(json.dumps(contender.inputs)))
            found = json.loads(json.dumps(job.describe(job.run()), allow_nan=False))
            seconds = 0.5 * (1 + len(outcomes))
            if "cpu_seconds" in found:
                found["cpu_seconds"] = seconds
            outcomes[name] = Outcome("done", seconds, found, [(seconds, found)], peak_bytes=3000, base_bytes=1000)
        return outcomes

    monkeypatch.setattr(Workers, "race", race)
    return ran


def hide_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.NEEDS, "torch", ("no_such_module_anywhere",))
    monkeypatch.setitem(peers.OPTIONAL, "openvino", ("no_such_module_anywhere", "pip install it"))


def rows_of(section: benchmark.Section, key: str) -> list[dict[str, Any]]:
    return section.to_dict()["tables"][key]["rows"]


@pytest.mark.parametrize("threads", [1, 2])
def test_backbone(
    in_process: list[str], model: str, photos: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    hide_peers(monkeypatch)
    options = benchmark.Options(quick=True, tokens=(64,), images=photos, model=model, threads=threads)
    (section,) = benchmark.run(("backbone",), options)
    assert [table.key for table in section.tables] == ["speed", "memory", "callers"]
    rows = [row for row in rows_of(section, "speed") if row["threads"] == threads]
    by_name = {row["who"]: row for row in rows}
    assert next(iter(by_name)) == backbone.FLOAT32
    for name in (backbone.TORCH, backbone.TORCH_HALF, backbone.OPENVINO, backbone.OPENVINO_INT8):
        assert (by_name[name]["status"], by_name[name]["ours"]) == ("missing", False)
        assert "pip install" in by_name[name]["remark"]
        assert by_name[name].get("ratio") is None
    own, small, exported = (by_name[name] for name in (backbone.FLOAT32, backbone.INT8, backbone.PLAIN))
    assert own["tokens"] == 64
    assert own["ratio"] == pytest.approx(exported["seconds"] / own["seconds"])
    assert small["ratio"] == pytest.approx(exported["seconds"] / small["seconds"])
    assert "ratio" not in exported
    assert own["growth_bytes"] == 2000
    # The same network in all of them, as far as 8 bits go.
    assert by_name[backbone.PLAIN]["cosine_least"] > 1 - 1e-5
    assert by_name[backbone.PLAIN_GIVEN]["cosine_least"] > 1 - 1e-5
    assert 0.95 < small["cosine_least"] <= small["cosine_mean"] < 1
    assert by_name[backbone.FLOAT16]["cosine_least"] > 0.999
    memory = rows_of(section, "memory")
    assert [row["who"] for row in memory][:2] == [backbone.INT8, backbone.FLOAT32]
    assert memory[0]["tokens"] == 64
    # A process of its own even here.
    assert memory[0]["peak_bytes"] is None or 1e7 < memory[0]["peak_bytes"] < 1e9
    callers = rows_of(section, "callers")
    assert [row.get("ratio") for row in callers] == ([] if threads == 1 else [1.0, 0.5])
    assert "backbone torch" not in in_process
    assert section.own_failures == []
    assert "weights are those of tiny" in section.to_text()


def test_without_a_plain_export_that_resizes(
    in_process: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_peers(monkeypatch)
    written = write_graph(
        random_vit(rule=PositionRule(offset=0.1)), name="tiny", source="t", source_sha256="0" * 64, precision="int8"
    )
    onnx.save(written, tmp_path / "offset.onnx")
    options = benchmark.Options(quick=True, tokens=(64,), images=photos, model=str(tmp_path / "offset.onnx"), threads=1)
    (section,) = benchmark.run(("backbone",), options)
    rows = {row["who"]: row for row in rows_of(section, "speed")}
    assert backbone.PLAIN not in rows
    assert rows[backbone.INT8]["ratio"] == pytest.approx(
        rows[backbone.PLAIN_GIVEN]["seconds"] / rows[backbone.INT8]["seconds"]
    )
    assert "which holds them in int8" in section.to_text()


def test_the_part_for_a_gpu(in_process: list[str], photos: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_peers(monkeypatch)
    monkeypatch.setattr(gpu, "_why_not", lambda: None)
    asked = []
    for name in ("backbone", "backbone plain"):

        def on_the_cpu(task: Any = jobs.TASKS[name], **inputs: Any) -> jobs.Job:
            asked.append((inputs.pop("provider"), inputs.pop("options", None)))
            job: jobs.Job = task(**inputs, **({"provider": "cpu"} if task is trunks.backbone else {}))
            return job

        monkeypatch.setitem(jobs.TASKS, name, on_the_cpu)
    options = benchmark.Options(quick=True, tokens=(64,), images=photos, model=model, threads=1)
    (section,) = benchmark.run(("gpu",), options)
    rows = {row["who"]: row for row in rows_of(section, "gpu")}
    ours, half, plain_export = (
        rows["sparsespec, float32"],
        rows["sparsespec, float16"],
        rows["ONNX Runtime, plain export"],
    )
    assert (ours["ours"], plain_export["ours"]) == (True, False)
    assert ours["ratio"] == pytest.approx(plain_export["seconds"] / ours["seconds"])
    assert half["ratio_cpu"] == pytest.approx(rows["sparsespec, int8, on the processor"]["seconds"] / half["seconds"])
    assert rows["sparsespec, float32, TF32"]["ratio"] == pytest.approx(
        rows["the same, TF32"]["seconds"] / rows["sparsespec, float32, TF32"]["seconds"]
    )
    assert "cosine_mean" not in ours
    assert 0.999 < half["cosine_least"] <= half["cosine_mean"] <= 1 + 1e-9
    assert (rows["PyTorch"]["status"], rows["PyTorch, float16"]["status"]) == ("missing", "missing")
    assert asked == [
        ("cuda", None),
        ("cuda", {"use_tf32": "1"}),
        ("cuda", None),
        ("cpu", None),
        (gpu._CUDA, {"use_tf32": "0"}),
        (gpu._CUDA, None),
    ]


def test_the_part_for_a_gpu_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    (section,) = benchmark.run(("gpu",), benchmark.Options(quick=True))
    assert "Not measured: this installation of ONNX Runtime has no CUDAExecutionProvider." in section.to_text()
    assert section.own_failures == []


def test_an_export_too_large_for_the_machine_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = random_vit()
    monkeypatch.setattr(machine, "describe", lambda threads: {"memory_gb": 8})
    outcome = backbone._too_large(vit, (160, 160))
    assert outcome is not None
    assert (outcome.status, outcome.remark) == ("not run", "its attention would take 11.5 of 8 GB")
    assert backbone._too_large(vit, (32, 32)) is None
    monkeypatch.setattr(machine, "describe", lambda threads: {"memory_gb": None})
    assert backbone._too_large(vit, (160, 160)) is None


def test_a_model_that_isnt_there(photos: Path) -> None:
    options = benchmark.Options(quick=True, tokens=(64,), images=photos, model="no-such-model")
    with pytest.raises(data.InputError, match="no-such-model"):
        benchmark.run(("backbone",), options)


def test_without_the_onnx_package(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.OPTIONAL, "onnx", ("no_such_module_anywhere", "pip install it"))
    (section,) = benchmark.run(("backbone",), benchmark.Options(quick=True, images=photos))
    assert "the onnx package is not installed: pip install it" in section.to_text()
    assert section.own_failures == []


@pytest.mark.slow
def test_backbone_for_real(model: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Their processes take seconds to start; what they do there is tested above.
    hide_peers(monkeypatch)
    options = benchmark.Options(quick=True, tokens=(64,), images=photos, model=model, threads=1)
    (section,) = benchmark.run(("backbone",), options)
    assert section.own_failures == []
    rows = {row["who"]: row for row in rows_of(section, "speed") if row["status"] != "missing"}
    assert set(rows) == {backbone.FLOAT32, backbone.INT8, backbone.FLOAT16, backbone.PLAIN, backbone.PLAIN_GIVEN}
    for row in rows.values():
        assert row["status"] == "done", row
        assert row["seconds"] > 0
        assert row["cpu_seconds"] > 0
    assert all(row["cosine_least"] > 0.95 for name, row in rows.items() if name != backbone.FLOAT32)
    memory = [row["peak_bytes"] for row in rows_of(section, "memory") if row["status"] == "done"]
    assert len(memory) == 2
    assert all(peak is None or peak > 1e7 for peak in memory)
