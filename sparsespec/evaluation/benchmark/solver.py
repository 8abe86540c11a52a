"""``sparsespec bench solver``: the smallest eigenpairs, on real graphs and on ones with known spectra."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsespec.evaluation.benchmark import gallery
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.data import MOST_REAL_TOKENS, grid_of
from sparsespec.evaluation.benchmark.jobs import save_graph
from sparsespec.evaluation.benchmark.measure import Contender, Outcome
from sparsespec.evaluation.benchmark.report import OURS, Column, Table, contest

__all__ = ["run"]

PAIRS = 6
RESIDUAL = 1e-5
NEIGHBOURS = 20
# A dense matrix of more tokens takes gigabytes and minutes.
_DENSE_UP_TO = 4096
# Pairs whose eigenvalues differ by less than what the residuals allow are the same.
_SAME = 10.0

# Shown name, task, family (contenders of a family share a process), and whom it needs to be installed.
_PEERS = (
    ("SciPy shift-invert", "shift-invert", "scipy", ""),
    ("ARPACK on 2I - L", "arpack", "scipy-2", ""),
    ("scikit-learn amg", "sklearn amg", "sklearn", "scikit-learn"),
    ("scikit-learn arpack", "sklearn arpack", "sklearn-2", "scikit-learn"),
    ("ncut-pytorch", "ncut-pytorch", "ncut", "ncut-pytorch"),
)
_EXTRAS = ("iterations", "residual", "values", "solver", "error")
_OWN_SOLVERS = ("dense", "arpack", "amg-lobpcg")


def run(bench: Bench) -> list[Table]:
    """Measure everything about the solver."""
    return [windowed(bench), known_spectra(bench), policy(bench)]


def windowed(bench: Bench) -> Table:
    """Six pairs of graphs of neighbours on the grid: ours against all peers."""
    from sparsespec import affinity

    table = Table(
        "windowed",
        f"{PAIRS} eigenpairs to a residual of {RESIDUAL:.0e}, graphs of the 8 neighbours on the grid, real features",
        (
            Column("graph", "weights"),
            Column("tokens", "tokens", "count"),
            Column("who", "who"),
            Column("solver", "solver"),
            Column("seconds", "time", "seconds"),
            Column("iterations", "iterations", "count"),
            Column("residual", "residual", "residual"),
            Column("peak_bytes", "peak memory", "megabytes"),
            Column("ratio", "peer / ours", "ratio"),
            Column("remark", "remark"),
        ),
    )
    stopped: dict[str, int] = {}
    sizes = bench.sizes([4096, 16_384], [4096, 16_384, 65_536, 262_144, 1_048_576])
    for wanted in sizes:
        grid = grid_of(wanted)
        tokens = grid[0] * grid[1]
        bench.say(f"solver: {tokens:,} tokens, 8 neighbours")
        path = bench.features(grid)
        features = np.load(path)
        graph = affinity.boc_knn_graph(features, NEIGHBOURS, grid=grid, radius=1)
        files = save_graph(graph, bench.folder, "windowed")
        table.rows += _against_peers(bench, {"graph": "BoC", "tokens": tokens}, {**files, "k": PAIRS}, path, stopped)
        del graph
        bench.say(f"solver: {tokens:,} tokens, 8 neighbours, sharpened")
        graph = affinity.local_affinity([features], grid)
        files = save_graph(graph, bench.folder, "sharpened")
        del graph
        own = _own(bench, {**files, "k": PAIRS}, fresh=True)
        table.rows += contest({"graph": "sharpened", "tokens": tokens}, own, extras=_EXTRAS)
        table.rows[-1]["peak_bytes"] = own.peak_bytes
    table.notes += [
        "Times are from the affinity on: Laplacian, preconditioner or factorisation, and solve.",
        "Of every answer the best pairs in the span of its vectors are judged, on our Laplacian in float64.",
        "*Sharpened* weights, exp(25 (BoC - 1)), are what the pipeline cuts.",
        "ncut-pytorch takes features, not a graph: its residual says how far its own affinity is from this problem.",
        "Iterations are those of LOBPCG, or products with the matrix for ARPACK; peers don't say.",
        "Peak memory is the whole process's, libraries and input included.",
        "A peer that was out of time is not tried on larger graphs.",
    ]
    if any(tokens > MOST_REAL_TOKENS for tokens in sizes):
        table.notes.append(f"Above {MOST_REAL_TOKENS:,} tokens the features are continued by their mirror image.")
    return table


def known_spectra(bench: Bench) -> Table:
    """Errors of eigenvalues against closed forms."""
    table = Table(
        "known spectra",
        f"{PAIRS} eigenvalues against closed forms",
        (
            Column("graph", "graph"),
            Column("tokens", "tokens", "count"),
            Column("who", "who"),
            Column("solver", "solver"),
            Column("seconds", "time", "seconds"),
            Column("iterations", "iterations", "count"),
            Column("error", "largest error", "residual"),
            Column("residual", "residual", "residual"),
            Column("ratio", "peer / ours", "ratio"),
            Column("remark", "remark"),
        ),
    )
    peers = [peer for peer in _PEERS if peer[0] in ("SciPy shift-invert", "scikit-learn amg")]
    for name, build in gallery.GRAPHS.items():
        bench.say(f"solver: {name}")
        graph, values = build(2000 if bench.quick else 40_000)
        files = {**save_graph(graph, bench.folder, "known"), "k": PAIRS}
        own = _own(bench, files, fresh=False)
        outcomes = []
        for shown, task, family, needs in peers:
            outcome = bench.unless_missing(needs)
            if outcome is None:
                contender = Contender(task, {**files, "tol": RESIDUAL}, family)
                outcome = bench.race({shown: contender})[shown]
                _judge(outcome)
            outcomes.append((shown, outcome))
        for outcome in (own, *(outcome for _, outcome in outcomes)):
            if "values" in outcome.result:
                error = float(np.abs(np.array(outcome.result["values"]) - values[:PAIRS]).max())
                outcome.result["error"] = error
                # A residual of r puts an eigenvalue within r of the one found: further away it is another one's.
                if outcome.status == "done" and error > _SAME * RESIDUAL:
                    outcome.status, outcome.remark = "not reached", "not the smallest pairs"
        tokens = graph.shape[0]
        table.rows += contest({"graph": name, "tokens": tokens}, own, outcomes, _EXTRAS)
    table.notes.append(
        "*grid* has 8 neighbours and is wrapped around at its edges: its first eigenvalue beside 0 is fourfold; "
        "*ring of cliques* has double ones, *4 components* has four zeros."
    )
    return table


def policy(bench: Bench) -> Table:
    """What ``solver="auto"`` costs against each solver it could have chosen."""
    from sparsespec import affinity

    table = Table(
        "policy",
        f'{PAIRS} eigenpairs, {NEIGHBOURS} nearest of all tokens: solver="auto" against each solver',
        (
            Column("tokens", "tokens", "count"),
            Column("who", "asked for"),
            Column("solver", "ran"),
            Column("seconds", "time", "seconds"),
            Column("iterations", "iterations", "count"),
            Column("residual", "residual", "residual"),
            Column("ratio", "solver / auto", "ratio"),
            Column("remark", "remark"),
        ),
    )
    sizes = bench.sizes([1024], [1024, 3600, 10_000, 30_502])
    for wanted in sizes:
        grid = grid_of(wanted)
        tokens = grid[0] * grid[1]
        bench.say(f"solver: policy, {tokens:,} tokens")
        features = np.load(bench.features(grid))
        method = "exact" if tokens <= 40_000 else "auto"
        graph = affinity.boc_knn_graph(features, NEIGHBOURS, method=method)
        inputs = {**save_graph(graph, bench.folder, "policy"), "k": PAIRS, "tol": RESIDUAL}
        contenders = {
            solver: Contender("eigenpairs", {**inputs, "solver": solver}, solver if number else "ours")
            for number, solver in enumerate(("auto", *_OWN_SOLVERS))
            if solver != "dense" or tokens <= _DENSE_UP_TO
        }
        found = bench.race(contenders)
        for name, outcome in found.items():
            _judge(outcome)
            ran = outcome.result.get("solver")
            if outcome.status == "done" and name not in ("auto", ran):
                outcome.status, outcome.remark = "not reached", f"{ran} gave the answer"
        own = found.pop("auto")
        for name in _OWN_SOLVERS:
            found.setdefault(name, Outcome("not run", remark=f"dense matrices end at {_DENSE_UP_TO:,} tokens"))
        others = [(name, found[name]) for name in _OWN_SOLVERS]
        table.rows += contest({"tokens": tokens}, own, others, _EXTRAS, name="auto")
        done = [outcome.seconds for _, outcome in others if outcome.status == "done" and outcome.seconds]
        if done and own.status == "done" and own.seconds:
            share = own.seconds / min(done)
            table.rows[-len(others) - 1]["over_fastest"] = share
            table.notes.append(f"{tokens:,} tokens: auto takes {share:.2f} x the time of the fastest.")
    return table


def _own(bench: Bench, inputs: dict[str, Any], *, fresh: bool) -> Outcome:
    contender = Contender("eigenpairs", {**inputs, "solver": "auto", "tol": RESIDUAL}, "ours")
    outcome = bench.race({OURS: contender}, fresh=[OURS] if fresh else [])[OURS]
    _judge(outcome)
    return outcome


def _against_peers(
    bench: Bench, group: dict[str, Any], inputs: dict[str, Any], features: str, stopped: dict[str, int]
) -> list[dict[str, Any]]:
    """Race ours against the peers; ``stopped`` remembers who ran out of time at which size."""
    contenders = {OURS: Contender("eigenpairs", {**inputs, "solver": "auto", "tol": RESIDUAL}, "ours")}
    outcomes: dict[str, Outcome] = {}
    for name, task, family, needs in _PEERS:
        known = bench.unless_missing(needs)
        if known is None and name in stopped:
            known = Outcome("not run", remark=f"out of time at {stopped[name]:,} tokens already")
        if known is not None:
            outcomes[name] = known
        elif task == "ncut-pytorch":
            contenders[name] = Contender(task, {**inputs, "features": features}, family)
        else:
            contenders[name] = Contender(task, {**inputs, "tol": RESIDUAL}, family)
    # In a quick run processes are used again, and only ours begins anew for its memory.
    outcomes |= bench.race(contenders, fresh=[OURS] if bench.quick else list(contenders))
    own = outcomes[OURS]
    for name, outcome in outcomes.items():
        if outcome.status == "out of time":
            stopped[name] = group["tokens"]
        _judge(outcome)
    _compare_values(own, [outcome for name, outcome in outcomes.items() if name != OURS])
    peers = [(name, outcomes[name]) for name, *_ in _PEERS]
    rows = contest(group, own, peers, _EXTRAS)
    for row in rows:
        if not bench.quick or row["who"] == OURS:
            row["peak_bytes"] = outcomes[row["who"]].peak_bytes
    return rows


def _judge(outcome: Outcome) -> None:
    """Say so where the residual asked for was not reached."""
    residual = outcome.result.get("residual")
    if outcome.status == "done" and residual is not None and residual > RESIDUAL:
        outcome.status = "not reached"
        outcome.remark = "residual not reached"


def _compare_values(own: Outcome, peers: list[Outcome]) -> None:
    """Small residuals don't make a pair one of the smallest: whoever missed one, we or a peer, has not done it."""
    done = [outcome for outcome in (own, *peers) if outcome.status == "done" and "values" in outcome.result]
    if not done:
        return
    least = np.min([outcome.result["values"] for outcome in done], axis=0)
    for outcome in done:
        if (np.array(outcome.result["values"]) - least > _SAME * RESIDUAL).any():
            outcome.status, outcome.remark = "not reached", "not the smallest pairs"
