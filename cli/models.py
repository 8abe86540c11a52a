"""``sparsespec models``: what models there are, and how to get them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from ._build import build_command, model_failures

if TYPE_CHECKING:
    from sparsespec.models import ModelInfo

__all__ = ["models_group"]


@click.group("models", short_help="List, describe, fetch, build and check models.")
def models_group() -> None:
    """List the models that 'sparsespec run --model NAME' knows, describe, fetch and check them, build your own.

    \b
    Examples
      sparsespec models list
      sparsespec models info dino-vits16
      sparsespec models pull dino-vits16 --precision int8
      sparsespec models build export.onnx -o mine.onnx
      sparsespec models verify
    """


models_group.add_command(build_command)


@models_group.command("list", short_help="One line for each model.")
def list_command() -> None:
    """Print one line for each model: its name, size, whether it is installed, precisions, licence, what it is.

    The size of a model that isn't installed is that of its download.
    """
    from sparsespec.models import list_models
    from sparsespec.models.metadata import PRECISIONS

    rows = []
    for model in list_models():
        names = " or ".join((model.name, *model.aliases))
        state, size = _state(model)
        licence = model.licence.split()[0]
        precisions = model.precision if model.embedded else " ".join(PRECISIONS)
        rows.append((names, f"{size / 1e6:.1f} MB", state, precisions, licence, model.description))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row[:5], widths, strict=True)]
        click.echo("  ".join([*padded, row[5]]))


def _state(model: ModelInfo) -> tuple[str, int]:
    """Say in which precisions a model is there, and how many bytes it takes, or would take to download."""
    from sparsespec.models import get_model
    from sparsespec.models.metadata import PRECISIONS

    if model.embedded:
        return "embedded", model.size_bytes
    all_of_them = [get_model(f"{model.family}-{precision}") for precision in PRECISIONS]
    there = [one for one in all_of_them if not one.embedded and one.is_installed()]
    if not there:
        return "not installed", model.size_bytes
    return "installed: " + ", ".join(one.precision for one in there), sum(one.path.stat().st_size for one in there)


@models_group.command("info", short_help="Everything about one model.")
@click.argument("name")
@click.pass_context
def info_command(ctx: click.Context, name: str) -> None:
    """Print what is known about the model NAME: where it comes from, its licence, its size and checksum."""
    from sparsespec.models import get_model

    with model_failures(ctx):
        model = get_model(name)
    facts = {
        "name": model.name,
        "also called": ", ".join(model.aliases) or "-",
        "description": model.description,
        "licence": model.licence,
        "source": model.source,
        **_origin(model),
        "network": f"{model.blocks} blocks, {model.dim} channels, {model.heads} heads, {model.registers} registers",
        "patch size": f"{model.patch_size} pixels",
        "precision": model.precision,
        **_place(ctx, model),
    }
    width = max(len(caption) for caption in facts)
    for caption, value in facts.items():
        click.echo(f"{caption.ljust(width)}  {value}")


def _origin(model: ModelInfo) -> dict[str, str]:
    if model.embedded:
        return {
            "weights": f"from another file than those of {model.family!r}, which is pulled; the two need not agree to "
            "the last digit"
        }
    pinned = model.revision != "main"
    facts = {"revision": f"{model.revision}, pinned" if pinned else "main; the commit of the first pull is kept"}
    for file in model.files:
        size = "" if file.size is None else f"{file.size} bytes, "
        said = f"SHA-256 {file.sha256}, pinned" if file.sha256 else "SHA-256 of the first pull is kept"
        facts[file.name] = size + said
    return facts


def _place(ctx: click.Context, model: ModelInfo) -> dict[str, str]:
    """Say how large the file is and where it lies; for one of the store, what was recorded."""
    from sparsespec.models.store import Store, StoreError, source_key

    if model.embedded:
        return {
            "size": f"{model.size_bytes / 1e6:.1f} MB ({model.size_bytes} bytes)",
            "sha256": str(model.sha256),
            "file": click.format_filename(model.path),
        }
    facts = {"download": f"about {model.size_bytes / 1e6:.0f} MB"}
    try:
        store = Store()
    except StoreError as error:
        return {**facts, "installed": f"no: {error}"}
    with model_failures(ctx):
        record = store.read_record()
        for file in model.files:
            entry = record["sources"].get(source_key(str(model.repository), str(model.revision), file.name))
            if entry is not None:
                facts[f"recorded {file.name}"] = f"commit {entry['commit']}, SHA-256 {entry['sha256']}"
        if not model.path.is_file():
            return {**facts, "installed": f"no; 'sparsespec models pull {model.name}', or the first use, makes it"}
        size = model.path.stat().st_size
    return {
        **facts,
        "installed": "yes",
        "size": f"{size / 1e6:.1f} MB ({size} bytes)",
        "sha256": record["models"].get(model.file, {}).get("sha256", "not recorded yet"),
        "file": click.format_filename(model.path),
    }


@models_group.command("pull", short_help="Download a model and build it.")
@click.argument("name")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8"]),
    help="In place of what the name says, which is float32 where it says nothing.",
)
@click.option(
    "--offline", is_flag=True, help="Download nothing: use files that were copied to where this would put them."
)
@click.option("--endpoint", metavar="URL", help="A mirror of the Hugging Face hub. Default: HF_ENDPOINT, else the hub.")
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="The published file of weights, fetched by other means. Its SHA-256 is checked as after a download.",
)
@click.option("--force", is_flag=True, help="Download and build again what is there already.")
@click.option("--keep-download", is_flag=True, help="Keep the downloaded files, for other precisions.")
@click.pass_context
def pull_command(
    ctx: click.Context,
    name: str,
    precision: str | None,
    offline: bool,
    endpoint: str | None,
    source: str | None,
    force: bool,
    keep_download: bool,
) -> None:
    """Download the model NAME, build it, and print where it lies.

    A download that broke off is continued. Its SHA-256 is recorded when it is first seen and enforced ever after.
    'sparsespec run --model NAME' does the same on first use. Needs: pip install 'sparsespec[hub]'.
    """
    from sparsespec.models.pull import pull

    with model_failures(ctx):
        path = pull(
            name,
            precision=precision,
            source=source,
            offline=True if offline else None,
            endpoint=endpoint,
            force=force,
            keep_download=keep_download,
        )
    click.echo(click.format_filename(path))


@models_group.command("verify", short_help="Compare every file with its checksum.")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.pass_context
def verify_command(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Compute the SHA-256 of the embedded model and of all that was pulled or built, and compare it with the record.

    Exit code 1 when a file isn't what it was; each is listed with what to do.
    """
    from sparsespec.models import get_model
    from sparsespec.models.pull import verify

    with model_failures(ctx):
        found = verify(names)
        absent = [get_model(name).name for name in names if not get_model(name).is_installed()]
    for finding in found:
        verdict = finding.problem or "as recorded"
        click.echo(f"{finding.name}  {click.format_filename(finding.path)}: {verdict}")
    for name in absent:
        click.echo(f"{name}: not installed")
    if any(finding.failed for finding in found):
        ctx.exit(1)


@models_group.command("path", short_help="Where models are kept.")
@click.argument("name", required=False)
@click.pass_context
def path_command(ctx: click.Context, name: str | None) -> None:
    """Print the folder that keeps the models, or the place of the model NAME, there or not."""
    from sparsespec.models import get_model
    from sparsespec.models.store import home

    with model_failures(ctx):
        click.echo(click.format_filename(os.fspath(home() if name is None else get_model(name).path)))


@models_group.command("remove", short_help="Delete a pulled model.")
@click.argument("name")
@click.option("--forget", is_flag=True, help="Forget the recorded SHA-256 and commit of its download too.")
@click.pass_context
def remove_command(ctx: click.Context, name: str, forget: bool) -> None:
    """Delete the model NAME, in the precision named, and what was downloaded for it; print what was deleted."""
    from sparsespec.models.pull import remove

    with model_failures(ctx):
        gone = remove(name, forget=forget)
    if not gone:
        click.echo(f"{name} isn't installed: there was nothing to delete", err=True)
    for path in gone:
        click.echo(click.format_filename(path))
