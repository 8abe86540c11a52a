from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from sparsespec import diagnosis
from sparsespec.backbone import Backbone
from sparsespec.diagnosis import diagnose
from sparsespec.models import get_model
from sparsespec.providers import ProviderError

Invoke = Callable[..., Result]
SECTIONS = ["versions", "runtime", "processor", "memory", "storage", "model", "speed"]


def levels(found: diagnosis.Diagnosis, words: str) -> list[str]:
    return [p.level for p in found.problems if re.search(words, f"{p.text} -> {p.remedy}")]


# The command


def test_as_json(invoke: Invoke) -> None:
    result = invoke("doctor", "--json", "--seconds", 0)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert list(found) == ["can_run", "problems", *SECTIONS]
    assert found["can_run"] is True
    assert found["model"]["name"] == "dinov2-vits14-int8"
    assert found["model"]["as_recorded"] is True
    assert found["runtime"]["used"][-1] == "CPUExecutionProvider"
    assert "cpu" in found["runtime"]["providers"]
    assert found["processor"]["granted"] == found["runtime"]["threads"] >= 1
    assert found["versions"]["numpy"] == np.__version__
    assert set(found["speed"]) == {"load_ms"}
    for problem in found["problems"]:
        assert problem["level"] in ("warning", "hint")
        assert problem["text"]
        assert problem["remedy"]
        assert "\n" not in problem["text"] + problem["remedy"]


@pytest.mark.slow
def test_as_text(invoke: Invoke) -> None:
    result = invoke("doctor", "--seconds", 0.1)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line for line in lines if line in SECTIONS] == SECTIONS
    for name in ("features ms", "segmentation first ms", "segmentation ms", "images per second"):
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert float(line.split()[-1]) > 0
    assert lines[-1].startswith("images can be segmented here; ")


def test_missing_provider_is_an_error_with_a_remedy(invoke: Invoke) -> None:
    result = invoke("doctor", "--provider", "xnnpack", "--seconds", 0)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    (place,) = [k for k, line in enumerate(lines) if line.startswith("error: ")]
    assert "xnnpack (XnnpackExecutionProvider) isn't available here" in lines[place]
    assert lines[place + 1].startswith("  what to do: ")
    assert lines[-1] == "images can't be segmented here"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--provider", "gpu7"], "unknown provider 'gpu7'; there are auto, cpu, cuda"),
        (["--provider-option", "device_id=1"], "device_id can't be given with the provider 'auto'"),
        (["--provider", "cuda", "--provider-option", "device_id"], "not of the form KEY=VALUE"),
        (["--provider", "cuda", "--provider-option", "a=1", "--provider-option", "a=2"], "'a' is given twice"),
        (["--seconds", -1], "-1"),
    ],
)
def test_wrong_usage(invoke: Invoke, options: list[Any], words: str) -> None:
    result = invoke("doctor", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_model_that_is_not_there(invoke: Invoke) -> None:
    result = invoke("doctor", "--model", "nonesuch", "--seconds", 0)
    assert result.exit_code == 1
    assert "error: model: unknown model 'nonesuch'" in result.stdout


_BARE = """
import sys
import numba.core.caching as caching

def refuse(self):
    raise OSError(30, "Read-only file system")

caching._CacheLocator.ensure_cache_path = refuse
sys.argv = ["sparsespec", "doctor", "--seconds", "0"]
from sparsespec.cli import main
main()
"""


@pytest.mark.slow
def test_read_only_and_without_home() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOME", "XDG_", "NUMBA"))}
    done = subprocess.run(
        [sys.executable, "-c", _BARE],
        env=environment | {"TMPDIR": "/nonexistent"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    assert "warning: compiled kernels can't be kept" in done.stdout
    assert "what to do: set NUMBA_CACHE_DIR" in done.stdout


# What it finds


@pytest.mark.slow
def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnosis._Examination()
    diagnosis._speed(found, Backbone(threads=1), 0.01)
    speed = found.result.facts["speed"]
    assert speed["tokens"] == 24 * 32
    for name in ("features_first_ms", "features_ms", "images_per_second", "segmentation_first_ms", "segmentation_ms"):
        assert speed[name] > 0
    assert speed["instances"] >= 1
    assert "key_cosine_to_cpu" not in speed
    assert found.result.problems == []


class Odd(Backbone):
    """Stands in for a provider whose arithmetic is broken."""

    factor: float = float("nan")

    @property
    def providers(self) -> tuple[str, ...]:
        return ("OddExecutionProvider",)

    def features(self, image: Any, **size: Any) -> Any:
        tokens = super().features(image, **size)
        tokens.keys[::2] *= self.factor
        return tokens


@pytest.mark.parametrize(("factor", "words"), [(float("nan"), "aren't finite"), (-1.0, "gives other features than")])
def test_provider_that_computes_nonsense(monkeypatch: pytest.MonkeyPatch, factor: float, words: str) -> None:
    found = diagnosis._Examination()
    odd = Odd(threads=1)
    odd.factor = factor
    monkeypatch.setattr("sparsespec.pipeline.Segmenter", lambda backbone: lambda image: [])
    diagnosis._speed(found, odd, 0.01)
    (problem,) = found.result.problems
    assert words in problem.text
    assert "graph_precision=float32" in problem.remedy


def test_two_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "runtime_conflict", lambda: "a and b are both installed; keep one: pip uninstall a")
    found = diagnose(seconds=0)
    assert levels(found, "a and b are both installed -> pip uninstall a") == ["warning"]
    assert found.can_run


def test_gpu_that_lies_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "lacking_driver", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")
    found = diagnosis._Examination()
    diagnosis._unused_hardware(found, ["CPUExecutionProvider"])
    assert levels(found.result, r"NVIDIA.* -> Install it with: .*onnxruntime-gpu") == ["hint"]
    assert found.result.facts["runtime"]["nvidia_driver"] is True


def test_what_auto_passed_over_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object, *, provider: str = "auto", provider_options: object = None) -> Any:
        if provider == "cuda":
            raise ProviderError("the provider cuda could not be started: no driver. Install the driver of the GPU")
        return Backbone(threads=1)

    monkeypatch.setattr(diagnosis, "Backbone", broken)
    found = diagnosis._Examination()
    found.note("runtime", auto_tries=["cuda", "cpu"])
    diagnosis._started(found, "default", "auto", None)
    (problem,) = found.result.problems
    assert problem.text == "cuda isn't used: the provider cuda could not be started: no driver"
    assert problem.remedy == "Install the driver of the GPU"


@pytest.mark.parametrize(
    ("flags", "openvino", "expected"),
    [
        ("fpu sse4_2", None, "no AVX2"),
        ("avx2 fma", None, "no VNNI"),
        ("avx2 avx512f avx512_vnni avx512_bf16", None, "bfloat16.*openvino"),
        ("avx2 avx512f avx512_vnni avx512_bf16", "2026.1", None),
        ("avx2 avx_vnni", None, None),
    ],
)
def test_instructions(monkeypatch: pytest.MonkeyPatch, flags: str, openvino: str | None, expected: str | None) -> None:
    monkeypatch.setattr(diagnosis, "_flags", lambda: set(flags.split()))
    monkeypatch.setattr(diagnosis, "_version", lambda name: openvino)
    monkeypatch.setattr(diagnosis.platform, "machine", lambda: "x86_64")
    for name in diagnosis._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = diagnosis._Examination()
    diagnosis._processor(found)
    if expected is None:
        assert found.result.problems == []
    else:
        (problem,) = found.result.problems
        assert re.search(expected, f"{problem.text} {problem.remedy}")


def test_too_many_threads_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "available_cpus", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    found = diagnosis._Examination()
    diagnosis._processor(found)
    assert levels(found.result, r"OMP_NUM_THREADS=64, but only 2 .* -> set OMP_NUM_THREADS to 2") == ["warning"]
    assert levels(found.result, "MKL_NUM_THREADS") == []


def test_instruction_sets_of_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    read = diagnosis._flags()
    monkeypatch.setattr(diagnosis, "_lines", lambda path: [])
    known_to_numpy = diagnosis._flags()
    assert known_to_numpy
    if read:
        assert ("avx2" in read) == ("avx2" in known_to_numpy)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"/sys/fs/cgroup/memory.max": "max"}, None),
        ({"/sys/fs/cgroup/memory.max": "500000000"}, 500_000_000),
        ({"/proc/self/cgroup": "0::/a/b", "/sys/fs/cgroup/a/b/memory.max": "700"}, 700),
        ({"/proc/self/cgroup": "5:cpu,memory:/x", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "800"}, 800),
        ({"/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
    ],
)
def test_memory_limit(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], limit: int | None) -> None:
    monkeypatch.setattr(diagnosis, "_lines", lambda path: files.get(path.as_posix(), "").splitlines())
    assert diagnosis._memory_limit() == limit
    found = diagnosis._Examination()
    diagnosis._memory(found)
    assert bool(levels(found.result, "memory can be used")) == (limit is not None)


def test_changed_model_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "model.onnx"
    content = bytearray(get_model("default").path.read_bytes())
    content[10_000_000] ^= 1
    copy.write_bytes(content)
    monkeypatch.setattr(diagnosis, "resolve", lambda model: copy)
    found = diagnosis._Examination()
    diagnosis._model(found, "default")
    (problem,) = found.result.problems
    assert problem.level == "error"
    assert "SHA-256" in problem.text
    assert found.result.facts["model"]["as_recorded"] is False


def test_one_broken_section_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("what\na mess")

    monkeypatch.setattr(diagnosis, "_flags", broken)
    found = diagnose(seconds=0)
    assert levels(found, "^processor: what a mess") == ["warning"]
    assert {"versions", "runtime", "memory", "storage", "model"} <= set(found.facts)
    assert found.can_run


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = diagnose(seconds=0)
    assert not found.can_run
    assert found.problems[0].level == "error"
    assert levels(found, "ONNX Runtime is needed.*pip install onnxruntime")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="seconds must be at least 0, got -1"):
        diagnose(seconds=-1)
    with pytest.raises(ValueError, match="unknown provider"):
        diagnose(provider="x", seconds=0)
