"""``sparsespec models build``: a model file of our own from an export, a state dict or a published model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sparsespec.models.vit import Vit

__all__ = ["build_command", "model_failures"]

_RULES = ("size", "offset", "antialias")


class _Numbers(click.ParamType):
    """Numbers with commas between them."""

    def __init__(self, kind: type, count: int | None = None) -> None:
        self._kind, self._count = kind, count
        self.name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or self._count not in (None, len(found)):
            wanted = "numbers" if self._kind is int else "three numbers"
            example = "8,11" if self._kind is int else "0.485,0.456,0.406"
            self.fail(f"{value!r} isn't {wanted} such as {example}", param, ctx)
        return found


@contextmanager
def model_failures(ctx: click.Context) -> Iterator[None]:
    """Print what went wrong: wrong usage ends with exit code 2, everything else with 1."""
    from sparsespec.models import BuildError, DownloadError, ModelFormatError, StoreError

    try:
        yield
    except (ModelFormatError, DownloadError, StoreError, BuildError, ImportError, OSError) as error:
        raise click.ClickException(f"{error}.") from error
    except ValueError as error:
        raise click.UsageError(f"{error}.", ctx) from error


@click.command("build", short_help="Build a model from an export or weights.")
@click.argument("source", metavar="FILE|DIR|NAME")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT.onnx",
    help="File to write. One that is there is replaced.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8", "int8-static"]),
    default="float32",
    show_default=True,
    help="How to keep the weights: int8 is the fastest on most CPUs, float16 is for GPUs, int8-static for"
    " --provider openvino.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help="Photographs of the kind to be segmented, which int8-static takes its ranges from; ten are enough.",
)
@click.option(
    "--blocks",
    type=_Numbers(int),
    default="-1",
    show_default=True,
    metavar="LIST",
    help="Blocks whose queries, keys and values come out, such as 8,11: counted from 0, or from the end by -1, -2 ...",
)
@click.option("--heads", type=click.IntRange(min=1), metavar="N", help="Attention heads, where the source doesn't say.")
@click.option(
    "--position-rule",
    type=click.Choice(_RULES),
    help="How the table of positions is brought to other sizes, where the source says nothing or something else: by"
    " size (transformers), with the offset of 0.1 (the original code of DINO and DINOv2), with antialiasing (timm,"
    " models with registers).",
)
@click.option("--mean", type=_Numbers(float, 3), metavar="R,G,B", help="Normalisation, instead of the source's.")
@click.option("--std", type=_Numbers(float, 3), metavar="R,G,B", help="Normalisation, instead of the source's.")
@click.option("--name", metavar="TEXT", help="Name of the model.  [default: that of the source, and the precision]")
@click.pass_context
def build_command(
    ctx: click.Context,
    source: str,
    output: Path,
    precision: str,
    calibrate: Path | None,
    blocks: tuple[int, ...],
    heads: int | None,
    position_rule: str | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    name: str | None,
) -> None:
    """Build a model that 'sparsespec run --model OUT.onnx' takes, and print what was recognised.

    The source is an ONNX export of a vision transformer (.onnx), its weights (.safetensors; .pth, .pt and .bin with
    PyTorch), a folder as the Hugging Face hub has it, or a name of 'sparsespec models list'. The structure of an export
    is recognised whatever its parts are called, and what is built is compared with it before anything is written. It
    takes images of any size, also when the export doesn't. Needs: pip install 'sparsespec[build]'.

    \b
    Examples
      sparsespec models build dino_vits16.onnx -o mine.onnx
      sparsespec models build model.safetensors -o mine.onnx --precision int8
      sparsespec models build dinov2-vitb14-reg -o both.onnx --blocks 8,11
      sparsespec models build default -o static.onnx --precision int8-static --calibrate photos/
    """
    from sparsespec.models.build import check_output, write_model
    from sparsespec.models.sources import read_source
    from sparsespec.position_table import PositionRule

    rules = dict(zip(_RULES, (PositionRule(), PositionRule(offset=0.1), PositionRule(antialias=True)), strict=True))
    if calibrate is None and precision == "int8-static":
        raise click.UsageError("--precision int8-static needs photographs to take its ranges from: --calibrate.", ctx)
    if calibrate is not None and precision != "int8-static":
        raise click.UsageError("--calibrate is for --precision int8-static.", ctx)
    rule = None if position_rule is None else rules[position_rule]
    with model_failures(ctx):
        check_output(output)
        read = read_source(source, heads=heads, rule=rule, mean=mean, std=std)
        facts = _facts(read.vit)
        if read.rule_assumed:
            facts["positions"] += " (assumed: the export is for one size and doesn't say; see --position-rule)"
        _say({"source": read.described, **facts})
        built = write_model(read, output, precision=precision, blocks=blocks, name=name, calibrate=calibrate)
    file = os.fspath(output)
    given = ", ".join(map(str, built.blocks))
    _say(
        {
            "compared": "with nothing: weights alone can't be run"
            if built.difference is None
            else f"in float32 with the export: largest difference {built.difference:.1e} of the largest entry",
            "written": f"{click.format_filename(output)}, {built.size_bytes / 1e6:.1f} MB, {precision}",
            "name": built.name,
            "features": f"queries, keys and values of block{'s' if len(built.blocks) > 1 else ''} {given}",
            "sha256": built.sha256,
            "next": f"sparsespec run --input PHOTOS --model {shlex.quote(file if os.sep in file else f'./{file}')}",
        }
    )


def _facts(vit: Vit) -> dict[str, str]:
    """Describe a network in a few lines."""
    rows, columns, channels = vit.positions.shape
    rest = vit.blocks[0].rest
    inside = "" if rest is None else f", {rest.feed_forward.activation} of {len(rest.feed_forward.fc2.weight)}"
    registers = len(vit.prefix) - 1
    tokens = "no class token" if registers < 0 else "class token"
    if registers > 0:
        tokens += f" and {registers} register{'s' if registers > 1 else ''}"
    rule = "bicubic" + (f", offset {vit.rule.offset:g}" if vit.rule.offset else "")
    rule += ", antialiased" if vit.rule.antialias else ""
    return {
        "network": f"{len(vit.blocks)} blocks, {channels} channels, {vit.heads} heads{inside}, {tokens}",
        "patches": f"{vit.patch_size} x {vit.patch_size} pixels",
        "positions": f"learnt for {rows} x {columns} patches; for other sizes {rule}",
        "colours": f"mean {_list(vit.mean)}, standard deviation {_list(vit.std)}",
    }


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _say(facts: dict[str, str]) -> None:
    for caption, value in facts.items():
        click.echo(f"{caption.ljust(9)}  {value}")
