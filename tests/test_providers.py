from __future__ import annotations

import importlib.metadata
import pickle
import re
import sys
from pathlib import PurePosixPath
from typing import Any

import pytest

from sparsespec import providers
from sparsespec.providers import (
    PROVIDERS,
    Choice,
    available_providers,
    choose,
    find_provider,
    installed_runtimes,
    missing_message,
    runtime_conflict,
)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that exactly these distributions are installed; those in ``beside`` don't own the module."""

    def install(versions: dict[str, str], *, beside: tuple[str, ...] = (), files_known: bool = True) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        def files(name: str) -> list[PurePosixPath] | None:
            own = PurePosixPath("plugin/__init__.py" if name in beside else "onnxruntime/__init__.py")
            return [PurePosixPath("x.txt"), own] if files_known else None

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "files", files)

    return install


# Names


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("cpu", "cpu"), ("CUDA", "cuda"), (" cuda ", "cuda"), (CUDA, "cuda"), (CUDA.lower(), "cuda"),
        ("dml", "directml"),
        ("DmlExecutionProvider", "directml"), ("core_ml", "coreml"), ("trt", "tensorrt"), ("OpenVINO", "openvino"),
    ],
)  # fmt: skip
def test_names(given: str, name: str) -> None:
    assert find_provider(given) is PROVIDERS[name]
    assert choose(given) == Choice(name)


def test_names_of_every_provider() -> None:
    assert {"cpu", "cuda", "tensorrt", "directml", "coreml", "openvino", "rocm", "migraphx", "qnn", "xnnpack"} <= set(
        PROVIDERS
    )
    assert len({provider.execution_provider for provider in PROVIDERS.values()}) == len(PROVIDERS)
    for name, provider in PROVIDERS.items():
        assert provider.name == name
        assert provider.execution_provider.endswith("ExecutionProvider")
        assert provider.precision in (None, "float32", "float16")
        assert find_provider(provider.execution_provider) is provider


def test_execution_provider_nobody_has_heard_of() -> None:
    found = find_provider("FancyExecutionProvider")
    assert (found.name, found.execution_provider) == ("FancyExecutionProvider",) * 2
    assert choose("FancyExecutionProvider").name == "FancyExecutionProvider"


@pytest.mark.parametrize("name", ["", "  ", "gpu0", "cuda:0", "ExecutionProvider", None, 3, ["cuda"]])
def test_names_that_are_none(name: Any) -> None:
    with pytest.raises(ValueError, match=r"cpu, cuda, tensorrt"):
        find_provider(name)
    with pytest.raises(ValueError, match="auto"):
        choose(name)


# Options


def test_options_become_text() -> None:
    found = choose(
        "cuda", {"device_id": 1, "use_tf32": False, "gpu_mem_limit": "2147483648", "graph_precision": "file"}
    )
    assert found == Choice("cuda", (("device_id", "1"), ("use_tf32", "0"), ("gpu_mem_limit", "2147483648")), "file")
    assert pickle.loads(pickle.dumps(found)) == found
    assert hash(found) == hash(pickle.loads(pickle.dumps(found)))
    assert choose() == choose("AUTO") == Choice("auto")
    assert choose("cpu", {"graph_precision": "float32"}).graph_precision == "float32"


@pytest.mark.parametrize(
    ("provider", "options", "words"),
    [
        ("auto", {"device_id": 1}, "provider_options device_id can't be given with the provider 'auto': .*name it"),
        ("cpu", {"a": 1, "b": 2}, "provider_options a, b can't be given with the provider 'cpu': it has none"),
        ("cuda", {"device_id": None}, r"provider_options\['device_id'\] must be text or a number, not None"),
        ("cuda", {1: 1}, "provider_options must have names"),
        ("cuda", {" ": 1}, "provider_options must have names"),
        ("cuda", [("a", 1)], "provider_options must be a mapping"),
        ("cuda", "a=1", "provider_options must be a mapping"),
        ("cuda", {"graph_precision": "int4"}, "must be one of file, float32, float16, not 'int4'"),
    ],
)
def test_bad_options(provider: str, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose(provider, options)


# What is installed


def test_what_is_installed_here() -> None:
    assert any(name.startswith("onnxruntime") for name in installed_runtimes())


def test_one_runtime_is_no_conflict(pretend: Any) -> None:
    pretend({"onnxruntime-gpu": "1.31.1"})
    assert installed_runtimes() == {"onnxruntime-gpu": "1.31.1"}
    assert runtime_conflict() is None


@pytest.mark.parametrize("files_known", [True, False])
def test_two_runtimes_overwrite_each_other(pretend: Any, files_known: bool) -> None:
    pretend({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1", "numpy": "2"}, files_known=files_known)
    assert runtime_conflict() == (
        "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed, and the files of one have overwritten those "
        "of the other; keep one: pip uninstall -y onnxruntime onnxruntime-gpu && "
        "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def test_plug_in_is_no_conflict(pretend: Any) -> None:
    pretend({"onnxruntime": "1.32.0", "onnxruntime-qnn": "2.7.0"}, beside=("onnxruntime-qnn",))
    assert runtime_conflict() is None


def test_what_there_is(pretend: Any) -> None:
    pretend({"onnxruntime": "1.32.0"})
    assert available_providers([CUDA, "AzureExecutionProvider", CPU, "XExecutionProvider"]) == [
        "cuda", "cpu", "XExecutionProvider",
    ]  # fmt: skip
    pretend({"openvino": "2026.4.1"})
    assert available_providers([CPU]) == ["cpu", "openvino"]
    assert available_providers(["OpenVINOExecutionProvider", CPU]) == ["openvino", "cpu"]


# What is missing


@pytest.mark.parametrize(
    ("platform", "versions", "name", "words"),
    [
        ("linux", {"onnxruntime": "1"}, "cuda",
         r"the provider cuda \(CUDAExecutionProvider\) isn't available here; available are cpu\. Install it with: .*"),
        ("linux", {}, "cuda", r".*Install it with: pip install 'onnxruntime-gpu\[cuda,cudnn\]'; .*"),
        ("linux", {"onnxruntime": "2", "onnxruntime-gpu": "1"}, "cuda",
         r".*Onnxruntime 2 and onnxruntime-gpu 1 are both installed.*pip uninstall -y onnxruntime onnxruntime-gpu .*"),
        ("linux", {"onnxruntime-gpu": "1.5"}, "tensorrt", r".*onnxruntime-gpu 1.5 is installed, but this build.*"),
        ("win32", {"onnxruntime": "1"}, "directml",
         r".*: pip uninstall -y onnxruntime && pip install onnxruntime-directml; it needs a DirectX 12 GPU"),
        ("linux", {"onnxruntime": "1"}, "directml", r".*It exists on Windows only"),
        ("linux", {"onnxruntime": "1"}, "coreml", r".*It exists on macOS only"),
        ("darwin", {"onnxruntime": "1"}, "cuda", r".*It exists on Linux and Windows only"),
        ("linux", {"onnxruntime": "1"}, "openvino", r".*Install it with: pip install 'sparsespec\[openvino\]'"),
        ("linux", {"onnxruntime": "1"}, "qnn",
         r".*pip uninstall -y onnxruntime && pip install 'onnxruntime-qnn<2'; it needs a Qualcomm NPU"),
        ("linux", {"onnxruntime": "1"}, "xnnpack", r".*No package of the Python index has it.*"),
        ("linux", {"onnxruntime": "1"}, "FancyExecutionProvider",
         r"the provider FancyExecutionProvider isn't available here.*No package.*"),
    ],
)  # fmt: skip
def test_what_to_install(
    pretend: Any, monkeypatch: pytest.MonkeyPatch, platform: str, versions: dict[str, str], name: str, words: str
) -> None:
    pretend(versions)
    monkeypatch.setattr(sys, "platform", platform)
    message = missing_message(find_provider(name), [CPU])
    assert re.fullmatch(words, message), message


def test_provider_of_this_module_is_the_error_of_the_package() -> None:
    from sparsespec.backbone import ProviderError

    assert providers.ProviderError is ProviderError
    assert issubclass(ProviderError, RuntimeError)
