"""``sparsespec eval``: compare label images with the truth."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["eval_command"]


@click.command("eval", short_help="Measure masks against true ones.")
@click.option(
    "--pred",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Label images to judge, or the output folder of a run.",
)
@click.option("--truth", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The true label images.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with a row for each image, instead of a table.")
@click.pass_context
def eval_command(ctx: click.Context, pred: Path, truth: Path, as_json: bool) -> None:
    """Compare label images with true ones of the same path and name, whatever their endings.

    In both, 0 is background and every other value one object. Which value an object has does not matter: objects are
    matched by how much they overlap.

    \b
    Examples
      sparsespec eval --pred sparsespec-out/ --truth labels/
      sparsespec eval --pred sparsespec-out/masks/ --truth labels/ --json > scores.json
    """
    from sparsespec.evaluation import evaluate_folders

    try:
        report = evaluate_folders(pred, truth)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{error}.", ctx) from error
    click.echo(json.dumps(report.to_dict(), indent=1, allow_nan=False) if as_json else report.table())
