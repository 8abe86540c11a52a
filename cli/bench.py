"""``sparsespec bench``: our speed and memory beside those of other libraries."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from ._progress import Line

__all__ = ["bench_command"]

_PARTS = ("kernels", "solver", "image", "backbone")
_LONG_PARTS = ("runs", "killing", "scheduler", "server", "soak", "report", "gpu")
_FAILED = 1


class Sizes(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], least: float) -> None:
        self._kind = kind
        self._least = least

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Show the values in the help text."""
        return "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(part.replace("_", "")) for part in value.split(","))
        except ValueError:
            kind = "whole numbers" if self._kind is int else "numbers"
            self.fail(f"'{value}' is not a list of {kind} such as 4096,65536.", param, ctx)
        # Written so that "nan" fails as well.
        if not all(self._least <= number < float("inf") for number in numbers):
            self.fail(f"'{value}' holds a number below {self._least:g}, or none.", param, ctx)
        return numbers


@click.command("bench", short_help="Measure speed and memory beside other libraries.")
@click.argument("part", type=click.Choice([*_PARTS, *_LONG_PARTS, "all"]), default="all")
@click.option("--quick", is_flag=True, help="Small sizes, few repeats: to see that all works, not for figures.")
@click.option("--tokens", type=Sizes(int, 64), default=(), help="Numbers of tokens in place of the usual sizes.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Photographs to measure on, in place of those that scikit-image brings.",
)
@click.option(
    "--large",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Photograph of many megapixels, in place of a mosaic of 12.",
)
@click.option("--megapixels", type=Sizes(float, 0.01), default=(), help="Sizes at which memory is measured.")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    metavar="N",
    help="Runs of each, of which the fastest counts.  [default: 5; 2 with --quick]",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Time after which a run is stopped.  [default: 60; 20 with --quick]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads of each library.  [default: the processors granted to this process]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep the computed features here for the next run; by default nothing is kept.",
)
@click.option(
    "--photographs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of the part soak; tiny images of the part runs; images of the part report.  [default: 2000; 100000; 5000]",
)
@click.option(
    "--names",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images of the part runs that are only named.  [default: 200000]",
)
@click.option(
    "--sizes", type=click.IntRange(1, 100_000), metavar="N", help="Of the photographs of soak.  [default: 300]"
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Of the part server.  [default: 600; 60 with --quick]",
)
@click.option(
    "--model",
    metavar="NAME|FILE",
    help="Network of the parts backbone and gpu: a name of 'sparsespec models list', or a file.  [default: default]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with all that was measured instead of tables.")
@click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write the tables as Markdown too; '-' prints them instead.",
)
@click.option(
    "--update",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Replace the tables between the markers of a document such as docs/benchmarks.md.",
)
@click.pass_context
def bench_command(
    ctx: click.Context,
    part: str,
    quick: bool,
    tokens: tuple[int, ...],
    images: Path | None,
    large: Path | None,
    megapixels: tuple[float, ...],
    repeats: int | None,
    limit: float | None,
    threads: int | None,
    cache: Path | None,
    photographs: int | None,
    sizes: int | None,
    names: int | None,
    seconds: float | None,
    model: str | None,
    as_json: bool,
    markdown: Path | None,
    update: Path | None,
) -> None:
    """Measure one PART, or all.

    The parts are kernels (neighbour graphs), solver (eigenpairs), image (whole photographs) and backbone (the network).
    Each figure stands beside that of a peer from the same run, with the ratio of the two. Peers beyond SciPy come with
    "pip install 'sparsespec[peers]'"; one that is missing is listed as missing.

    Not among "all" are those that take long: runs, what a run over a folder costs beside the segmenter (ten minutes);
    killing, runs that are killed a hundred times and gone on with (20 minutes); scheduler, the load of a Dask cluster's
    scheduler (ten minutes); server, 32 clients of a server (a quarter of an hour); soak, the memory of a process that
    sees 2,000 photographs of 300 sizes (half an hour); report, the size of report.html for 5,000 images and its times
    in Chromium, which needs "pip install 'sparsespec[browser]'" (five minutes); and gpu, the network on a CUDA GPU.

    \b
    Examples
      sparsespec bench --quick
      sparsespec bench solver --tokens 4096,65536
      sparsespec bench all --update docs/benchmarks.md

    Exit codes: 0 measured, whoever won; 1 one of our own measurements failed, or a result could not be written; 2 wrong
    usage.
    """
    on_paper = markdown is not None and str(markdown) == "-"
    if as_json and on_paper:
        raise click.UsageError("--json and --markdown - both want stdout: give --markdown a file.", ctx)
    if large is not None and not large.is_file():
        raise click.UsageError(f"--large: there is no file {click.format_filename(large)}.", ctx)
    if update is not None and not update.is_file():
        raise click.UsageError(f"--update: there is no document {click.format_filename(update)}.", ctx)

    from sparsespec.evaluation import benchmark

    progress = Line()
    chosen = _PARTS if part == "all" else (part,)
    try:
        if update is not None:
            benchmark.check_document(update, chosen)
        options = benchmark.Options(
            quick=quick,
            tokens=tokens,
            images=images,
            large=large,
            megapixels=megapixels,
            repeats=repeats,
            limit=limit,
            threads=threads,
            cache=cache,
            photographs=photographs,
            sizes=sizes,
            names=names,
            seconds=seconds,
            model=model,
        )
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{' '.join(str(error).split())}.", ctx) from error
    try:
        sections = benchmark.run(chosen, options, say=progress.show, command=_command(ctx))
    except benchmark.InputError as error:
        progress.erase()
        raise click.UsageError(f"{' '.join(str(error).split())}.", ctx) from error
    finally:
        progress.erase()

    if as_json:
        click.echo(json.dumps({section.name: section.to_dict() for section in sections}, indent=1, allow_nan=False))
    elif on_paper:
        click.echo("\n\n".join(section.to_markdown() for section in sections))
    else:
        click.echo("\n\n".join(section.to_text() for section in sections))
    try:
        if markdown is not None and not on_paper:
            markdown.write_text("\n\n".join(section.to_markdown() for section in sections) + "\n", encoding="utf-8")
        if update is not None:
            benchmark.update_document(update, sections)
    except (OSError, ValueError) as error:
        click.echo(f"sparsespec: cannot write the tables: {error}", err=True)
        ctx.exit(_FAILED)
    failures = [failure for section in sections for failure in section.own_failures]
    for failure in failures:
        click.echo(f"sparsespec: not measured: {failure}", err=True)
    if failures:
        ctx.exit(_FAILED)


def _command(ctx: click.Context) -> str:
    """Write down the command with what changes the figures, and without the paths of this machine."""
    given = ["sparsespec", "bench", ctx.params["part"]]
    if ctx.params["quick"]:
        given.append("--quick")
    for name in ("tokens", "megapixels"):
        if ctx.params[name]:
            given += [f"--{name}", ",".join(f"{number:g}" for number in ctx.params[name])]
    for name in ("repeats", "limit", "threads", "photographs", "sizes", "names", "seconds"):
        if ctx.params[name] is not None:
            given += [f"--{name}", f"{ctx.params[name]:g}"]
    for name in ("images", "large", "model"):
        if ctx.params[name] is not None:
            given += [f"--{name}", Path(ctx.params[name]).name]
    return shlex.join(given)
