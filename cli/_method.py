"""The option that says which method is used, the same for every command that segments."""

from __future__ import annotations

import click

__all__ = ["method_option"]

method_option = click.option(
    "--method",
    type=click.Choice(["sparse", "paper"]),
    default="sparse",
    show_default=True,
    help="'paper' follows the published method step by step; it needs --n-instances N.",
)
