"""``sparsespec bench backbone``: the network on one photograph, beside a plain export of it and PyTorch.

All contenders have the same weights, those of the model under test as floating point numbers, and the same pixels and
positions in memory. Measured is the way from there to queries, keys and values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.benchmark import data, machine, peers
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.measure import Contender, Outcome
from sparsespec.evaluation.benchmark.plain import can_resize, plain_graph, save_weights
from sparsespec.evaluation.benchmark.report import Column, Table
from sparsespec.images import to_rgb_float
from sparsespec.models import ModelFormatError, UnknownModelError, read_trunk_metadata, resolve
from sparsespec.models.vit import BuildError, Vit
from sparsespec.position_table import resize_positions
from sparsespec.resample import resize

__all__ = ["Network", "compared_keys", "cosines", "network_inputs", "read_network", "row_of", "run"]

_TOKENS = (1024, 1530, 4970, 10_000)
_QUICK_TOKENS = (256,)
_LIMIT = 180.0
# A run of several seconds is not disturbed by what else goes on for a moment, and the plain export's take a minute.
_MOST_TOKENS_ONE_THREAD = 5000
# A plain export holds the scores of all heads twice, before and after their softmax, and half of the memory is ours.
_SCORES_HELD = 2.2

FLOAT32, INT8, FLOAT16, OPENVINO, OPENVINO_INT8 = (
    "sparsespec, float32",
    "sparsespec, int8",
    "sparsespec, float16",
    "sparsespec, OpenVINO",
    "sparsespec, OpenVINO, int8",
)
PLAIN, PLAIN_GIVEN = "ONNX Runtime, plain export", "the same, table given"
TORCH, TORCH_HALF = "PyTorch", "PyTorch, bfloat16"
_TORCH_TYPES = {TORCH: "float32", TORCH_HALF: "bfloat16"}


@dataclass(frozen=True, eq=False)
class Network:
    """The network under test, and the files that contenders read it from.

    Attributes
    ----------
    vit : Vit
        The weights.
    name : str
        Of the model they come from.
    precision : str
        That this holds them in.
    files : dict
        Name of a contender to the file it reads.
    """

    vit: Vit
    name: str
    precision: str
    files: Mapping[str, str]


def run(bench: Bench) -> list[Table]:
    """Measure everything about the backbone."""
    gone = peers.missing("onnx")
    if gone is not None:
        row = {"who": FLOAT32, "ours": True, "status": "not available", "remark": f"the onnx package is {gone}"}
        columns = (Column("who", "who"), Column("remark", "remark"))
        return [Table("speed", "One photograph", columns, [row])]
    bench.say("backbone: the network")
    network = _with_fixed_ranges(bench, read_network(bench.options.model, bench.folder))
    note = f"The weights are those of {network.name}."
    if network.precision != "float32":
        note = f"The weights are those of {network.name}, which holds them in {network.precision}, as float32."
    tables = [speed(bench, network), memory(bench, network), callers(bench, network)]
    tables[0].notes.append(note)
    return tables


def read_network(model: str | None, folder: Path) -> Network:
    """Read a network and write the files that the contenders read.

    Parameters
    ----------
    model
        A name of the registry or a file, as for :class:`sparsespec.backbone.Backbone`; None for the default model.
    folder
        For the files.

    Raises
    ------
    InputError
        There is no such model, it can't be read, or the onnx package is missing.
    """
    from sparsespec.models._onnx_package import require_onnx
    from sparsespec.models.expand import read_graph
    from sparsespec.models.graph import write_graph

    try:
        onnx = require_onnx()
        path = resolve(model or "default")
        metadata = read_trunk_metadata(path)
        vit = read_graph(onnx.load(path), metadata, where=os.fspath(path))
    except (BuildError, ImportError, ModelFormatError, OSError, UnknownModelError) as error:
        raise data.InputError(str(error)) from error
    files = {}
    for name, precision in ((FLOAT32, "float32"), (INT8, "int8"), (FLOAT16, "float16")):
        graph = write_graph(
            vit, precision=precision, name=metadata.name, source=metadata.name, source_sha256=metadata.source_sha256
        )
        files[name] = str(folder / f"{precision}.onnx")
        onnx.save(graph, files[name])
    files[OPENVINO] = files[FLOAT32]
    for name, in_graph in ((PLAIN, True), (PLAIN_GIVEN, False)):
        if in_graph and not can_resize(vit.rule):
            continue
        files[name] = str(folder / f"plain-{'resize' if in_graph else 'given'}.onnx")
        onnx.save(plain_graph(vit, resize=in_graph), files[name])
    for name in _TORCH_TYPES:
        files[name] = str(folder / "weights.npz")
    save_weights(vit, files[TORCH])
    return Network(vit, metadata.name, metadata.precision, files)


def _with_fixed_ranges(bench: Bench, network: Network) -> Network:
    """Add a file in int8-static, with ranges taken from the photographs that aren't measured."""
    from sparsespec.models.build import network_feed
    from sparsespec.models.calibration import balanced, channel_extents
    from sparsespec.models.graph import write_graph

    path = bench.folder / "int8-static.onnx"
    if _missing(OPENVINO_INT8) is None:
        photos = list(bench.photos.values())
        feeds = (network_feed(network.vit, to_rgb_float(photo)) for photo in photos[1:] or photos)
        vit, ranges = balanced(network.vit, channel_extents(network.vit, feeds))
        graph = write_graph(
            vit,
            precision="int8-static",
            name="bench-int8-static",
            source=network.name,
            source_sha256="0" * 64,
            ranges=ranges,
        )
        path.write_bytes(graph.SerializeToString())
    files: dict[str, str] = {}
    for name, file in network.files.items():
        files[name] = file
        if name == OPENVINO:
            files[OPENVINO_INT8] = str(path)
    return replace(network, files=files)


def speed(bench: Bench, network: Network) -> Table:
    """One photograph at several sizes: time, memory and the cosine of the keys."""
    table = Table(
        "speed",
        "One photograph, from pixels and positions to queries, keys and values",
        (
            Column("tokens", "tokens", "count"),
            Column("threads", "threads", "count"),
            Column("who", "who"),
            Column("seconds", "time", "seconds"),
            Column("cpu_seconds", "processor time", "seconds"),
            Column("ratio", "plain export / this", "fine"),
            Column("ratio_torch", "PyTorch / this", "fine"),
            Column("ratio_torch_half", "PyTorch bfloat16 / this", "fine"),
            Column("growth_bytes", "memory of a run", "megabytes"),
            Column("cosine_mean", "keys, mean cosine", "cosine"),
            Column("cosine_least", "least", "cosine"),
            Column("remark", "remark"),
        ),
    )
    for tokens in bench.sizes(_QUICK_TOKENS, _TOKENS):
        for threads in sorted({bench.threads, 1}, reverse=True):
            if threads < bench.threads and tokens > _MOST_TOKENS_ONE_THREAD:
                continue
            bench.say(f"backbone: {tokens:,} tokens, {threads} threads")
            table.rows += _race(bench, network, tokens, threads)
    table.notes.append(
        "*Memory of a run* is what the first run of this size adds to the process with its session loaded. Cosines are "
        "between the keys and those of our float32 graph, token by token. Ratios of one thread are of processor time, "
        "others of time."
    )
    table.notes.append(
        "float16 is made for GPUs: this processor's operators are fed with float32 by conversions to and fro."
    )
    table.notes.append(
        "Every contender gets the pixels in memory. The plain export brings the position table to size in the graph, "
        "as exports for images of any size do; the others are given it."
    )
    return table


def memory(bench: Bench, network: Network) -> Table:
    """Most memory of a process that computes the features of one photograph in one piece."""
    table = Table(
        "memory",
        "Peak memory of a process, Backbone.features in one window",
        (
            Column("tokens", "tokens", "count"),
            Column("who", "who"),
            Column("seconds", "time", "seconds"),
            Column("peak_bytes", "peak memory", "megabytes"),
            Column("remark", "remark"),
        ),
    )
    tokens = (max(bench.options.tokens) if bench.options.tokens else 0) or (_QUICK_TOKENS if bench.quick else _TOKENS)[
        -1
    ]
    grid = data.grid_of(tokens)
    patch = network.vit.patch_size
    path = str(bench.folder / "window.npy")
    np.save(path, data.as_uint8(resize(_photograph(bench), (grid[0] * patch, grid[1] * patch))))
    for name in (INT8, FLOAT32, OPENVINO, OPENVINO_INT8):
        bench.say(f"backbone: memory, {name}")
        outcome = _missing(name)
        if outcome is None:
            inputs = {
                "model": network.files[name],
                "image": path,
                "threads": bench.threads,
                "provider": _provider(name),
            }
            contenders = {name: Contender("backbone features", inputs, name)}
            outcome = bench.race(contenders, repeats=1, limit=max(bench.limit, _LIMIT), fresh=[name])[name]
        row = row_of(name, outcome)
        if outcome.status == "done":
            row["seconds"] = outcome.result["inside"]
        table.rows.append(
            {**row, "tokens": outcome.result.get("tokens", tokens), "peak_bytes": outcome.result.get("peak_bytes")}
        )
    table.notes.append("Everything: Python, libraries, weights, the photograph, its features. A new process each.")
    return table


def callers(bench: Bench, network: Network) -> Table:
    """One session called by several threads against one caller with all of them."""
    table = Table(
        "callers",
        "One session, int8: a caller with all threads against a caller for each",
        (
            Column("tokens", "tokens", "count"),
            Column("who", "who"),
            Column("seconds", "time for an image", "seconds"),
            Column("ratio", "one caller / this", "fine"),
            Column("peak_bytes", "peak memory", "megabytes"),
            Column("remark", "remark"),
        ),
    )
    if bench.threads < 2:
        table.notes.append("Not measured: one processor is granted to this process.")
        return table
    tokens = (bench.options.tokens or (_QUICK_TOKENS if bench.quick else _TOKENS[1:2]))[0]
    inputs = network_inputs(bench, network, data.grid_of(tokens))
    images = 2 * bench.threads
    shapes = {
        f"1 caller, {bench.threads} threads": (1, bench.threads),
        f"{bench.threads} callers, 1 thread each": (bench.threads, 1),
    }
    bench.say("backbone: several callers")
    found = bench.race(
        {
            who: Contender(
                "backbone callers",
                {**inputs, "model": network.files[INT8], "callers": count, "threads": threads, "images": images},
                who,
            )
            for who, (count, threads) in shapes.items()
        },
        limit=max(bench.limit, _LIMIT),
        fresh=list(shapes),
    )
    first = found[next(iter(shapes))].seconds
    for who, outcome in found.items():
        seconds = None if outcome.seconds is None else outcome.seconds / images
        row = {
            **row_of(INT8, outcome),
            "who": who,
            "tokens": tokens,
            "seconds": seconds,
            "peak_bytes": outcome.peak_bytes,
        }
        row["ratio"] = first / outcome.seconds if first and outcome.seconds and outcome.status == "done" else None
        table.rows.append(row)
    return table


def cosines(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosine between the rows of two arrays, (N, C) each.

    Returns
    -------
    (N,) float64 array
    """
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    result: npt.NDArray[np.float64] = np.einsum("nc,nc->n", one, other) / lengths
    return result


def _race(bench: Bench, network: Network, tokens: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one size: everybody in turns, each in a process of its own."""
    grid = data.grid_of(tokens)
    inputs = {**network_inputs(bench, network, grid), "threads": threads}
    outcomes: dict[str, Outcome] = {}
    contenders: dict[str, Contender] = {}
    for name, file in network.files.items():
        if name == FLOAT16 and tokens > _MOST_TOKENS_ONE_THREAD:
            continue
        gone = _missing(name) or (_too_large(network.vit, grid) if name in (PLAIN, PLAIN_GIVEN) else None)
        if gone is not None:
            outcomes[name] = gone
            continue
        own = {**inputs, "keys": str(bench.folder / f"keys-{len(contenders)}.npy")}
        if name in (PLAIN, PLAIN_GIVEN):
            own |= {"graph": file}
            if name == PLAIN:
                own["positions"] = None
            contenders[name] = Contender("backbone plain", own, name)
        elif name in _TORCH_TYPES:
            contenders[name] = Contender("backbone torch", {**own, "weights": file, "dtype": _TORCH_TYPES[name]}, name)
        else:
            contenders[name] = Contender("backbone", {**own, "model": file, "provider": _provider(name)}, name)
    outcomes |= bench.race(contenders, limit=max(bench.limit, _LIMIT), fresh=list(contenders))
    compared = compared_keys(contenders, FLOAT32)
    rows = []
    for name in network.files:
        if name not in outcomes:
            continue
        outcome = outcomes[name]
        row = {**row_of(name, outcome), "tokens": grid[0] * grid[1], "threads": threads}
        if outcome.status == "done":
            row["cpu_seconds"] = _cost(outcome, 1)
            if outcome.peak_bytes is not None and outcome.base_bytes is not None:
                row["growth_bytes"] = outcome.peak_bytes - outcome.base_bytes
            for key, peer in (("ratio", PLAIN), ("ratio_torch", TORCH), ("ratio_torch_half", TORCH_HALF)):
                # Where the table can't be resized in a graph, the export that is given it stands in.
                other = outcomes.get(peer) or outcomes[PLAIN_GIVEN]
                if name != peer and other.status == "done":
                    row[key] = _cost(other, threads) / _cost(outcome, threads)
            row |= compared.get(name, {})
        rows.append(row)
    return rows


def _cost(outcome: Outcome, threads: int) -> float:
    """Processor time of one thread's best run, which other work on the machine disturbs less; else its time."""
    if threads > 1:
        assert outcome.seconds is not None
        return outcome.seconds
    return float(min(result["cpu_seconds"] for _, result in outcome.runs))


def compared_keys(contenders: Mapping[str, Contender], reference: str) -> dict[str, dict[str, float]]:
    """Compare the keys that contenders wrote to files, which are deleted, with those of one of them."""
    paths = {name: Path(contender.inputs["keys"]) for name, contender in contenders.items()}
    written = {name: np.load(path) for name, path in paths.items() if path.exists()}
    for path in paths.values():
        path.unlink(missing_ok=True)
    expected = written.pop(reference, None)
    if expected is None:
        return {}
    found = {name: cosines(keys, expected) for name, keys in written.items()}
    return {name: {"cosine_mean": float(c.mean()), "cosine_least": float(c.min())} for name, c in found.items()}


def row_of(name: str, outcome: Outcome) -> dict[str, Any]:
    """Give the part of a row that is the same in every table."""
    return {
        "who": name,
        "ours": name.startswith("sparsespec") and outcome.status != "missing",
        "status": outcome.status,
        "seconds": None if outcome.status == "out of time" else outcome.seconds,
        "remark": outcome.remark,
    }


def _missing(name: str) -> Outcome | None:
    needs = {OPENVINO: "openvino", OPENVINO_INT8: "openvino", TORCH: "torch", TORCH_HALF: "torch"}
    reason = peers.missing(needs[name]) if name in needs else None
    return None if reason is None else Outcome("missing", remark=reason)


def _provider(name: str) -> str:
    return "openvino" if name in (OPENVINO, OPENVINO_INT8) else "cpu"


def _too_large(vit: Vit, grid: tuple[int, int]) -> Outcome | None:
    """Say so where a plain export would take more than half of the machine's memory."""
    rows = grid[0] * grid[1] + len(vit.prefix)
    wanted = _SCORES_HELD * 4 * vit.heads * rows**2 / 1e9
    have = machine.describe(1)["memory_gb"]
    if have is None or wanted < have / 2:
        return None
    return Outcome("not run", remark=f"its attention would take {wanted:.1f} of {have} GB")


def _photograph(bench: Bench) -> npt.NDArray[np.float32]:
    return to_rgb_float(next(iter(bench.photos.values())))


def network_inputs(bench: Bench, network: Network, grid: tuple[int, int]) -> dict[str, Any]:
    """Write the pixels and positions of a grid, and return the inputs that name them."""
    vit = network.vit
    size = (grid[0] * vit.patch_size, grid[1] * vit.patch_size)
    pixels = (resize(_photograph(bench), size) - np.array(vit.mean, np.float32)) / np.array(vit.std, np.float32)
    rows = resize_positions(vit.positions, grid, rule=vit.rule).reshape(-1, vit.embed_dim)
    positions = np.concatenate([vit.prefix, rows])[None]
    paths = {name: str(bench.folder / f"{name}-{grid[0]}x{grid[1]}.npy") for name in ("image", "positions")}
    np.save(paths["image"], np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32))
    np.save(paths["positions"], positions.astype(np.float32))
    return {**paths, "patch": vit.patch_size, "prefix": len(vit.prefix)}
