"""``sparsespec eval --ablation``: the method's steps, its bounds and its peers on data sets."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._progress import Line

if TYPE_CHECKING:
    from sparsespec.evaluation import Dataset

__all__ = ["PARTS", "run"]

PARTS = ("peers", "paper", "paper-ours", "steps", "bounds", "resolution")


def run(
    truths: Sequence[Path],
    dataset: str,
    split: str | None,
    images: Path | None,
    update: Path | None,
    limit: int | None,
    as_json: bool,
    models: Sequence[Path] = (),
    long_sides: Sequence[int] = (),
    parts: Sequence[str] = (),
) -> None:
    """Measure, and print the tables or put them into a page.

    Parameters
    ----------
    truths, dataset, split, images
        What to measure on, see :func:`sparsespec.evaluation.datasets.open_dataset`.
    update
        Markdown page whose tables are to be replaced.
    limit
        Take the first so many images of each set only.
    as_json
        Print JSON in place of tables.
    models
        Files of models to compare with the embedded one.
    long_sides
        Further sizes for the table of resolutions.
    parts
        Of :data:`PARTS`, the tables to make; all, if empty.

    Raises
    ------
    ValueError, OSError, ImportError
        Something given can't be used, or something is missing; nothing was printed then.
    """
    from sparsespec.evaluation import ablation, results
    from sparsespec.evaluation.benchmark.report import check_document, update_document
    from sparsespec.evaluation.datasets import open_dataset

    if update is not None and not update.is_file():
        raise ValueError(f"there is no page '{click.format_filename(update)}' to put the tables into")
    sizes = (*ablation.LONG_SIDES, *(side for side in long_sides if side not in ablation.LONG_SIDES))
    plans = [
        plan
        for plan in ablation.plans(models=models, long_sides=sizes, several_sets=len(truths) > 1)
        if not parts or plan.key in parts
    ]
    if update is not None:
        check_document(update, results.section_names(plans))
    sets = [ablation.limited(open_dataset(dataset, root, split=split, images=images), limit) for root in truths]

    line = Line()
    start = time.monotonic()
    try:
        measured = ablation.run_ablation(sets, plans, say=lambda text: line.show(f"{_clock(start)}  {text}"))
    finally:
        line.erase()
    command = _command(sets, dataset, split, limit, models, long_sides, parts)
    tables = results.sections(measured, command)
    if as_json:
        click.echo(json.dumps(results.to_dict(measured, command), indent=1, allow_nan=False))
    elif update is None:
        click.echo("\n\n".join(section.to_text() for section in tables))
    _tell_what_is_left_out(sets)
    if update is not None:
        update_document(update, tables)


def _clock(start: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f"{minutes}:{seconds:02d}"


def _tell_what_is_left_out(sets: Sequence[Dataset]) -> None:
    for dataset in sets:
        for names, what in ((dataset.without_truth, "truth"), (dataset.without_image, "image")):
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                click.echo(f"sparsespec: {dataset.name}: no {what} for {shown}", err=True)


def _command(
    sets: Sequence[Dataset],
    dataset: str,
    split: str | None,
    limit: int | None,
    models: Sequence[Path],
    long_sides: Sequence[int],
    parts: Sequence[str],
) -> str:
    """Write down the command with what changes the figures, and without the paths of this machine."""
    given = ["sparsespec", "eval", "--ablation"]
    for one in sets:
        given += ["--truth", one.name]
    if dataset != "labels":
        given += ["--dataset", dataset]
    if split is not None:
        given += ["--split", split]
    if limit is not None:
        given += ["--limit", str(limit)]
    for model in models:
        given += ["--model", model.name]
    for side in long_sides:
        given += ["--long-side", str(side)]
    for part in parts:
        given += ["--part", part]
    return shlex.join(given)
