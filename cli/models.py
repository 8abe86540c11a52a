"""``sparsespec models``: what models there are."""

from __future__ import annotations

import click

__all__ = ["models_group"]


@click.group("models", short_help="List the models, or describe one.")
def models_group() -> None:
    """List the models that 'sparsespec run --model NAME' knows, or describe one.

    \b
    Examples
      sparsespec models list
      sparsespec models info default
    """


@models_group.command("list", short_help="One line for each model.")
def list_command() -> None:
    """Print one line for each model: its name, size, precision and what it is."""
    from sparsespec.models import list_models

    rows = []
    for model in list_models():
        names = " or ".join((model.name, *model.aliases))
        rows.append((names, f"{model.size_bytes / 1e6:.1f} MB", model.precision, model.description))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row[:3], widths, strict=True)]
        click.echo("  ".join([*padded, row[3]]))


@models_group.command("info", short_help="Everything about one model.")
@click.argument("name")
@click.pass_context
def info_command(ctx: click.Context, name: str) -> None:
    """Print what is known about the model NAME: where it comes from, its licence, its size and checksum."""
    from sparsespec.models import UnknownModelError, get_model

    try:
        model = get_model(name)
    except UnknownModelError as error:
        raise click.UsageError(f"{error}.", ctx) from error
    facts = {
        "name": model.name,
        "also called": ", ".join(model.aliases) or "-",
        "description": model.description,
        "licence": model.licence,
        "source": model.source,
        "network": f"{model.blocks} blocks, {model.dim} channels, {model.heads} heads",
        "patch size": f"{model.patch_size} pixels",
        "precision": model.precision,
        "size": f"{model.size_bytes / 1e6:.1f} MB ({model.size_bytes} bytes)",
        "sha256": model.sha256,
        "file": click.format_filename(model.path),
    }
    width = max(len(caption) for caption in facts)
    for caption, value in facts.items():
        click.echo(f"{caption.ljust(width)}  {value}")
