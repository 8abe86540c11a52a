from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sparsespec import _openvino, _sessions
from sparsespec.backbone import Backbone, ProviderError
from sparsespec.providers import PROVIDERS
from tests.tiny_vit import random_vit

CPU, CUDA, TENSORRT, COREML, DIRECTML, OPENVINO = (
    f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt", "CoreML", "Dml", "OpenVINO")
)
NO_OPENVINO = importlib.util.find_spec("openvino") is None
NO_ONNX = importlib.util.find_spec("onnx") is None


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, 3), np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the path of a small model of random weights in some precision."""
    pytest.importorskip("onnx", reason="writing a model needs the extra 'build'")
    from sparsespec.models.graph import write_graph

    folder = tmp_path_factory.mktemp("tiny")

    def path(precision: str = "float32") -> Path:
        file = folder / f"{precision}.onnx"
        if not file.exists():
            vit = random_vit(channels=32, heads=2, prefix=2)
            layers = [f"block.{i}.{layer}" for i in range(3) for layer in ("qkv", "out", "fc1", "fc2")]
            ranges = dict.fromkeys(layers, (-4.0, 4.0)) if precision == "int8-static" else None
            described = {"name": "tiny", "source": "nowhere", "source_sha256": "ab" * 32}
            model = write_graph(vit, precision=precision, ranges=ranges, **described)
            file.write_bytes(model.SerializeToString())
        return file

    return path


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test hear what is said once."""
    monkeypatch.setattr(_sessions, "_said", set())


class Machine:
    """Stands in for ONNX Runtime's session: says which providers start, and remembers what was asked for."""

    def __init__(self) -> None:
        self.starts: set[str] = {CPU}
        self.raises: dict[str, str] = {}
        self.printed = ""
        self.nodes: dict[str, int] | None = None
        self.asked: list[list[Any]] = []
        self.models: list[str | bytes] = []
        self.options: Any = None

    def open(self, model: str | bytes, options: Any, providers: list[Any], enable_fallback: int = 1) -> Machine:
        first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        assert enable_fallback == (first == CPU), "an accelerator must not be replaced in silence"
        self.asked.append(providers)
        self.models.append(model)
        self.options = options
        print(self.printed, end="")
        if first in self.raises:
            raise RuntimeError(self.raises[first])
        self.used = [name for name in (p if isinstance(p, str) else p[0] for p in providers) if name in self.starts]
        return self

    def get_providers(self) -> list[str]:
        return self.used

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = self.nodes if self.nodes is not None else {self.used[0]: 9}
        return [types.SimpleNamespace(ep_name=k, get_nodes=lambda n=n: [None] * n) for k, n in nodes.items()]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretend that ONNX Runtime has some providers, on some platform."""
    found = Machine()

    def pretend(*available: str, platform: str = "linux") -> Machine:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*available, CPU])
        session = types.SimpleNamespace(get_provider_graph_assignment_info=None)
        stand_in = type("InferenceSession", (), {"__new__": lambda _, *a, **k: found.open(*a, **k), **vars(session)})
        monkeypatch.setattr(onnxruntime, "InferenceSession", stand_in)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load something"), raising=False)
        monkeypatch.setattr(_sessions, "lacking_driver", lambda: None)
        monkeypatch.setattr(_sessions, "installed_runtimes", lambda: {"onnxruntime": "1.20"})
        monkeypatch.setattr(sys, "platform", platform)
        found.starts |= set(available)
        return found

    return pretend


def names(asked: list[Any]) -> list[str]:
    return [each if isinstance(each, str) else each[0] for each in asked]


# The automatic choice


@pytest.mark.parametrize(
    ("platform", "available", "expected"),
    [
        ("linux", [], [CPU]),
        ("linux", [TENSORRT, CUDA], [CUDA, CPU]),
        ("linux", [TENSORRT], [CPU]),
        ("linux", [OPENVINO, "ROCMExecutionProvider"], [CPU]),
        ("darwin", [COREML], [COREML, CPU]),
        ("win32", [DIRECTML], [DIRECTML, CPU]),
        ("win32", [DIRECTML, CUDA], [CUDA, CPU]),
        ("linux", [COREML], [CPU]),
    ],
)
def test_automatic_choice(
    machine: Any, tiny: Any, caplog: pytest.LogCaptureFixture, platform: str, available: list[str], expected: list[str]
) -> None:
    found = machine(*available, platform=platform)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert Backbone(tiny(), threads=2).providers == tuple(expected)
        assert names(found.asked[-1]) == expected
    assert found.options.intra_op_num_threads == 2
    assert found.options.inter_op_num_threads == 1
    assert found.options.enable_mem_pattern is False
    said = [record.getMessage() for record in caplog.records if "auto" in record.getMessage()]
    (line,) = said
    chosen = next(name for name, each in PROVIDERS.items() if each.execution_provider == expected[0])
    assert line.startswith(f"provider auto: {chosen} of ")


@pytest.mark.parametrize("raised", [True, False])
def test_automatic_choice_falls_back_and_says_so(
    machine: Any, tiny: Any, caplog: pytest.LogCaptureFixture, raised: bool
) -> None:
    found = machine(CUDA)
    if raised:
        found.raises[CUDA] = "CUDA failure 100: no CUDA-capable device is detected"
    else:
        found.starts.discard(CUDA)
    for _ in range(2):
        assert Backbone(tiny()).providers == (CPU,)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(
        "cuda is installed but can't be used, trying the next: the provider cuda could not be started"
    )
    assert ("no CUDA-capable device" in line) == raised


def test_core_ml_that_does_not_start_is_no_warning(machine: Any, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine(COREML, platform="darwin").raises[COREML] = "no such luck"
    caplog.set_level(logging.INFO)
    assert Backbone(tiny()).providers == (CPU,)
    assert [r.levelno for r in caplog.records if "no such luck" in r.getMessage()] == [logging.INFO]


def test_automatic_choice_warns_of_overwritten_files(
    machine: Any, tiny: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(_sessions, "installed_runtimes", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    monkeypatch.setattr(_sessions, "runtime_conflict", lambda: "both are there; keep one")
    assert Backbone(tiny()).providers == (CPU,)
    assert [record.getMessage() for record in caplog.records] == ["both are there; keep one"]


def test_nothing_at_all(machine: Any, tiny: Any) -> None:
    machine().raises[CPU] = "broken"
    with pytest.raises(RuntimeError, match="broken"):
        _ = Backbone(tiny()).providers


# Asked for


def test_asked_for_and_there(machine: Any, tiny: Any) -> None:
    found = machine(CUDA)
    net = Backbone(
        tiny(), provider="cuda", provider_options={"device_id": 1, "arena_extend_strategy": "kNextPowerOfTwo"}
    )
    assert net.providers == (CUDA, CPU)
    (name, options), last = found.asked[0]
    assert (name, last) == (CUDA, CPU)
    assert options["device_id"] == "1"
    assert options["arena_extend_strategy"] == "kNextPowerOfTwo"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"


def test_tensorrt_falls_back_on_cuda(machine: Any, tiny: Any) -> None:
    found = machine(TENSORRT, CUDA)
    net = Backbone(tiny(), provider="tensorrt", provider_options={"trt_fp16_enable": True})
    assert net.providers == (TENSORRT, CUDA, CPU)
    assert found.asked[0][0] == (TENSORRT, {"trt_fp16_enable": "1"})


def test_asked_for_and_missing(machine: Any, tiny: Any) -> None:
    machine()
    with pytest.raises(ProviderError, match=r"cuda \(CUDAExecutionProvider\) isn't available.*pip install"):
        Backbone(tiny(), provider="cuda").features(picture(14, 14))


@pytest.mark.parametrize(
    ("raised", "printed", "words"),
    [
        ("CUDA failure 100", "", r"could not be started: CUDA failure 100"),
        (None, "", r"could not be started: "),
        (
            None,
            "EP Error bad option when using ['CUDAExecutionProvider']\nFalling back",
            r"could not be started: bad option",
        ),
        (
            "/onnxruntime_src/core/a.cc:12 void onnxruntime::Get(int, const T&) libcudnn.so.9: cannot open",
            "",
            r"could not be started: libcudnn.so.9: cannot open.*Libraries of CUDA or cuDNN are missing: pip install",
        ),
    ],
)
def test_asked_for_and_not_started(
    machine: Any,
    tiny: Any,
    capsys: pytest.CaptureFixture[str],
    raised: str | None,
    printed: str,
    words: str,
) -> None:
    found = machine(CUDA)
    found.printed = printed
    found.starts.discard(CUDA)
    if raised is not None:
        found.raises[CUDA] = raised
    with pytest.raises(ProviderError, match=words) as caught:
        _ = Backbone(tiny(), provider="cuda").providers
    assert "\n" not in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_without_a_driver_nothing_is_tried(machine: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine(CUDA)
    monkeypatch.setattr(_sessions, "lacking_driver", lambda: "NVIDIA's driver isn't there (libcuda.so.1: no)")
    with pytest.raises(ProviderError, match=r"driver isn't there \(libcuda.so.1: no\).*--gpus all"):
        _ = Backbone(tiny(), provider="cuda").providers
    assert found.asked == []


def test_started_but_without_work(machine: Any, tiny: Any) -> None:
    machine("XnnpackExecutionProvider").nodes = {CPU: 40}
    with pytest.raises(ProviderError, match="xnnpack started, but takes none of the 40 operators"):
        _ = Backbone(tiny(), provider="xnnpack").providers


def test_library_that_is_missing_is_named(tmp_path: Path) -> None:
    runtime = types.SimpleNamespace(__file__=str(tmp_path / "onnxruntime" / "__init__.py"))
    assert "onnxruntime_providers_cuda" in str(_sessions._lacking_library(runtime, PROVIDERS["cuda"]))
    assert _sessions._lacking_library(runtime, PROVIDERS["coreml"]) is None


def test_runtime_without_its_files(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.setattr(_sessions, "installed_runtimes", lambda: {"onnxruntime-gpu": "1"})
    with pytest.raises(
        ImportError, match=r"incomplete.*pip uninstall -y onnxruntime-gpu && pip install onnxruntime-gpu"
    ):
        _ = Backbone(tiny()).providers


# The graph for a provider


@pytest.mark.parametrize(
    ("precision", "provider", "asked", "expected"),
    [
        ("int8", "cpu", None, None), ("int8", "cuda", None, "float16"), ("int8", "openvino", None, "float32"),
        ("int8", "cuda", "file", None), ("int8", "cuda", "float32", "float32"), ("float32", "cuda", None, None),
        ("float32", "cuda", "float16", "float16"), ("float16", "directml", None, None),
        ("float32", "cpu", "file", None),
        ("int8", "cpu", "float32", "float32"), ("float32", "cpu", "float32", None),
        ("int8-static", "openvino", None, None), ("int8-static", "cpu", None, None),
        ("int8-static", "cuda", None, "float16"), ("int8-static", "openvino", "float32", "float32"),
    ],
)  # fmt: skip
def test_graph_for_a_provider(
    tiny: Any, precision: str, provider: str, asked: str | None, expected: str | None
) -> None:
    path = str(tiny(precision))
    found = _sessions.graph_for(path, precision, PROVIDERS[provider], asked)
    if expected is None:
        assert found == path
    else:
        from sparsespec.models.expand import expanded

        assert found == expanded(path, expected)


def test_8_bit_model_on_a_gpu_becomes_half_precision(machine: Any, tiny: Any) -> None:
    found = machine(CUDA)
    _ = Backbone(tiny("int8"), provider="cuda").providers
    _ = Backbone(tiny("int8"), provider="cuda", provider_options={"graph_precision": "file"}).providers
    assert isinstance(found.models[0], bytes)
    assert found.models[1] == str(tiny("int8"))
    assert "graph_precision" not in found.asked[1][0][1]


def test_8_bit_model_on_a_gpu_without_onnx(
    machine: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(CUDA)
    path = tiny("int8")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ProviderError, match=r"turned into float16, which needs.*pip install 'sparsespec\[gpu\]'"):
        _ = Backbone(path, provider="cuda").providers
    assert Backbone(path).providers == (CPU,)
    (record,) = caplog.records
    assert "sparsespec[gpu]" in record.getMessage()


def test_another_precision_on_the_cpu(tiny: Any) -> None:
    image = picture(12, 16)
    plain = Backbone(tiny(), provider="cpu", threads=1).features(image, long_side=None)
    half = Backbone(tiny("float16"), provider="cpu", threads=1, provider_options={"graph_precision": "float32"})
    np.testing.assert_allclose(half.features(image, long_side=None).keys, plain.keys, rtol=0.02, atol=0.02)


# OpenVINO's own runtime

needs_openvino = pytest.mark.skipif(NO_OPENVINO, reason="OpenVINO isn't installed: the extra 'openvino'")


def openvino(path: Path, threads: int = 1, **options: Any) -> Backbone:
    return Backbone(path, provider="openvino", threads=threads, provider_options=options)


@needs_openvino
@pytest.mark.parametrize("shape", [(4, 4), (12, 16), (20, 4), (33, 29)])
def test_openvino_gives_the_same_features(tiny: Any, shape: tuple[int, int]) -> None:
    image = picture(*shape)
    expected = Backbone(tiny(), provider="cpu", threads=1).features(image, long_side=None)
    net = openvino(tiny(), INFERENCE_PRECISION_HINT="f32")
    found = net.features(image, long_side=None)
    assert net.providers == ("OpenVINO",)
    assert found.info["provider"] == "OpenVINO"
    for name in ("queries", "keys", "values"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


@needs_openvino
def test_openvino_says_what_it_computes_in(tiny: Any) -> None:
    session = _openvino.OpenVinoSession(str(tiny()), 1, 1, {"inference_precision_hint": "f32"})
    assert session.precision in ("f32", "float32")


@needs_openvino
def test_8_bit_model_in_openvino(tiny: Any) -> None:
    image = picture(24, 32)
    expected = Backbone(tiny("int8"), provider="cpu", threads=1).features(image, long_side=None).keys
    found = openvino(tiny("int8")).features(image, long_side=None).keys
    cosine = (found * expected).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1))
    assert cosine.min() > 0.99


@needs_openvino
def test_openvino_from_several_threads(tiny: Any) -> None:
    net = openvino(tiny(), INFERENCE_PRECISION_HINT="f32")
    images = [picture(4 * (1 + k % 7), 4 * (1 + k % 5), seed=k) for k in range(40)]
    alone = [net.features(image, long_side=None).keys for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: net.features(image, long_side=None).keys, images))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@needs_openvino
def test_results_of_openvino_are_the_callers_own(tiny: Any) -> None:
    net = openvino(tiny())
    first = net.features(picture(8, 8), long_side=None)
    before = first.keys.copy()
    net.features(picture(8, 8, seed=1), long_side=None)
    np.testing.assert_array_equal(first.keys, before)


@needs_openvino
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"NO_SUCH_PROPERTY": "1"}, "device CPU: .*NO_SUCH_PROPERTY.*devices here are .*CPU"),
        ({"INFERENCE_PRECISION_HINT": "f3"}, "OpenVINO could not start on the device CPU: "),
        ({"device": "nowhere"}, "OpenVINO could not start on the device NOWHERE: .*devices here are"),
    ],
)
def test_bad_options_of_openvino(tiny: Any, options: dict[str, str], words: str) -> None:
    with pytest.raises(ProviderError, match=words):
        _ = openvino(tiny(), **options).providers


@needs_openvino
def test_openvino_is_never_chosen_by_itself(tiny: Any) -> None:
    assert Backbone(tiny(), threads=1).providers == (CPU,)


def test_openvino_missing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny()
    genuine = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else genuine(name, *a))
    with pytest.raises(ProviderError, match=r"openvino .*isn't available here.*pip install 'sparsespec\[openvino\]'"):
        _ = Backbone(path, provider="openvino").providers


def test_openvino_of_onnx_runtime_stands_in(machine: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(OPENVINO)
    path = tiny()
    genuine = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else genuine(name, *a))
    assert Backbone(path, provider="openvino").providers == (OPENVINO, CPU)


def test_openvino_that_cannot_be_imported(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ProviderError, match=r"can't be imported.*pip install 'sparsespec\[openvino\]'"):
        _openvino.OpenVinoSession(str(tiny()), 1, 1, {})
