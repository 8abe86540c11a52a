"""``sparsespec bench kernels``: the k-NN graphs, exact, within a window and approximate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.benchmark import naive
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.data import MOST_REAL_TOKENS, grid_of
from sparsespec.evaluation.benchmark.measure import Contender, Outcome
from sparsespec.evaluation.benchmark.report import Column, Table, contest, growth_exponent

__all__ = ["recall", "run"]

K = 20
RECALL_WANTED = 0.95
SAMPLE = 500
# Recall is measured on a sample; a peer this little below ours counts as equal.
_EQUAL = 0.005

# From cheap to thorough; the first that reaches our recall is compared. Its graph lists a token itself, hence 21.
PYNNDESCENT_SETTINGS: tuple[dict[str, Any], ...] = (
    {"n_neighbors": K + 1, "delta": 0.01, "max_candidates": 12},
    {"n_neighbors": K + 1},
    {"n_neighbors": 31},
    {"n_neighbors": 41},
)


def run(bench: Bench) -> list[Table]:
    """Measure everything about the kernels."""
    return [exact(bench), windowed(bench), approximate(bench)]


def exact(bench: Bench) -> Table:
    """All pairs of tokens: ours against SciPy and against two loops."""
    table = Table(
        "exact",
        f"Exact k-NN graph over all tokens, {bench.channels} channels, k = {K}",
        (
            Column("tokens", "tokens", "count"),
            Column("who", "who"),
            Column("seconds", "time", "seconds"),
            Column("pairs_per_second", "10^9 pairs/s", "number"),
            Column("ratio", "peer / ours", "ratio"),
            Column("remark", "remark"),
        ),
    )
    before: dict[str, tuple[int, float]] = {}
    for tokens in bench.sizes([900], [3600, 30_502]):
        bench.say(f"kernels: exact, {tokens:,} tokens")
        grid = grid_of(tokens)
        tokens = grid[0] * grid[1]
        inputs = {"features": bench.features(grid), "n_neighbors": K}
        contenders = {
            "sparsespec": Contender("exact", inputs, "ours"),
            "SciPy cdist": Contender("scipy exact", inputs, "scipy"),
            "two loops": Contender("naive exact", inputs, "naive"),
        }
        too_long = {}
        for name, (size, seconds) in before.items():
            expected = seconds * (tokens / size) ** 2
            if name in contenders and expected > bench.limit:
                too_long[name] = Outcome("not run", remark=f"about {expected:.0f} s expected from {size:,} tokens")
                del contenders[name]
        found = {**bench.race(contenders), **too_long}
        own = found.pop("sparsespec")
        rows = contest({"tokens": tokens}, own, [(name, found[name]) for name in ("SciPy cdist", "two loops")])
        for row in rows:
            if row["seconds"]:
                row["pairs_per_second"] = tokens * (tokens - 1) / row["seconds"] / 1e9
                before[row["who"]] = (tokens, row["seconds"])
        before.pop("sparsespec", None)
        table.rows += rows
    table.notes.append(
        "Pairs are ordered pairs of different tokens. SciPy's `cdist` uses one thread; the peers end with neighbour "
        "lists, ours with the symmetric graph."
    )
    return table


def windowed(bench: Bench) -> Table:
    """Pairs within a window of the grid: edges and pairs per second, growth and memory."""
    table = Table(
        "windowed",
        f"k-NN graph within a window, {bench.channels} channels, k = {K}",
        (
            Column("radius", "radius", "count"),
            Column("tokens", "tokens", "count"),
            Column("who", "who"),
            Column("seconds", "time", "seconds"),
            Column("edges_per_second", "10^6 edges/s", "number"),
            Column("pairs_per_second", "10^6 pairs/s", "number"),
            Column("graph_bytes", "graph", "megabytes"),
            Column("beside_bytes", "beside it", "megabytes"),
            Column("ratio", "peer / ours", "ratio"),
            Column("remark", "remark"),
        ),
    )
    sizes = [grid_of(tokens) for tokens in bench.sizes([4096, 16_384], [65_536, 262_144, 1_048_576])]
    for radius in (1, 2) if bench.quick else (1, 2, 4, 8):
        times: list[tuple[int, float]] = []
        for grid in sizes:
            tokens = grid[0] * grid[1]
            bench.say(f"kernels: window of radius {radius}, {tokens:,} tokens")
            inputs = {"features": bench.features(grid), "grid": grid, "radius": radius, "n_neighbors": K}
            found = bench.race(
                {
                    "sparsespec": Contender("windowed", inputs, "ours"),
                    "two loops": Contender("naive windowed", inputs, "naive"),
                },
                fresh=[] if bench.quick else ["sparsespec"],
            )
            own = found["sparsespec"]
            rows = contest({"radius": radius, "tokens": tokens}, own, [("two loops", found["two loops"])])
            for row in rows:
                if row["seconds"]:
                    row["pairs_per_second"] = _pairs_in_windows(grid, radius) / row["seconds"] / 1e6
            if own.status == "done" and own.seconds:
                edges, size = own.result["edges"], own.result["graph_bytes"]
                rows[0] |= {"edges": edges, "edges_per_second": edges / own.seconds / 1e6, "graph_bytes": size}
                if own.peak_bytes is not None and own.base_bytes is not None:
                    rows[0]["beside_bytes"] = max(0, own.peak_bytes - own.base_bytes - size)
                times.append((tokens, own.seconds))
            table.rows += rows
        exponent = growth_exponent(*zip(*times, strict=True)) if len(times) > 1 else None
        if exponent is not None:
            table.notes.append(f"Radius {radius}: time grows as N^{exponent:.2f}.")
    table.notes.append(
        "Edges are entries of the graph (each pair twice); pairs are ordered pairs within the windows, all of which "
        "are looked at. *Beside it* is the peak of resident memory less what was resident before and less the graph."
    )
    if any(grid[0] * grid[1] > MOST_REAL_TOKENS for grid in sizes):
        table.notes.append(f"Above {MOST_REAL_TOKENS:,} tokens the features are continued by their mirror image.")
    return table


def approximate(bench: Bench) -> Table:
    """Approximate neighbours over all tokens: time and recall against pynndescent."""
    table = Table(
        "approximate",
        f"Approximate k-NN over all tokens, {bench.channels} channels, k = {K}",
        (
            Column("tokens", "tokens", "count"),
            Column("who", "who"),
            Column("seconds", "time", "seconds"),
            Column("recall", f"recall@{K}", "number"),
            Column("ratio", "peer / ours", "ratio"),
            Column("remark", "remark"),
        ),
    )
    times: list[tuple[int, float]] = []
    setting = 0
    stopped = None
    for wanted in bench.sizes([4096], [16_384, 65_536, 262_144]):
        grid = grid_of(wanted)
        tokens = grid[0] * grid[1]
        bench.say(f"kernels: approximate, {tokens:,} tokens")
        if tokens <= K:
            continue
        path = bench.features(grid)
        features = np.load(path, mmap_mode="r")
        sample = np.sort(np.random.default_rng(0).choice(tokens, min(SAMPLE, tokens), replace=False))
        np.save(bench.folder / "sample.npy", sample)
        truth = _nearest(features, sample)
        inputs = {"features": path, "n_neighbors": K, "tokens": str(bench.folder / "sample.npy")}

        own = bench.race({"sparsespec": Contender("approximate", {**inputs, "grid": grid}, "ours")})["sparsespec"]
        _judge(own, features, sample, truth, RECALL_WANTED)
        if own.status == "done" and own.seconds:
            times.append((tokens, own.seconds))
        peer = bench.unless_missing("pynndescent") or stopped
        if peer is None:
            # At equal recall: the cheapest setting that finds as many as we do.
            level = min(own.result.get("recall", RECALL_WANTED) - _EQUAL, 1.0)
            for number in range(setting, len(PYNNDESCENT_SETTINGS)):
                options = PYNNDESCENT_SETTINGS[number]
                contender = Contender("pynndescent", {**inputs, "options": options}, "pynndescent")
                # Each of its runs is long, and it is the first that is paid for compiling, outside the time.
                outcome = bench.race({"pynndescent": contender}, repeats=1 if tokens > 10_000 else None)["pynndescent"]
                _judge(outcome, features, sample, truth, level)
                if outcome.status == "done":
                    outcome.remark = ", ".join(f"{name}={value}" for name, value in options.items())
                peer, setting = outcome, number
                if outcome.status != "not reached":
                    break
            if peer is not None and peer.status == "out of time":
                stopped = Outcome("not run", remark=f"out of time at {tokens:,} tokens already")
        assert peer is not None
        table.rows += contest({"tokens": tokens}, own, [("pynndescent", peer)], ["recall"])
    exponent = growth_exponent(*zip(*times, strict=True)) if len(times) > 1 else None
    if exponent is not None:
        table.notes.append(f"Time grows as N^{exponent:.2f}.")
    table.notes.append(
        f"Recall is the share of the true {K} nearest, found by comparing all pairs, that are among those listed, over "
        f"{SAMPLE} random tokens; a tie with the last of them counts."
    )
    return table


def recall(
    found: Sequence[Sequence[int]], tokens: npt.NDArray[np.intp], worst: npt.NDArray[np.float64], features: Any, k: int
) -> float:
    """Share of the k nearest that were found.

    Parameters
    ----------
    found
        Neighbours listed for each of the tokens; the token itself, numbers below 0 and repetitions don't count.
    tokens, worst
        (M,) the tokens, and their affinity to the last of their true k nearest.
    features
        (N, C) float32.
    k
        How many nearest.

    Returns
    -------
    float
        In [0, 1].
    """
    from sparsespec.affinity import boc_edges

    listed = [sorted({int(j) for j in row if j >= 0} - {int(i)}) for i, row in zip(tokens, found, strict=True)]
    first = np.repeat(tokens, [len(row) for row in listed])
    second = np.array([j for row in listed for j in row], np.intp)
    near = boc_edges(features, first, second) >= np.repeat(worst, [len(row) for row in listed]) - 1e-6
    ends = np.cumsum([len(row) for row in listed])
    hits = [int(part.sum()) for part in np.split(near, ends[:-1])]
    return float(np.mean([min(k, count) / k for count in hits]))


def _judge(outcome: Outcome, features: Any, sample: Any, worst: Any, level: float) -> None:
    """Put the recall in the place of the neighbours, and say so if it is too low."""
    neighbours = outcome.result.pop("neighbours", None)
    if neighbours is None:
        return
    outcome.result["recall"] = recall(neighbours, sample, worst, features, K)
    if outcome.result["recall"] < level:
        outcome.status = "not reached"
        outcome.remark = f"recall below {level:.3f}"


def _nearest(features: Any, sample: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Affinity of listed tokens to the last of their k nearest, by comparing all pairs."""
    neighbours = np.full((len(sample), K), -1, np.int32)
    weights = np.zeros((len(sample), K), np.float32)
    naive.nearest_of_all(np.ascontiguousarray(features), np.asarray(sample, np.int64), neighbours, weights)
    return weights[:, -1].astype(np.float64)


def _pairs_in_windows(grid: tuple[int, int], radius: int) -> int:
    """Count ordered pairs of different tokens at most ``radius`` rows and columns apart."""
    along = []
    for side in grid:
        steps = np.arange(-min(radius, side - 1), min(radius, side - 1) + 1)
        along.append(int((side - np.abs(steps)).sum()))
    return along[0] * along[1] - grid[0] * grid[1]
