"""``sparsespec bench image``: whole photographs, stage by stage, their memory, and what tiles change."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.benchmark import data
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.measure import Contender, Outcome
from sparsespec.evaluation.benchmark.report import OURS, Column, Table, contest

__all__ = ["run", "stages_of"]

_PIXELS = 640
"""Longer side of a photograph of about 480p."""
_PAPER_INSTANCES = 3
_LARGE_MEGAPIXELS = 12.0
# As "sparsespec run" has it: the matrices of one photograph are small.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
# Large pictures take their time, nearly all of it in the network.
_LARGE_LIMIT = 600.0
_SEAM_SIDE, _SEAM_TOKENS = 896, 1024
_TILE = 512


def run(bench: Bench) -> list[Table]:
    """Measure everything about images."""
    return [stages(bench), large(bench), peak_memory(bench), seams(bench)]


def stages_of(outcome: Outcome) -> dict[str, float]:
    """Seconds of each stage, the smallest over the runs, and the share of all after the features in theirs.

    Returns
    -------
    dict
        The stages of ``Segmentation.info["seconds"]`` without the total, then ``after`` (everything but the features)
        and ``share``, ``after`` over the features.
    """
    runs = [result["stages"] for _, result in outcome.runs]
    least = {name: min(run.get(name, 0.0) for run in runs) for name in runs[0] if name != "total"}
    # From totals, so that what is between the stages counts as well.
    after = min(run["total"] - run["features"] for run in runs)
    return {**least, "after": after, "share": after / least["features"]}


def stages(bench: Bench) -> Table:
    """Photographs of about 480p: each stage, and the published method's after the features."""
    table = Table("stages", f"Photographs of {_PIXELS} pixels, seconds by stage", ())
    kept: list[dict[str, float]] = []
    everyday = _everyday(bench)
    for name in everyday[:2] if bench.quick else everyday:
        bench.say(f"image: {name}")
        picture = data.long_side(bench.photos[name], _PIXELS)
        path = _save(bench, picture)
        found = bench.race(
            {
                OURS: Contender("segment", {"image": path}, "image"),
                "paper": Contender(
                    "segment", {"image": path, "method": "paper", "n_instances": _PAPER_INSTANCES}, "image-2"
                ),
            },
            environment=_ENVIRONMENT,
        )
        own, paper = found[OURS], found["paper"]
        row: dict[str, Any] = {"image": name, "ours": True, "status": own.status, "remark": own.remark}
        if own.status == "done":
            figures = stages_of(own)
            kept.append(figures)
            row |= _figures(own, figures)
            if paper.status == "done":
                after = stages_of(paper)["after"]
                row |= {"peer_after": after, "ratio": after / figures["after"]}
            else:
                row["remark"] = f"published method: {paper.status} {paper.remark}"
        table.rows.append(row)
    table.columns = (
        Column("image", "photograph"),
        Column("tokens", "tokens", "count"),
        Column("instances", "instances", "count"),
        Column("crops", "crops", "count"),
        *_stage_columns(kept[0] if kept else {}),
        Column("peer_after", "published method, after", "seconds"),
        Column("ratio", "peer / ours", "ratio"),
        Column("remark", "remark"),
    )
    if kept:
        share = sum(figures["after"] for figures in kept) / sum(figures["features"] for figures in kept)
        table.notes.append(f"All photographs together: {share:.1%} of the time of the features.".replace("%", " %"))
    table.notes.append(
        "*Share* is everything after the features over the features, those of the crops included. "
        f'The published method is `method="paper"`, dense, told to find {_PAPER_INSTANCES} instances, without crops.'
    )
    return table


def large(bench: Bench) -> Table:
    """One large photograph: each stage, at the default size for the network and with a token for every 14 pixels."""
    megapixels = 1.0 if bench.quick else _LARGE_MEGAPIXELS
    table = Table("large", "A large photograph, seconds by stage", ())
    picture, name = bench.large, "mosaic"
    if picture is None:
        picture = _mosaic(bench, megapixels)
    elif bench.options.large is not None:
        name = bench.options.large.name
    size = picture.shape[0] * picture.shape[1] / 1e6
    path = _save(bench, picture)
    figures: dict[str, float] = {}
    sides: dict[str, dict[str, int]] = {"default": {}}
    if not bench.quick:
        sides["every pixel"] = {"long_side": max(picture.shape[:2])}
    for shown, setting in sides.items():
        bench.say(f"image: {name}, {size:.0f} megapixels, {shown}")
        own = bench.race(
            {OURS: Contender("segment", {"image": path, **setting}, "image")},
            repeats=min(2, bench.repeats),
            limit=max(bench.limit, _LARGE_LIMIT),
            environment=_ENVIRONMENT,
        )[OURS]
        row: dict[str, Any] = {"image": name, "megapixels": size, "network": shown, "ours": True}
        row |= {"status": own.status, "remark": own.remark}
        if own.status == "done":
            figures = stages_of(own)
            row |= _figures(own, figures)
        table.rows.append(row)
    table.columns = (
        Column("image", "picture"),
        Column("megapixels", "megapixels", "number"),
        Column("network", "the network sees"),
        Column("tokens", "tokens", "count"),
        Column("instances", "instances", "count"),
        Column("crops", "crops", "count"),
        *_stage_columns(figures),
        Column("remark", "remark"),
    )
    return table


def peak_memory(bench: Bench) -> Table:
    """Most resident memory of a process that segments one picture from a tiled TIFF."""
    import tifffile

    table = Table(
        "memory",
        "Peak resident memory, one picture from a tiled TIFF, a new process each",
        (
            Column("megapixels", "megapixels", "number"),
            Column("tokens", "tokens", "count"),
            Column("seconds", "time", "seconds"),
            Column("peak_bytes", "peak memory", "megabytes"),
            Column("remark", "remark"),
        ),
    )
    usual = (1.0, 4.0) if bench.quick else (12.0, 48.0, 200.0)
    for size in sorted(bench.options.megapixels or usual):
        bench.say(f"image: memory at {size:g} megapixels")
        path = bench.folder / "large.tif"
        picture = _mosaic(bench, size)
        tifffile.imwrite(path, picture, tile=(_TILE, _TILE), photometric="rgb")
        del picture
        contender = Contender("segment file", {"path": str(path)}, "image")
        own = bench.race(
            {OURS: contender}, repeats=1, limit=max(bench.limit, _LARGE_LIMIT), fresh=[OURS], environment=_ENVIRONMENT
        )[OURS]
        path.unlink()
        row = contest({"megapixels": size}, own, extras=["tokens", "stages"])[0]
        row["peak_bytes"] = own.peak_bytes
        if own.status == "done" and own.peak_bytes is None:
            row["remark"] = "this system doesn't say"
        table.rows.append(row)
    table.notes.append("The whole process's: libraries, network, picture and masks.")
    return table


def seams(bench: Bench) -> Table:
    """The same photographs in one piece and in tiles."""
    table = Table(
        "seams",
        f"Labels of photographs at {_SEAM_SIDE} pixels in tiles of at most {_SEAM_TOKENS} tokens, against one piece",
        (
            Column("image", "photograph"),
            Column("tokens", "tokens", "count"),
            Column("tiles", "tiles", "count"),
            Column("instances_whole", "instances, one piece", "count"),
            Column("instances_tiled", "instances, tiles", "count"),
            Column("agreement", "same label", "percent"),
            Column("remark", "remark"),
        ),
    )
    everyday = _everyday(bench)
    agreements = []
    for name in everyday[:1] if bench.quick else everyday:
        bench.say(f"image: seams, {name}")
        picture = data.long_side(bench.photos[name], _SEAM_SIDE)
        inputs = {"image": _save(bench, picture), "long_side": _SEAM_SIDE, "max_tokens": _SEAM_TOKENS}
        own = bench.race(
            {OURS: Contender("seams", inputs, "image")}, repeats=1, limit=_LARGE_LIMIT, environment=_ENVIRONMENT
        )[OURS]
        row = {"image": name, "ours": True, "status": own.status, "remark": own.remark}
        if own.status == "done":
            agreements.append(own.result["agreement"])
            row |= {
                "tokens": own.result["tokens"],
                "tiles": own.result["tiles"][1],
                "instances_whole": own.result["instances"][0],
                "instances_tiled": own.result["instances"][1],
                "agreement": own.result["agreement"],
            }
        table.rows.append(row)
    if agreements:
        table.notes.append(f"On average {np.mean(agreements):.1%} of the pixels.".replace("%", " %"))
    table.notes.append("Instances are matched one to one so that most pixels agree, background with background.")
    return table


def _figures(own: Outcome, figures: dict[str, float]) -> dict[str, Any]:
    """Values of a row; a stage may be called what a count is called."""
    times = {f"seconds_{stage}": seconds for stage, seconds in figures.items() if stage not in ("after", "share")}
    after = {name: figures[name] for name in ("after", "share")}
    counts = {name: own.result[name] for name in ("tokens", "instances", "crops")}
    return {**counts, **times, **after}


def _stage_columns(figures: dict[str, float]) -> list[Column]:
    times = [Column(f"seconds_{stage}", stage, "seconds") for stage in figures if stage not in ("after", "share")]
    return [*times, Column("after", "all after the features", "seconds"), Column("share", "share", "percent")]


def _everyday(bench: Bench) -> list[str]:
    """Names of the photographs to segment: all of the user's."""
    names = list(bench.photos)
    return names[: data.EVERYDAY] if bench.options.images is None else names


def _mosaic(bench: Bench, megapixels: float) -> data.Photograph:
    return data.photo_mosaic([bench.photos[name] for name in _everyday(bench)], megapixels)


def _save(bench: Bench, picture: npt.NDArray[np.uint8]) -> str:
    path = bench.folder / "picture.npy"
    np.save(path, picture)
    return str(path)
