"""``sparsespec serve``."""

from __future__ import annotations

import click

__all__ = ["serve_command"]


@click.command("serve", short_help="Segment images over HTTP.")
def serve_command() -> None:
    """Segment images over HTTP."""
    raise click.UsageError("not there yet")
