"""The command ``sparsespec``: one file for each of its commands.

Only this package prints and ends the process. Heavy libraries are imported where a command needs them, so that
``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import suppress
from typing import Any

import click

import sparsespec

from .bench import bench_command
from .doctor import doctor_command
from .evaluate import eval_command
from .explain import explain_command
from .fit import fit_command
from .models import models_group
from .run import run_command
from .serve import serve_command

__all__ = ["entry", "main"]

THREADS = "sparsespec-image"
"""How the threads that work on images are called."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, by the shells' convention 128 + signal 2."""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nsparsespec: interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sparsespec.__version__, prog_name="sparsespec")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Find the objects in photographs: no labels, no PyTorch, no GPU.

    \b
    Examples
      sparsespec run --input photos/
      sparsespec run --input 'photos/**/*.jpg' --output results/
      sparsespec eval --pred results/ --truth labels/

    The results of a run are label images, overlays, COCO JSON and an HTML report. "sparsespec COMMAND --help" says
    more about each command.
    """
    # Not click's no_args_is_help: it calls a bare "sparsespec" wrong usage.
    _say_what_models_do()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def entry() -> None:
    """Run the command, and end the process even where threads are at work that nobody waits for any more."""
    try:
        main()
    except SystemExit as end:
        # After a second Ctrl-C; Python would wait for them, and a thread cannot be stopped.
        if any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(end.code if isinstance(end.code, int) else INTERRUPTED)
        raise


class _Speaker(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"sparsespec: {record.getMessage()}", err=True)


def _say_what_models_do() -> None:
    """Show the log lines of models that are downloaded and built on first use, which may take minutes."""
    log = logging.getLogger("sparsespec.models")
    if not any(isinstance(handler, _Speaker) for handler in log.handlers):
        log.addHandler(_Speaker())
        log.setLevel(logging.INFO)


main.add_command(run_command)
main.add_command(explain_command)
main.add_command(serve_command)
main.add_command(models_group)
main.add_command(fit_command)
main.add_command(eval_command)
main.add_command(bench_command)
main.add_command(doctor_command)
