"""``sparsespec run``: segment images and write the results."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._method import method_option
from ._progress import Progress
from ._provider import provider_options as with_provider
from ._storage import storage_options as with_storage

if TYPE_CHECKING:
    from sparsespec.backbone import Backbone
    from sparsespec.batch import BatchResult
    from sparsespec.batch.job import Engine, ImageSegmenter, ShardEngine
    from sparsespec.formats.table import TableKind

__all__ = ["open_backbone", "run_command"]

_SOME_FAILED = 1
_CONTINUE = "give the same command again to go on"
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
    metavar="DIR|FILE|GLOB|URL",
    help="A folder (searched with everything below it), one image, a quoted pattern such as 'photos/**/*.jpg', or a URL"
    " such as s3://bucket/photos.",
)
@click.option(
    "--output",
    default="sparsespec-out",
    show_default=True,
    metavar="DIR|URL",
    help="Folder of the results, made if need be; or a URL such as s3://bucket/results.",
)
@with_storage
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
@method_option
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
@click.option(
    "--engine",
    type=click.Choice(["inline", "processes", "dask"]),
    help="How work is spread: threads of this process; worker processes, which a file can end but not the run; or a"
    " Dask cluster. Default: 'inline', with a limit on time or memory 'processes'. Results don't depend on it.",
)
@click.option(
    "--dask-scheduler",
    metavar="tcp://HOST:PORT",
    help="Scheduler of a running Dask cluster, for --engine dask; without it a cluster is started on this machine.",
)
@click.option(
    "--time-limit",
    type=PositiveNumber(),
    metavar="SECONDS",
    help="Give up an image that takes longer. Not with --engine inline.",
)
@click.option(
    "--memory-limit",
    type=PositiveNumber(),
    metavar="MB",
    help="Give up an image whose worker process takes more memory. Linux, --engine processes.",
)
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
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the results of an earlier run in the output folder. Without it the same run goes on where it was"
    " ended, and another one is refused.",
)
@click.option("--prune", is_flag=True, help="Remove results of an earlier run whose images are no longer in the input.")
@click.option(
    "--retry-quarantined",
    is_flag=True,
    help="Try images again that ended their process, or took too long, in an earlier run. Others that failed are"
    " tried again in any case.",
)
@click.option("--fail-fast", is_flag=True, help="End the run with the first image that fails.")
@click.option("--follow-links", is_flag=True, help="Read images through links that lead out of the input folder.")
@click.option("--no-overlays", is_flag=True, help="Leave out the overlays: less time, less space.")
@click.option("--cutouts", is_flag=True, help="Write each instance by itself, on a transparent ground: cutouts/*.png.")
@click.option("--polygons", is_flag=True, help="Outlines in instances.json instead of run-length encodings.")
@click.option("--yolo", is_flag=True, help="Write labels for YOLO segmentation: yolo/labels/*.txt.")
@click.option(
    "--table", type=click.Choice(["csv", "parquet"]), help="Write a table of all instances: instances.csv or .parquet."
)
@click.option(
    "--youtube-vis",
    is_flag=True,
    help="Link instances from frame to frame of each folder, and write a YouTube-VIS submission: youtube_vis.json.",
)
@click.option(
    "--video-list",
    type=click.Path(),
    metavar="FILE",
    help="JSON file of a data set with the numbers of its videos, for --youtube-vis; else they are numbered from 1.",
)
@click.option(
    "--coco-shards",
    is_flag=True,
    help="COCO JSON for each shard of the images, instances/*.json, instead of one instances.json.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(64, 512),
    default=128,
    show_default=True,
    metavar="N",
    help="Images noted together, and sent together to a Dask worker.",
)
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
    output: str,
    storage_options: dict[str, str],
    model: str,
    provider: str,
    provider_options: dict[str, str],
    n_instances: int | None,
    method: str,
    directions: str | None,
    workers: int | None,
    engine: str | None,
    dask_scheduler: str | None,
    time_limit: float | None,
    memory_limit: float | None,
    long_side: int | None,
    scale: float | None,
    megapixels: float | None,
    max_megapixels: float | None,
    overwrite: bool,
    prune: bool,
    retry_quarantined: bool,
    fail_fast: bool,
    follow_links: bool,
    no_overlays: bool,
    cutouts: bool,
    polygons: bool,
    yolo: bool,
    table: TableKind | None,
    youtube_vis: bool,
    video_list: str | None,
    coco_shards: bool,
    shard_size: int,
    seed: int,
) -> None:
    """Segment every image of a folder, a pattern, a URL, or one file.

    \b
    Written to the output:
      masks/<path>.png      label image: 0 is background, 1, 2, ... the objects
      overlays/<path>.jpg   the photograph with outlines, colours and scores
      instances.json        COCO: boxes, run-length masks, scores
      run.json              parameters, machine, and what became of each image
      report.html           a page to look at it all

    An image that cannot be read or segmented is listed on stderr and in run.json, and the run goes on. A run that was
    ended, by Ctrl-C, a crash or a power cut, goes on where it stood when the same command is given again.

    \b
    Examples
      sparsespec run --input photos/
      sparsespec run --input cat.jpg --output cat/ --n-instances 1
      sparsespec run --input 'scans/2024-*/*.tif' --output out/ --no-overlays
      sparsespec run --input mosaic.tif --output mosaic/ --megapixels 4
      sparsespec run --input photos/ --provider cuda --provider-option device_id=1
      sparsespec run --input fish/ --output out/ --directions fish.npz
      sparsespec run --input uploads/ --output out/ --engine processes --time-limit 60
      sparsespec run --input s3://bucket/photos --output s3://bucket/masks --engine dask --dask-scheduler tcp://10.0.0.5:8786

    Exit codes: 0 all images done, 1 some failed or results could not be written, 2 wrong usage, 130 interrupted.
    """
    # Before NumPy is loaded: its matrices are small here, and threads that wait for each other cost more than they save
    # as soon as anything else runs on the machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from sparsespec.batch import Formats, InputsError, OutputsError, find_inputs, open_store, run_batch
    from sparsespec.images import DEFAULT_MAX_PIXELS

    if method == "paper" and n_instances is None:
        raise click.UsageError("--method paper needs the number of objects: add --n-instances N.", ctx)
    if method == "paper" and directions not in ("default", None):
        raise click.UsageError("--method paper uses no directions: leave --directions out.", ctx)
    limited = time_limit is not None or memory_limit is not None
    if engine == "inline" and limited:
        raise click.UsageError("threads cannot be stopped: give a limit together with --engine processes.", ctx)
    if engine == "dask" and memory_limit is not None:
        raise click.UsageError(
            "--memory-limit goes with --engine processes; workers of Dask have limits of their own.", ctx
        )
    engine = engine or ("processes" if limited else "inline")
    if dask_scheduler is not None and engine != "dask":
        raise click.UsageError("--dask-scheduler goes with --engine dask.", ctx)
    if video_list is not None and not youtube_vis:
        raise click.UsageError("--video-list goes with --youtube-vis.", ctx)
    if memory_limit is not None and memory_limit < 1:
        raise click.UsageError(f"--memory-limit {memory_limit:g} is in megabytes: give 1 or more.", ctx)
    if engine == "dask" and importlib.util.find_spec("distributed") is None:  # before the output is made
        raise click.UsageError("--engine dask needs the package distributed: pip install 'sparsespec[dask]'.", ctx)
    if video_list is not None:
        try:
            with open(video_list, "rb"):
                pass
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise click.UsageError(f"cannot read the --video-list '{_shown(video_list)}': {reason}.", ctx) from error
    size = _size(ctx, long_side, scale, megapixels)
    try:
        inputs = find_inputs(source, output=output, storage_options=storage_options)
        target = open_store(output, storage_options)
    except (InputsError, OutputsError, ImportError, OSError) as error:
        raise click.UsageError(f"{_one_line(error)}.", ctx) from error
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
    running: dict[str, Any] = {"provider": provider, "provider_options": provider_options}
    shared: dict[str, Any] = {"threads": threads, "workers": at_once if engine == "inline" else 1}
    segmenter = _segmenter(ctx, model, n_instances, method, seed, size, directions, **running, **shared)
    parameters = {
        # A URL without what may be secret in it.
        "input": source if inputs.store is None else inputs.store.place,
        "model": model,
        "provider": provider,
        **({"provider_options": provider_options} if provider_options else {}),
        "n_instances": "auto" if n_instances is None else n_instances,
        "method": method,
        **_recorded(directions, model),
        **size,
        **({} if max_megapixels is None else {"max_megapixels": max_megapixels}),
        "seed": seed,
    }
    progress = Progress(len(inputs.images) + len(inputs.unlisted))
    try:
        with progress:
            result = run_batch(
                segmenter,
                inputs,
                target,
                engine=_engine(ctx, engine, at_once, workers, dask_scheduler, memory_limit),
                formats=Formats(
                    overlays=not no_overlays,
                    cutouts=cutouts,
                    yolo=yolo,
                    polygons=polygons,
                    coco_shards=coco_shards,
                    table=table,
                    youtube_vis=youtube_vis,
                    video_list=video_list,
                ),
                overwrite=overwrite,
                prune=prune,
                max_pixels=DEFAULT_MAX_PIXELS if max_megapixels is None else max(1, round(max_megapixels * 1e6)),
                follow_links=follow_links,
                time_limit=time_limit,
                fail_fast=fail_fast,
                retry_quarantined=retry_quarantined,
                shard_size=shard_size,
                parameters=parameters,
                execution={"output": target.place, "overwrite": overwrite},
                progress=progress.update,
                on_stop=progress.stopping,
            )
    except (OutputsError, ValueError) as error:
        raise click.UsageError(f"{_one_line(error)}.", ctx) from error
    except ImportError as error:
        raise click.UsageError(f"{_one_line(error)}.", ctx) from error
    except KeyboardInterrupt:
        ctx.exit(_INTERRUPTED)
    except OSError as error:
        click.echo(f"sparsespec: cannot write the results: {_one_line(error)}; {_CONTINUE}", err=True)
        ctx.exit(_SOME_FAILED)
    except RuntimeError as error:  # workers or a cluster that cannot be started, or were lost
        text = _one_line(error)
        click.echo(f"sparsespec: {text}" if "go on" in text else f"sparsespec: {text}; {_CONTINUE}", err=True)
        ctx.exit(_SOME_FAILED)
    if result.blocked is not None:
        click.echo(f"sparsespec: {result.blocked}; {_CONTINUE}", err=True)
    click.echo(_summary(result))
    if result.interrupted:
        ctx.exit(_INTERRUPTED)
    # Nothing should be left out without a reason; if it is, the state was damaged meanwhile, and this is no success.
    if result.count("failed") or result.count("skipped") or result.blocked is not None:
        ctx.exit(_SOME_FAILED)


def _engine(
    ctx: click.Context,
    name: str,
    at_once: int,
    workers: int | None,
    scheduler: str | None,
    memory_limit: float | None,
) -> Engine | ShardEngine:
    from sparsespec.batch import Inline

    if name == "inline":
        return Inline(at_once)
    try:
        if name == "processes":
            from sparsespec.batch.processes import Processes

            return Processes(at_once, memory_limit=None if memory_limit is None else round(memory_limit * 1e6))
        from sparsespec.batch.cluster import Cluster

        return Cluster(scheduler, workers=workers if scheduler is not None else at_once)
    except (ValueError, ImportError) as error:
        raise click.UsageError(f"{_one_line(error)}.", ctx) from error


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
    """Say which files a run uses: SHA-256 of the model and of the directions, null where there are none."""
    from sparsespec.models import read_trunk_metadata, resolve, shipped_directions

    network = resolve(model)
    if directions == "default":
        file = shipped_directions(read_trunk_metadata(network).features_sha256())
    else:
        file = None if directions is None else Path(directions)
    return {
        "model_sha256": _sha256(network),
        "directions": directions or "none",
        "directions_sha256": None if file is None else _sha256(file),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: Exception) -> str:
    return _shown(" ".join(str(error).split())) or type(error).__name__


def _shown(text: str) -> str:
    from sparsespec.formats.report import readable_name

    return readable_name(text)


def _report(output: str) -> str:
    return f"{output.rstrip('/')}/report.html" if "://" in output else os.path.join(output, "report.html")


def _summary(result: BatchResult) -> str:
    from sparsespec.formats.report import readable_duration

    done, failed, skipped = (result.count(status) for status in ("done", "failed", "skipped"))
    earlier = f" ({result.earlier} earlier)" if result.earlier else ""
    parts = [f"{done} done{earlier}", f"{failed} failed"]
    if skipped:
        parts.append(f"{skipped} not reached")
    parts.append(f"{result.instances} instance{'' if result.instances == 1 else 's'}")
    parts.append(readable_duration(result.seconds))
    head = "interrupted: " if result.interrupted else "ended at the first failure: " if result.stopped else ""
    # Of many images, an interrupted run writes no report when it is interrupted once more.
    place = f"look at {_report(result.output)}" if result.counts.get("images") else f"results in {result.output}"
    return f"{head}{', '.join(parts)}; {_shown(place)}"
