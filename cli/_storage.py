"""The option for file systems behind URLs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ._provider import pairs

__all__ = ["storage_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def storage_options(command: _Command) -> _Command:
    """Add ``--storage-option``: a dict of str to str."""
    return click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        callback=pairs,
        metavar="NAME=VALUE",
        help="Option of the file system behind a URL, such as endpoint_url=http://localhost:9000; may be given several"
        " times.",
    )(command)
