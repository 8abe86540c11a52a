"""``sparsespec eval``: compare label images with what is true."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._ablation import PARTS

if TYPE_CHECKING:
    from sparsespec.evaluation import Report

__all__ = ["eval_command"]

KINDS = ("labels", "coco", "youtube-vis", "ovis", "voc", "davis2016", "davis2017", "penn-fudan")


@click.command("eval", short_help="Measure masks against true ones.")
@click.option(
    "--pred",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Label images to judge, or the output folder of a run.",
)
@click.option(
    "--truth",
    "truths",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="True label images, or a data set: see --dataset. With --ablation it may be given more than once.",
)
@click.option(
    "--dataset",
    type=click.Choice(KINDS),
    default="labels",
    show_default=True,
    metavar="KIND",
    help=f"What --truth is: {', '.join(KINDS)}.",
)
@click.option("--split", metavar="NAME", help="Part of the data set, such as val.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images of the data set, where they don't lie in their usual place.",
)
@click.option("--intervals", is_flag=True, help="95 % confidence intervals over the images.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with a row for each image, instead of a table.")
@click.option("--ablation", is_flag=True, help="Measure the method itself, stage by stage, and its peers.")
@click.option(
    "--update",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --ablation: put the tables into this Markdown page.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --ablation: the first N images of each data set only.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    metavar="NAME",
    help=f"With --ablation: only this table; may be given more than once: {', '.join(PARTS)}.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="With --ablation: compare this model with the embedded one; may be given more than once.",
)
@click.option(
    "--long-side",
    "long_sides",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="With --ablation: a further size of the network's input; may be given more than once.",
)
@click.pass_context
def eval_command(
    ctx: click.Context,
    pred: Path | None,
    truths: Sequence[Path],
    dataset: str,
    split: str | None,
    images: Path | None,
    intervals: bool,
    as_json: bool,
    ablation: bool,
    update: Path | None,
    limit: int | None,
    parts: Sequence[str],
    models: Sequence[Path],
    long_sides: Sequence[int],
) -> None:
    """Compare label images with what is true of the images of the same path and name, whatever their endings.

    In a label image, 0 is background and every other value one object. Which value an object has does not matter:
    objects are matched by how much they overlap. Average precision (AP) needs pycocotools, "pip install
    'sparsespec[eval]'", and the scores in the instances.json of a run.

    \b
    Examples
      sparsespec eval --pred sparsespec-out/ --truth labels/
      sparsespec eval --pred sparsespec-out/ --truth labels/ --intervals
      sparsespec eval --pred sparsespec-out/masks/ --truth labels/ --json > scores.json
      sparsespec eval --pred sparsespec-out/ --truth VOCdevkit/VOC2012/ --dataset voc --split val
      sparsespec eval --ablation --truth pedestrians/ --truth streets/
      sparsespec eval --ablation --truth pedestrians/ --part peers --limit 20
    """
    if ablation:
        _refuse(ctx, {"--pred": pred is not None, "--intervals": intervals}, "--ablation")
    elif pred is None:
        raise click.UsageError("Missing option '--pred': what is to be judged. Or give --ablation.", ctx)
    if not truths:
        raise click.UsageError("Missing option '--truth': what is true.", ctx)
    if dataset == "labels":
        _refuse(ctx, {"--split": split is not None}, "--dataset labels")
    if pred is None:
        from sparsespec.cli._ablation import run

        try:
            run(truths, dataset, split, images, update, limit, as_json, models, long_sides, parts)
        except (OSError, ValueError, ImportError) as error:
            raise click.UsageError(_sentence(error), ctx) from error
        return
    if len(truths) > 1:
        raise click.UsageError("--truth may be given once only, except with --ablation.", ctx)
    for option, given in (
        ("--update", update is not None),
        ("--limit", limit is not None),
        ("--part", bool(parts)),
        ("--model", bool(models)),
        ("--long-side", bool(long_sides)),
    ):
        if given:
            raise click.UsageError(f"{option} needs --ablation.", ctx)
    try:
        report = _report(pred, truths[0], dataset, split, images)
    except (OSError, ValueError) as error:
        raise click.UsageError(_sentence(error), ctx) from error
    if intervals:
        report = report.with_intervals()
    click.echo(json.dumps(report.to_dict(), indent=1, allow_nan=False) if as_json else report.table())


def _report(pred: Path, truth: Path, dataset: str, split: str | None, images: Path | None) -> Report:
    from sparsespec.evaluation import evaluate, evaluate_folders

    # Beside the photographs, those that nothing is said about can be told too.
    photographs = images is not None or ((truth / "images").is_dir() and (truth / "labels").is_dir())
    if dataset == "labels" and not photographs:
        return evaluate_folders(pred, truth)
    from sparsespec.evaluation.datasets import open_dataset

    return evaluate(open_dataset(dataset, truth, split=split, images=images), pred)


def _refuse(ctx: click.Context, given: dict[str, bool], beside: str) -> None:
    for option, is_given in given.items():
        if is_given:
            raise click.UsageError(f"{option} can't be used with {beside}.", ctx)


def _sentence(error: Exception) -> str:
    text = str(error)
    return text if text.endswith(".") else f"{text}."
