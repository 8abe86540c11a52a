"""``sparsespec bench gpu``: the network on a CUDA GPU, beside PyTorch there and this package on the processor."""

from __future__ import annotations

import subprocess
from typing import Any

from sparsespec.evaluation.benchmark import data, peers
from sparsespec.evaluation.benchmark.backbone import (
    FLOAT16,
    FLOAT32,
    INT8,
    PLAIN_GIVEN,
    TORCH,
    Network,
    compared_keys,
    network_inputs,
    read_network,
    row_of,
)
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.measure import Contender, Outcome
from sparsespec.evaluation.benchmark.report import Column, Table

__all__ = ["run"]

_TOKENS = (1024, 4970, 10_000)
_QUICK_TOKENS = (256,)
_LIMIT = 120.0
_CUDA = "CUDAExecutionProvider"
_EXPECTED, _OURS_TF32, _OURS_FLOAT16 = "sparsespec, float32", "sparsespec, float32, TF32", "sparsespec, float16"
_ON_CPU = "sparsespec, int8, on the processor"
_PLAIN, _PLAIN_TF32 = "ONNX Runtime, plain export", "the same, TF32"
_TORCH, _TORCH_HALF = "PyTorch", "PyTorch, float16"


def run(bench: Bench) -> list[Table]:
    """Measure the network on the first CUDA GPU; without one a note says so."""
    table = Table(
        "gpu",
        "One photograph on a GPU, from pixels and positions to queries, keys and values in the processor's memory",
        (
            Column("tokens", "tokens", "count"),
            Column("who", "who"),
            Column("seconds", "time", "seconds"),
            Column("ratio", "plain export / this", "fine"),
            Column("ratio_torch", "PyTorch, same type / this", "fine"),
            Column("ratio_cpu", "int8 on the processor / this", "fine"),
            Column("cosine_mean", "keys, mean cosine", "cosine"),
            Column("cosine_least", "least", "cosine"),
            Column("remark", "remark"),
        ),
    )
    gone = _why_not()
    if gone is not None:
        table.notes.append(f"Not measured: {gone}.")
        return [table]
    network = read_network(bench.options.model, bench.folder)
    for tokens in bench.sizes(_QUICK_TOKENS, _TOKENS):
        bench.say(f"gpu: {tokens:,} tokens")
        table.rows += _race(bench, network, tokens)
    table.notes.append(f"On {_gpu_name()}. The weights are those of {network.name}.")
    table.notes.append(
        "Copies to the GPU and back are part of the time. Cosines are between the keys and those of our float32 graph "
        "on the GPU. TF32, which rounds the factors of float32 products to ten bits, is ONNX Runtime's default, and "
        "neither PyTorch's nor ours; a row with TF32 is compared with the plain export that has it."
    )
    return [table]


def _race(bench: Bench, network: Network, tokens: int) -> list[dict[str, Any]]:
    grid = data.grid_of(tokens)
    inputs = {**network_inputs(bench, network, grid), "threads": bench.threads}
    ours = {"provider": "cuda"}
    plain = {"graph": network.files[PLAIN_GIVEN], "provider": _CUDA}
    tasks: dict[str, tuple[str, dict[str, Any]]] = {
        _EXPECTED: ("backbone", {**ours, "model": network.files[FLOAT32]}),
        _OURS_TF32: ("backbone", {**ours, "model": network.files[FLOAT32], "options": {"use_tf32": "1"}}),
        _OURS_FLOAT16: ("backbone", {**ours, "model": network.files[FLOAT16]}),
        _ON_CPU: ("backbone", {"provider": "cpu", "model": network.files[INT8]}),
        _PLAIN: ("backbone plain", {**plain, "options": {"use_tf32": "0"}}),
        _PLAIN_TF32: ("backbone plain", plain),
    }
    torch_gone = peers.missing("torch")
    outcomes: dict[str, Outcome] = {}
    for name, dtype in ((_TORCH, "float32"), (_TORCH_HALF, "float16")):
        if torch_gone is None:
            tasks[name] = ("backbone torch", {"weights": network.files[TORCH], "dtype": dtype, "device": "cuda"})
        else:
            outcomes[name] = Outcome("missing", remark=torch_gone)
    contenders = {
        name: Contender(task, {**inputs, **own, "keys": str(bench.folder / f"gpu-{index}.npy")}, name)
        for index, (name, (task, own)) in enumerate(tasks.items())
    }
    outcomes |= bench.race(contenders, limit=max(bench.limit, _LIMIT))
    compared = compared_keys(contenders, _EXPECTED)
    rows = []
    for name, outcome in outcomes.items():
        row = {**row_of(name, outcome), "tokens": grid[0] * grid[1]}
        if outcome.status == "done" and outcome.seconds is not None:
            torch = _TORCH_HALF if name == _OURS_FLOAT16 else _TORCH
            plain_peer = _PLAIN_TF32 if name == _OURS_TF32 else _PLAIN
            for key, peer in (("ratio", plain_peer), ("ratio_torch", torch), ("ratio_cpu", _ON_CPU)):
                other = outcomes[peer]
                if name != peer and other.status == "done" and other.seconds is not None:
                    row[key] = other.seconds / outcome.seconds
            row |= compared.get(name, {})
        rows.append(row)
    return rows


def _why_not() -> str | None:
    """Say why nothing can be measured here, if so."""
    from sparsespec._sessions import import_onnxruntime, lacking_driver

    if _CUDA not in import_onnxruntime().get_available_providers():
        return f"this installation of ONNX Runtime has no {_CUDA}"
    return lacking_driver()


def _gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "a GPU whose name nvidia-smi doesn't say"
    return done.stdout.strip()
