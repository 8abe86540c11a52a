"""``sparsespec fit``: learn directions of the features from a folder of photographs, without labels."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._progress import Progress
from ._provider import provider_options as with_provider
from .run import open_backbone

if TYPE_CHECKING:
    from sparsespec.backbone import Backbone, TokenFeatures
    from sparsespec.batch import Inputs

__all__ = ["fit_command"]

_SOME_FAILED = 1
_FEW = 20


@click.command("fit", short_help="Learn directions for 'run' from photographs of your own, without labels.")
@click.option(
    "--input",
    "source",
    required=True,
    metavar="DIR|FILE|GLOB",
    help="A folder of photographs (searched with everything below it), one image, or a quoted pattern.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File to write, such as mine.npz.",
)
@click.option(
    "--model",
    default="default",
    show_default=True,
    metavar="NAME|FILE",
    help="The network that the directions are for: a name of 'sparsespec models list', or an .onnx file.",
)
@with_provider
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    metavar="N",
    help="At most so many photographs, evenly spread over the sorted list.",
)
@click.option(
    "--long-side",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Bring the longer side of each photograph to so many pixels for the network, by default 448. Best the size at"
    " which photographs will be segmented.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads to use.  [default: the processors granted to this process]",
)
@click.option("--overwrite", is_flag=True, help="Replace the output file.")
@click.pass_context
def fit_command(
    ctx: click.Context,
    source: str,
    output: Path,
    model: str,
    provider: str,
    provider_options: dict[str, str],
    limit: int,
    long_side: int | None,
    threads: int | None,
    overwrite: bool,
) -> None:
    """Fit directions of the network's features to photographs: how object-like a token is, and where in its object.

    The method is its own teacher: nothing is drawn or labelled. Directions come with the model of the package; fit your
    own for another network, or for photographs that look like no others. Twenty photographs will do, a hundred are
    better. They have to be upright, and to show objects.

    The features of all photographs are held in memory, 1.8 MB for each at the usual size and four times as much at
    twice the long side. On two cores 300 photographs take some two minutes.

    A photograph that cannot be read is listed on stderr and left out.

    \b
    Examples
      sparsespec fit --input photos/ --output mine.npz
      sparsespec run --input photos/ --directions mine.npz

    Exit codes: 0 fitted to all photographs, 1 some could not be read or nothing could be fitted, 2 wrong usage, 130
    interrupted.
    """
    # As for "sparsespec run", before NumPy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from sparsespec.batch import InputsError, find_inputs

    _check_output(ctx, output, overwrite)
    try:
        inputs = find_inputs(source)
    except (InputsError, ImportError, OSError) as error:
        raise click.UsageError(f"{error}.", ctx) from error
    backbone = open_backbone(ctx, model, threads, provider=provider, provider_options=provider_options)

    from sparsespec._atomic import write_atomic
    from sparsespec._threads import limited_threads
    from sparsespec.fitting import fit_directions

    chosen = _spread(inputs.images, limit)
    with Progress(len(inputs.unlisted) + len(chosen)) as progress, limited_threads(threads):
        photographs, failed = _features(backbone, inputs, chosen, long_side, progress)
        if not photographs:
            progress.erase()
            _fail(ctx, f"none of the {len(chosen)} photographs could be read")
        try:
            directions = fit_directions(photographs, source_sha256=backbone.features_sha256, progress=progress.show)
        except ValueError as error:
            progress.erase()
            _fail(ctx, " ".join(str(error).split()))
    try:
        write_atomic(output, directions.to_bytes())
    except OSError as error:
        click.echo(f"sparsespec: cannot write {click.format_filename(output)}: {error.strerror or error}", err=True)
        ctx.exit(_SOME_FAILED)
    click.echo(_summary(len(photographs), failed, output, source, model))
    if len(photographs) < _FEW:
        click.echo(f"note: {_counted(len(photographs))} are few; from {_FEW} on directions carry over better", err=True)
    if failed:
        ctx.exit(_SOME_FAILED)


def _check_output(ctx: click.Context, output: Path, overwrite: bool) -> None:
    """Refuse what could not be written after minutes of work."""
    shown = click.format_filename(output)
    if output.exists() and not overwrite:
        raise click.UsageError(f"the output '{shown}' exists: replace it with --overwrite, or choose another.", ctx)
    folder = output.parent
    if not folder.is_dir():
        raise click.UsageError(f"the folder of the output '{shown}' does not exist: make it, or choose another.", ctx)
    if not os.access(folder, os.W_OK):
        raise click.UsageError(f"the folder of the output '{shown}' cannot be written to: choose another.", ctx)


def _spread(images: tuple[str, ...], limit: int) -> list[str]:
    """Choose at most so many, evenly spread: neighbours in a folder are often of one series."""
    count = min(limit, len(images))
    return [images[(2 * k + 1) * len(images) // (2 * count)] for k in range(count)]


def _features(
    backbone: Backbone, inputs: Inputs, chosen: list[str], long_side: int | None, progress: Progress
) -> tuple[list[TokenFeatures], int]:
    """Compute the features of photographs, and how many there are none of."""
    from sparsespec.backbone import DEFAULT_LONG_SIDE
    from sparsespec.batch import Row
    from sparsespec.batch.one import explain
    from sparsespec.images import open_image

    failed = [Row(path=path, status="failed", error=reason) for path, reason in inputs.unlisted]
    total = len(failed) + len(chosen)
    for position, row in enumerate(failed, start=1):
        progress.update(row, position, total)
    photographs: list[TokenFeatures] = []
    for path in chosen:
        row = Row(path=path, status="done")
        try:
            with inputs.source.fetched(path) as file, open_image(file) as source:
                row.size = (int(source.shape[1]), int(source.shape[0]))
                tokens = backbone.features(source, long_side=long_side or DEFAULT_LONG_SIDE)
            photographs.append(_checked(tokens.halved()))
        except Exception as error:  # whatever is wrong with one photograph, there are others
            row.status, row.error = "failed", explain(error, row.size)
            failed.append(row)
        progress.update(row, len(failed) + len(photographs), total)
    return photographs, len(failed)


def _checked(tokens: TokenFeatures) -> TokenFeatures:
    """Refuse features that are no finite numbers here and not in the fit, where one bad photograph would end it all."""
    import numpy as np

    from sparsespec._checks import check_features

    for name in ("queries", "keys", "values"):
        check_features(getattr(tokens, name).astype(np.float32), name=name)
    return tokens


def _fail(ctx: click.Context, reason: str) -> None:
    click.echo(f"sparsespec: nothing was fitted, nothing written: {reason}", err=True)
    ctx.exit(_SOME_FAILED)


def _summary(count: int, failed: int, output: Path, source: str, model: str) -> str:
    shown = click.format_filename(output)
    parts = ["sparsespec", "run", "--input", source, "--directions", shown]
    if model != "default":
        parts += ["--model", model]
    left_out = f", {failed} failed" if failed else ""
    return f"fitted to {_counted(count)}{left_out}; directions in {shown}\nto use them: {shlex.join(parts)}"


def _counted(count: int) -> str:
    return f"{count} photograph{'' if count == 1 else 's'}"
