"""``sparsespec explain``."""

from __future__ import annotations

import click

__all__ = ["explain_command"]


@click.command("explain", short_help="Every stage of one image, in one figure.")
def explain_command() -> None:
    """Show every stage of one image."""
    raise click.UsageError("not there yet")
