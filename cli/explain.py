"""``sparsespec explain``: every stage of one image, in a figure or a page."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._method import method_option
from ._provider import provider_options as with_provider
from .run import Count, Directions, open_backbone

if TYPE_CHECKING:
    from sparsespec.explanation import Explanation
    from sparsespec.pipeline import Segmenter

__all__ = ["explain_command"]

_FAILED = 1
_FIGURES, _PAGES = (".png", ".svg"), (".html", ".htm")
# What --html stands for without a file.
_BESIDE = ""


class Token(click.ParamType):
    """Row and column of a token, both from 0."""

    name = "token"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Show the form in the help text."""
        return "ROW,COLUMN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return both numbers."""
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            self.fail(f"'{value}' is not of the form ROW,COLUMN, two whole numbers from 0, such as 12,7.", param, ctx)
        return int(parts[0]), int(parts[1])


@click.command("explain", short_help="Show every stage of one image, in a figure or a page to explore.")
@click.argument("image", required=False, metavar="IMAGE")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Figure to write, .png or .svg.  [default: IMAGE's name with -explained.png, in the current folder]",
)
@click.option(
    "--html",
    is_flag=False,
    flag_value=_BESIDE,
    default=None,
    metavar="[FILE]",
    help="Write a page to explore in a browser, IMAGE's name with -explained.html or FILE; and no figure, unless"
    " --output asks for one.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is there by the name of an output.")
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
    help="Objects in the image: found out from it, or given.",
)
@method_option
@click.option(
    "--directions",
    type=Directions(),
    default="default",
    show_default=True,
    help="What the network's features say about objects: 'default' takes what comes with the model, 'none' nothing; or"
    " a file of 'sparsespec fit'.",
)
@click.option(
    "--long-side",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Bring the longer side of the image to so many pixels for the network, by default 448.",
)
@click.option(
    "--page",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Page of a TIFF that has several.",
)
@click.option(
    "--token",
    type=Token(),
    help="Token whose affinities are shown, from 0,0 in the upper left corner of the grid.  [default: one inside the"
    " best instance]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of --method paper.",
)
@click.pass_context
def explain_command(
    ctx: click.Context,
    image: str | None,
    output: Path | None,
    html: str | None,
    overwrite: bool,
    model: str,
    provider: str,
    provider_options: dict[str, str],
    n_instances: int | None,
    method: str,
    directions: str | None,
    long_side: int | None,
    page: int,
    token: tuple[int, int] | None,
    seed: int,
) -> None:
    """Show what each stage of the method makes of one image: how its masks come about.

    Channels kept and dropped, what is like what, the graph that is cut, its spectrum, what stands out, the candidates
    and the threshold that decides how many instances there are, their edges, and what the scores are made of. The
    figure needs Matplotlib, pip install 'sparsespec[figures]'; the page needs nothing else, not even a network.

    \b
    Examples
      sparsespec explain cat.jpg
      sparsespec explain cat.jpg --html
      sparsespec explain cat.jpg --output cat.svg --html cat.html --token 12,7
      sparsespec explain cat.jpg --method paper --n-instances 2

    Exit codes: 0 done, 1 the image could not be read or the results not written, 2 wrong usage, 130 interrupted.
    """
    # As for "sparsespec run", before NumPy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if image is None and html and not html.lower().endswith(_PAGES):
        # "--html cat.jpg": an option whose value may be left out has taken the image for it.
        image, html = html, _BESIDE
    if image is None:
        raise click.UsageError("the image is missing: sparsespec explain IMAGE.", ctx)
    _check_image(ctx, image)
    if method == "paper" and n_instances is None:
        raise click.UsageError("--method paper needs the number of objects: add --n-instances N.", ctx)
    if method == "paper" and directions not in ("default", None):
        raise click.UsageError("--method paper uses no directions: leave --directions out.", ctx)
    figure, page_file = _outputs(ctx, image, output, html, overwrite)
    backbone = open_backbone(ctx, model, provider=provider, provider_options=provider_options)
    from sparsespec.batch.one import explain as reason_for
    from sparsespec.images import count_pages, open_image
    from sparsespec.pipeline import Segmenter

    try:
        segmenter = Segmenter(
            backbone,
            n_instances=n_instances,
            method=method,
            rng=seed,
            directions=None if method == "paper" else directions,
            long_side=long_side,
        )
    except ValueError as error:
        raise click.UsageError(f"{_one_line(error)}.", ctx) from error
    try:
        pages = count_pages(image) if page > 1 else 1
        if page > pages:
            raise click.UsageError(f"--page {page}: the image has {pages} page{'' if pages == 1 else 's'}.", ctx)
        with open_image(image, page=page - 1) as pixels:
            made = _explained(segmenter, pixels, Path(image).name if page == 1 else f"{Path(image).name}, page {page}")
    except click.UsageError:
        raise
    except Exception as error:  # whatever is wrong with the image, or too large about it
        click.echo(f"sparsespec: cannot explain {click.format_filename(image)}: {reason_for(error, None)}", err=True)
        ctx.exit(_FAILED)
    chosen = None
    if token is not None:
        try:
            chosen = made.token_at(*token)
        except ValueError as error:
            raise click.UsageError(f"--token: {error}.", ctx) from error
    _write(ctx, made, chosen, figure, page_file)


def _explained(segmenter: Segmenter, pixels: Any, name: str) -> Explanation:
    from sparsespec.explanation import explain

    return explain(segmenter, pixels, name=name)


def _check_image(ctx: click.Context, image: str) -> None:
    shown = click.format_filename(image)
    if os.path.isdir(image):
        raise click.UsageError(f"'{shown}' is a folder: give one image. 'sparsespec run' takes folders.", ctx)
    if not os.path.exists(image):
        raise click.UsageError(f"the image '{shown}' does not exist.", ctx)


def _outputs(
    ctx: click.Context, image: str, output: Path | None, html: str | None, overwrite: bool
) -> tuple[Path | None, Path | None]:
    """Decide what is written where, and refuse at once what could not be written in the end."""
    stem = Path(image).stem
    page_file = None if html is None else Path(html or f"{stem}-explained.html")
    figure = output if output is not None or page_file is not None else Path(f"{stem}-explained.png")
    for name, path, endings in (("--output", figure, _FIGURES), ("--html", page_file, _PAGES)):
        if path is None:
            continue
        shown = click.format_filename(path)
        if path.suffix.lower() not in endings:
            other = "; a page is written with --html" if name == "--output" and path.suffix.lower() in _PAGES else ""
            raise click.UsageError(f"{name} '{shown}' must end in {' or '.join(endings)}{other}.", ctx)
        if path.is_dir():
            raise click.UsageError(f"{name} '{shown}' is a folder: name a file.", ctx)
        if path.exists() and os.path.samefile(path, image):
            raise click.UsageError(f"{name} '{shown}' is the image itself: choose another file.", ctx)
        if path.exists() and not overwrite:
            raise click.UsageError(
                f"'{shown}' exists: replace it with --overwrite, or choose another file with {name}.", ctx
            )
        if not path.parent.is_dir():
            raise click.UsageError(f"the folder of {name} '{shown}' does not exist: make it, or choose another.", ctx)
        if not os.access(path.parent, os.W_OK):
            raise click.UsageError(f"the folder of {name} '{shown}' cannot be written to: choose another.", ctx)
    if figure is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError(
            "the figure needs Matplotlib: pip install 'sparsespec[figures]'. --html makes a page without it.", ctx
        )
    return figure, page_file


def _write(ctx: click.Context, made: Explanation, token: int | None, figure: Path | None, page: Path | None) -> None:
    from sparsespec._atomic import write_atomic
    from sparsespec.explanation import html_page
    from sparsespec.explanation.texts import summary

    written = []
    for path, what in ((figure, "figure"), (page, "page")):
        if path is None:
            continue
        if what == "page":
            content = html_page(made, token=token).encode("utf-8")
        else:
            from sparsespec.explanation import figures

            content = figures.figure_bytes(figures.figure(made, token=token), path.suffix.lower().lstrip("."))
        try:
            write_atomic(path, content)
        except OSError as error:
            click.echo(f"sparsespec: cannot write {click.format_filename(path)}: {error.strerror or error}", err=True)
            ctx.exit(_FAILED)
        written.append(f"{what} in {click.format_filename(path)}")
    click.echo(f"{summary(made)}\n{', '.join(written)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
