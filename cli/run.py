"""``sparsespec run``: segment images and write the results."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._progress import Progress
from ._provider import provider_options as with_provider

if TYPE_CHECKING:
    from sparsespec.backbone import Backbone
    from sparsespec.batch import BatchResult
    from sparsespec.batch.job import ImageSegmenter

__all__ = ["open_backbone", "run_command"]

_SOME_FAILED = 1
_INTERRUPTED = 130
_MOST_WORKERS = 4
_LARGE_SIDE = 672


class Count(click.ParamType):
    """``auto`` or a whole number from 1 on."""

    name = "count"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Show the values in the help text."""
        return "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number, or None for ``auto``."""
        if value is None or isinstance(value, int):
            return value
        if value.strip().lower() == "auto":
            return None
        try:
            count = int(value)
        except ValueError:
            self.fail(f"'{value}' is neither 'auto' nor a whole number.", param, ctx)
        if count < 1:
            self.fail(f"{count} is too small: give 'auto' or a number from 1 on.", param, ctx)
        return count


class Engine(click.Choice):
    """The engines of this version; those still to come are told apart from spelling mistakes."""

    planned = ("processes", "dask")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the engine's name."""
        if value in self.planned:
            self.fail(f"'{value}' is not available in this version; use 'inline'.", param, ctx)
        return super().convert(value, param, ctx)


class Directions(click.ParamType):
    """``default``, ``none`` or a file."""

    name = "directions"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Show the values in the help text."""
        return "default|none|FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | None:
        """Return ``default``, the file's path, or None for ``none``; a file of such a name is given as ``./none``."""
        if not value:
            self.fail("the name is empty: give 'default', 'none' or a file.", param, ctx)
        name = value.strip().lower()
        return None if name == "none" else name if name == "default" else value


class PositiveNumber(click.ParamType):
    """A finite number above 0."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"'{value}' is not a number.", param, ctx)
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{value} is not a number above 0.", param, ctx)
        return number


@click.command("run", short_help="Segment images and write masks, overlays, COCO JSON and a report.")
@click.option(
    "--input",
    "source",
    required=True,
    metavar="DIR|FILE|GLOB",
    help="A folder (searched with everything below it), one image, or a quoted pattern such as 'photos/**/*.jpg'.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="sparsespec-out",
    show_default=True,
    metavar="DIR",
    help="Folder of the results; made if need be.",
)
@click.option(
    "--model",
    default="default",
    show_default=True,
    metavar="NAME|FILE",
    help="A name of 'sparsespec models list', or an .onnx file.",
)
@with_provider
@click.option(
    "--n-instances",
    type=Count(),
    default="auto",
    show_default=True,
    help="Objects in each image: found out from the image, or given.",
)
@click.option(
    "--method",
    type=click.Choice(["sparse", "paper"]),
    default="sparse",
    show_default=True,
    help="'paper' follows the published method step by step; it needs --n-instances N.",
)
@click.option(
    "--directions",
    type=Directions(),
    default="default",
    show_default=True,
    help="What the network's features say about objects, learned without labels: 'default' takes what comes with the"
    " model, if anything does; 'none' lets nothing but the photograph decide; or a file of 'sparsespec fit'.",
)
@click.option(
    "--workers",
    type=Count(),
    default="auto",
    show_default=True,
    help="Images at the same time, each with its share of the processors; 'auto' is two or more where there are as many"
    " processors, unless the network is to see images larger than usual. Results don't depend on it.",
)
@click.option("--engine", type=Engine(["inline"]), default="inline", show_default=True, help="How work is spread.")
@click.option(
    "--long-side",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Bring the longer side of each image to so many pixels for the network, by default 448. Time and memory grow"
    " with the square of it, and smaller objects are seen. At most one of --long-side, --scale and --megapixels.",
)
@click.option(
    "--scale",
    type=PositiveNumber(),
    metavar="S",
    help="Pixels for the network for each pixel along a side of the image: 0.5 is half its resolution; 1, all, takes"
    " four times the time and memory of that.",
)
@click.option(
    "--megapixels",
    type=PositiveNumber(),
    metavar="M",
    help="At most so many million pixels for the network, to which larger images are reduced: time and memory grow in"
    " proportion.",
)
@click.option(
    "--max-megapixels",
    type=PositiveNumber(),
    metavar="M",
    help="Refuse images with more millions of pixels, by default 250: decoded, they take 3 to 6 MB each. Large TIFF"
    " in tiles or strips is read piece by piece, and may have 80 times as many.",
)
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run in the output folder.")
@click.option("--no-overlays", is_flag=True, help="Leave out the overlays: less time, less space.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Same images and same seed, same masks.",
)
@click.pass_context
def run_command(
    ctx: click.Context,
    source: str,
    output: Path,
    model: str,
    provider: str,
    provider_options: dict[str, str],
    n_instances: int | None,
    method: str,
    directions: str | None,
    workers: int | None,
    engine: str,
    long_side: int | None,
    scale: float | None,
    megapixels: float | None,
    max_megapixels: float | None,
    overwrite: bool,
    no_overlays: bool,
    seed: int,
) -> None:
    """Segment every image of a folder, a pattern, or one file.

    \b
    Written to the output folder:
      masks/<path>.png      label image: 0 is background, 1, 2, ... the objects
      overlays/<path>.jpg   the photograph with outlines, colours and scores
      instances.json        COCO: boxes, run-length masks, scores
      run.json              parameters, machine, and what became of each image
      report.html           a page to look at it all

    An image that cannot be read or segmented is listed on stderr and in run.json, and the run goes on.

    \b
    Examples
      sparsespec run --input photos/
      sparsespec run --input cat.jpg --output cat/ --n-instances 1
      sparsespec run --input 'scans/2024-*/*.tif' --output out/ --no-overlays
      sparsespec run --input mosaic.tif --output mosaic/ --megapixels 4
      sparsespec run --input photos/ --provider cuda --provider-option device_id=1
      sparsespec run --input fish/ --output out/ --directions fish.npz

    Exit codes: 0 all images done, 1 some failed, 2 wrong usage, 130 interrupted.
    """
    # Before NumPy is loaded: its matrices are small here, and threads that wait for each other cost more than they save
    # as soon as anything else runs on the machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from sparsespec.batch import InputsError, OutputsError, find_inputs, run_batch
    from sparsespec.images import DEFAULT_MAX_PIXELS

    if method == "paper" and n_instances is None:
        raise click.UsageError("--method paper needs the number of objects: add --n-instances N.", ctx)
    if method == "paper" and directions not in ("default", None):
        raise click.UsageError("--method paper uses no directions: leave --directions out.", ctx)
    size = _size(ctx, long_side, scale, megapixels)
    try:
        inputs = find_inputs(source, output=output)
    except InputsError as error:
        raise click.UsageError(f"{error}.", ctx) from error
    if method == "paper":
        directions = None
    from sparsespec._threads import available_cpus

    cpus = available_cpus()
    at_once = _workers(cpus, size) if workers is None else workers
    at_once = min(at_once, len(inputs.images)) or 1
    # Of each worker; before Numba is loaded, which otherwise starts a thread for each processor of the machine.
    threads = max(1, cpus // at_once)
    if "numba" not in sys.modules:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
    running: dict[str, Any] = {
        "provider": provider,
        "provider_options": provider_options,
        "threads": threads,
        "workers": at_once,
    }
    segmenter = _segmenter(ctx, model, n_instances, method, seed, size, directions, **running)
    parameters = {
        "input": source,
        "output": str(output),
        "model": model,
        "provider": provider,
        **({"provider_options": provider_options} if provider_options else {}),
        "n_instances": "auto" if n_instances is None else n_instances,
        "method": method,
        **_recorded(directions, model),
        "workers": at_once,
        "engine": engine,
        **size,
        **({} if max_megapixels is None else {"max_megapixels": max_megapixels}),
        "overlays": not no_overlays,
        "overwrite": overwrite,
        "seed": seed,
    }
    progress = Progress(len(inputs.images) + len(inputs.unlisted))
    try:
        with progress:
            result = run_batch(
                segmenter,
                inputs,
                output,
                overwrite=overwrite,
                overlays=not no_overlays,
                max_pixels=DEFAULT_MAX_PIXELS if max_megapixels is None else max(1, round(max_megapixels * 1e6)),
                workers=at_once,
                parameters=parameters,
                progress=progress.update,
            )
    except OutputsError as error:
        raise click.UsageError(f"{error}.", ctx) from error
    except OSError as error:
        click.echo(f"sparsespec: cannot write the results: {error}", err=True)
        ctx.exit(_SOME_FAILED)
    click.echo(_summary(result))
    if result.interrupted:
        ctx.exit(_INTERRUPTED)
    if result.count("failed"):
        ctx.exit(_SOME_FAILED)


def _workers(cpus: int, size: dict[str, int | float]) -> int:
    """Choose how many images to work on at once: memory grows with that, and with what the network sees."""
    usual = not size or size.get("long_side", _LARGE_SIDE + 1) <= _LARGE_SIDE
    return min(cpus, _MOST_WORKERS) if usual else 1


def _size(
    ctx: click.Context, long_side: int | None, scale: float | None, megapixels: float | None
) -> dict[str, int | float]:
    """Collect what was said about the size of the network's input: one thing or nothing."""
    options = {"long_side": long_side, "scale": scale, "megapixels": megapixels}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        said = " and ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in given.items())
        raise click.UsageError(
            f"{said} contradict each other: each sets the size of the network's input; give one.", ctx
        )
    return given


def _segmenter(
    ctx: click.Context,
    model: str,
    n_instances: int | None,
    method: str,
    seed: int,
    size: dict[str, int | float],
    directions: str | None,
    *,
    provider: str,
    provider_options: dict[str, str],
    threads: int,
    workers: int,
) -> ImageSegmenter:
    """Build the segmenter and open its model, so that what is wrong with either is said before the first image."""
    backbone = open_backbone(ctx, model, threads, workers, provider=provider, provider_options=provider_options)
    from sparsespec.pipeline import Segmenter

    options: dict[str, Any] = dict(size)
    try:
        return Segmenter(backbone, n_instances=n_instances, method=method, rng=seed, directions=directions, **options)
    except ValueError as error:
        raise click.UsageError(f"{_one_line(error)}.", ctx) from error


def open_backbone(
    ctx: click.Context,
    model: str,
    threads: int | None = None,
    concurrency: int | None = None,
    *,
    provider: str = "auto",
    provider_options: dict[str, str] | None = None,
) -> Backbone:
    """Open a model; what is wrong with it, or with what should run it, is wrong usage."""
    from sparsespec.models import resolve
    from sparsespec.providers import ProviderError, choose

    try:
        choose(provider, provider_options)
    except ValueError as error:
        raise click.UsageError(f"{_one_line(error)}.", ctx) from error
    try:
        resolve(model)  # cheap: a misspelt name is answered before anything heavy is imported
        from sparsespec.backbone import Backbone

        running: dict[str, Any] = {"provider": provider, "provider_options": provider_options}
        backbone = Backbone(model, threads=threads, concurrency=concurrency, **running)
        _ = backbone.providers
    except ProviderError as error:
        raise click.UsageError(f"{_one_line(error)}.", ctx) from error
    except Exception as error:  # ONNX Runtime has exceptions of its own for a file that it cannot open
        raise click.UsageError(f"cannot use the model '{model}': {_one_line(error)}", ctx) from error
    return backbone


def _recorded(directions: str | None, model: str) -> dict[str, str | None]:
    """Say which directions a run uses: the name or path, and the SHA-256 of the file, null where there are none."""
    from sparsespec.models import read_trunk_metadata, resolve, shipped_directions

    if directions == "default":
        file = shipped_directions(read_trunk_metadata(resolve(model)).features_sha256())
    else:
        file = None if directions is None else Path(directions)
    checksum = None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    return {"directions": directions or "none", "directions_sha256": checksum}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _summary(result: BatchResult) -> str:
    from sparsespec.formats.report import readable_duration

    done, failed, skipped = (result.count(status) for status in ("done", "failed", "skipped"))
    parts = [f"{done} done", f"{failed} failed"]
    if skipped:
        parts.append(f"{skipped} not reached")
    parts.append(f"{result.instances} instance{'' if result.instances == 1 else 's'}")
    parts.append(readable_duration(result.seconds))
    head = "interrupted: " if result.interrupted else ""
    return f"{head}{', '.join(parts)}; results in {click.format_filename(result.output)}"
