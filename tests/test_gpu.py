"""The network on a CUDA GPU beside the CPU. Needs the package, pytest, onnxruntime-gpu and onnx."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sparsespec.backbone import Backbone, TokenFeatures
from sparsespec.models import get_model

CUDA = "CUDAExecutionProvider"
KINDS = ("queries", "keys", "values")


def _why_not() -> str | None:
    if CUDA not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDAExecutionProvider"
    from sparsespec._sessions import lacking_driver

    return lacking_driver()


pytestmark = [
    pytest.mark.skipif(_why_not() is not None, reason=f"no CUDA: {_why_not()}"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded network in three precisions, of the same weights."""
    pytest.importorskip("onnx", reason="8-bit models on a GPU need the extra 'gpu'")
    from sparsespec.models.expand import expanded

    folder = tmp_path_factory.mktemp("models")
    paths = {"int8": get_model("default").path}
    for precision in ("float32", "float16"):
        paths[precision] = folder / f"{precision}.onnx"
        paths[precision].write_bytes(expanded(paths["int8"], precision))
    return paths


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Make a smooth picture with a sharp disc in it."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    disc = (x - 0.5) ** 2 + (y - 0.3) ** 2 < 0.04
    channels = [0.5 + 0.4 * np.sin(5 * x + k + seed) * np.cos(4 * y - k) for k in range(3)]
    return np.stack([np.where(disc, 1 - c, c) for c in channels], axis=-1).astype(np.float32)


def on_gpu(path: Path, **options: Any) -> Backbone:
    max_tokens = options.pop("max_tokens", 8192)
    return Backbone(path, provider="cuda", provider_options=options, max_tokens=max_tokens)


def difference(found: TokenFeatures, expected: TokenFeatures, kind: str) -> float:
    """Root mean square of the difference over that of what is expected."""
    a, b = getattr(found, kind).astype(float), getattr(expected, kind).astype(float)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def cosines(found: TokenFeatures, expected: TokenFeatures, kind: str = "keys") -> np.ndarray:
    a, b = getattr(found, kind).astype(float), getattr(expected, kind).astype(float)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.fixture(scope="module")
def reference(models: dict[str, Path]) -> TokenFeatures:
    return Backbone(models["float32"], provider="cpu").features(picture(300, 400))


@pytest.mark.parametrize(
    ("precision", "options", "most"),
    [
        ("float32", {}, 1e-4),
        # TensorFloat-32 keeps ten bits of a factor's fraction.
        ("float32", {"use_tf32": 1}, 1e-2),
        ("float16", {}, 1e-2),
    ],
)
def test_features_are_those_of_the_cpu(
    models: dict[str, Path],
    reference: TokenFeatures,
    precision: str,
    options: dict[str, Any],
    most: float,
    record_property: Any,
) -> None:
    net = on_gpu(models[precision], **options)
    assert net.providers[0] == CUDA
    found = net.features(picture(300, 400))
    assert found.info["provider"] == CUDA
    for kind in KINDS:
        error = difference(found, reference, kind)
        record_property(kind, error)
        print(f"{precision} {options} {kind}: {error:.2e}")
        assert error < most, kind


def test_8_bit_model_runs_in_half_precision(models: dict[str, Path], reference: TokenFeatures) -> None:
    found = on_gpu(models["int8"]).features(picture(300, 400))
    # Its weights are the same; the inputs of its products aren't rounded to 8 bits here.
    for kind in KINDS:
        assert difference(found, reference, kind) < 1e-2
    assert cosines(found, reference).min() > 0.9995
    rounded = Backbone(models["int8"], provider="cpu").features(picture(300, 400))
    assert cosines(found, rounded).mean() > 0.999


def test_automatic_choice_is_the_gpu(models: dict[str, Path]) -> None:
    assert Backbone(models["int8"]).providers[0] == CUDA


@pytest.mark.parametrize("shape", [(14, 14), (13, 400), (700, 28), (333, 517), (672, 672)])
def test_shapes(models: dict[str, Path], shape: tuple[int, int]) -> None:
    image = picture(*shape)
    expected = Backbone(models["float32"], provider="cpu").features(image, long_side=None)
    found = on_gpu(models["float32"]).features(image, long_side=None)
    assert found.grid == expected.grid
    for kind in KINDS:
        assert difference(found, expected, kind) < 1e-4


def test_tiles(models: dict[str, Path]) -> None:
    image = picture(500, 700)
    expected = Backbone(models["float32"], provider="cpu", max_tokens=256).features(image, long_side=None)
    found = on_gpu(models["float32"], max_tokens=256).features(image, long_side=None)
    assert found.info["tiles"] == expected.info["tiles"] > 4
    assert found.info["views"] == expected.info["views"] > 0
    for kind in KINDS:
        assert difference(found, expected, kind) < 1e-4


def test_ten_thousand_tokens_in_one_piece(models: dict[str, Path]) -> None:
    found = on_gpu(models["float16"], max_tokens=10_000).features(picture(1400, 1400), long_side=None)
    assert found.info["tiles"] == 1
    assert found.keys.shape == (10_000, 384)
    assert np.isfinite(found.keys).all()


def test_same_input_same_features(models: dict[str, Path]) -> None:
    net = on_gpu(models["float16"])
    first, second = (net.features(picture(200, 300)) for _ in range(2))
    for kind in KINDS:
        assert difference(first, second, kind) < 1e-4


def test_several_threads(models: dict[str, Path]) -> None:
    net = on_gpu(models["float32"])
    images = [picture(14 * (2 + k % 9), 14 * (2 + k % 7), seed=k) for k in range(32)]
    alone = [net.features(image, long_side=None) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: net.features(image, long_side=None), images))
    for a, b in zip(alone, together, strict=True):
        assert difference(b, a, "keys") < 1e-4


def test_opened_by_many_threads_at_once(models: dict[str, Path]) -> None:
    net = on_gpu(models["int8"])
    start = threading.Barrier(4)

    def run(_: int) -> np.ndarray:
        start.wait()
        return net.features(picture(56, 56), long_side=None).keys

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(run, range(4))
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-2, atol=1e-2)


def _used_memory() -> float | None:
    """Return the megabytes in use on the first GPU."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return float(done.stdout.split()[0])


def test_memory_does_not_grow_with_the_number_of_sizes(models: dict[str, Path]) -> None:
    if _used_memory() is None:
        pytest.skip("nvidia-smi can't be run")
    net, rng = on_gpu(models["float16"]), np.random.default_rng(0)
    net.features(picture(900, 900), long_side=None)

    def run(times: int) -> float:
        for _ in range(times):
            net.features(rng.random((*rng.integers(20, 900, 2), 3), np.float32), long_side=None)
        return _used_memory() or 0.0

    after_some, after_many = run(60), run(240)
    print(f"MB in use on the GPU after 60 and after 300 sizes: {after_some:.0f}, {after_many:.0f}")
    assert after_many - after_some < 300


def test_limit_of_memory_is_kept(models: dict[str, Path]) -> None:
    # Too little for the weights: whatever happens, it isn't the CPU in silence.
    with pytest.raises(Exception, match=r"(?i)memory|alloc|limit|arena"):
        on_gpu(models["float32"], gpu_mem_limit=1_000_000).features(picture(300, 400))


def test_device_that_is_not_there(models: dict[str, Path]) -> None:
    from sparsespec.providers import ProviderError

    with pytest.raises(ProviderError, match="cuda could not be started"):
        _ = on_gpu(models["float32"], device_id=63).providers


def test_whole_segmentation(models: dict[str, Path]) -> None:
    from sparsespec.pipeline import Segmenter

    image = (picture(300, 400) * 255).astype(np.uint8)
    on_cpu = Segmenter(Backbone(models["float32"], provider="cpu"))(image)
    found = Segmenter(on_gpu(models["float32"]))(image)
    assert found.info["provider"] == CUDA
    assert (found.labels == on_cpu.labels).mean() > 0.95


def test_doctor(models: dict[str, Path]) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from sparsespec.cli import main; main(['doctor', '--provider', 'cuda', '--json', '--seconds', '1'])",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"CUDAExecutionProvider"' in done.stdout
