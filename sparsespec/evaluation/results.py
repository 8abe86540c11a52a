"""Tables of an ablation: as text for a terminal, as Markdown for a page, as plain values for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsespec import __version__
from sparsespec.evaluation.ablation import (
    COMPARED,
    PEER_ROWS,
    Ablation,
    MeasuredRow,
    MeasuredTable,
    Plan,
    minus_best,
)
from sparsespec.evaluation.benchmark.machine import version
from sparsespec.evaluation.benchmark.report import Column, Section, Table
from sparsespec.evaluation.intervals import Interval
from sparsespec.evaluation.report import Report

SHOWN = ("mean_iou", "f1_50", "ap_50", "foreground_f")
"""Measures that every table shows."""

SETS = "sets"
"""Name of the section that says what was measured on."""

_CAPTIONS = {"mean_iou": "mIoU", "f1_50": "F1@50", "ap_50": "AP50", "foreground_f": "foreground F"}
_PEERS = "peers"
_LIBRARIES = ("numpy", "scipy", "numba", "onnxruntime")


@dataclass
class ResultSection(Section):
    """Tables of one part of an ablation: first all sets at a glance, then set by set with intervals.

    Attributes
    ----------
    glance
        How many of the tables are to be seen at once; the others are folded away in Markdown.
    """

    glance: int = 1
    text: Sequence[str] = field(default_factory=tuple)

    def to_text(self) -> str:
        """Return everything for a terminal."""
        return "\n\n".join(table.to_text() for table in self.tables)

    def to_markdown(self) -> str:
        """Return what stands between the page's markers."""
        parts = [*self.text, *(table.to_markdown() for table in self.tables[: self.glance])]
        folded = [table.to_markdown() for table in self.tables[self.glance :]]
        if folded:
            parts += [
                "<details>",
                "<summary>Set by set, with 95 % confidence intervals</summary>",
                *folded,
                "</details>",
            ]
        return "\n\n".join(parts)


def sections(ablation: Ablation, command: str) -> list[ResultSection]:
    """Lay out an ablation.

    Parameters
    ----------
    ablation
        What was measured.
    command
        That measured it.
    """
    head = ResultSection(SETS, {}, command, [_sets(ablation)], text=(_head(command),))
    return [head, *(_section(table, command, ablation.draws) for table in ablation.tables)]


def section_names(plans: Sequence[Plan]) -> list[str]:
    """Names of the sections that these tables become, which are those of a page's markers."""
    return [SETS, *(plan.key for plan in plans)]


def to_dict(ablation: Ablation, command: str) -> dict[str, Any]:
    """Everything as plain values that JSON can hold."""
    return {
        "version": __version__,
        "command": command,
        "sets": {
            dataset.name: {
                "images": len(dataset),
                "without_truth": list(dataset.without_truth),
                "without_image": list(dataset.without_image),
                "directions_without_it_fitted_on": dict(ablation.fitted_on.get(dataset.name, {})),
            }
            for dataset in ablation.sets
        },
        "tables": {
            table.key: {"title": table.title, "rows": [_row_values(row) for row in table.rows]}
            for table in ablation.tables
        },
        "minus_best_peer": _minus_best_values(ablation),
        "notes": list(ablation.notes),
    }


def _row_values(row: MeasuredRow) -> dict[str, Any]:
    by_set = {}
    for name, report in row.reports.items():
        values = report.to_dict()
        by_set[name] = {
            "summary": values["summary"],
            "intervals": values["intervals"],
            "minus_first_row": {key: _interval_values(value) for key, value in row.differences.get(name, {}).items()},
        }
    return {"title": row.title, "sets": by_set}


def _minus_best_values(ablation: Ablation) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for table in ablation.tables:
        if table.key == _PEERS:
            for title in _contenders(table):
                result[title] = {
                    name: {key: {"peer": peer, **_interval_values(value)} for key, (peer, value) in measures.items()}
                    for name, measures in _minus_best(table, title, ablation.draws).items()
                }
    return result


def _interval_values(interval: Interval) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in dataclasses.asdict(interval).items()}


def _head(command: str) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    return f"Measured by `{command}` with sparsespec {__version__}, {libraries}."


def _sets(ablation: Ablation) -> Table:
    columns = [
        Column("set", "set"),
        Column("images", "images", "count"),
        Column("true", "true instances", "count"),
        Column("empty", "images without one", "count"),
        Column("left_out", "left out"),
    ]
    first = ablation.tables[0].rows[0]
    rows = []
    for dataset in ablation.sets:
        summary = first.reports[dataset.name].summary
        left_out = [
            f"{len(names)} {what}"
            for names, what in ((dataset.without_truth, "without truth"), (dataset.without_image, "without image"))
            if names
        ]
        rows.append(
            {
                "set": dataset.name,
                "images": summary.images,
                "true": summary.n_true,
                "empty": summary.n_empty,
                "left_out": ", ".join(left_out) or "none",
            }
        )
    notes = list(ablation.notes)
    if ablation.fitted_on:
        counts = "; ".join(f"{name}: {sum(others.values())}" for name, others in ablation.fitted_on.items())
        notes.append(f"Photographs of the other sets that directions without a set were fitted on: {counts}.")
    return Table("sets", "Sets", columns, rows, notes)


def _section(table: MeasuredTable, command: str, draws: int) -> ResultSection:
    names = list(table.rows[0].reports)
    tables = [_at_a_glance(table, names)]
    if table.key == _PEERS:
        tables += [_ours_minus_best(table, title, draws) for title in _contenders(table)]
    glance = len(tables)
    tables += [_one_set(table, name) for name in names]
    return ResultSection(table.key, {}, command, tables, glance=glance)


def _at_a_glance(table: MeasuredTable, names: Sequence[str]) -> Table:
    columns = [Column("row", ""), *(Column(name, name) for name in names)]
    if len(names) > 1:
        columns.append(Column("mean of the sets", "mean of the sets"))
    rows = []
    for row in table.rows:
        values = {name: [_value(row.reports[name], measure) for measure in SHOWN] for name in names}
        cells = {name: _joined(numbers) for name, numbers in values.items()}
        cells["mean of the sets"] = _joined(list(np.mean(list(values.values()), axis=0)))
        rows.append({"row": row.title, **cells})
    return Table(table.key, table.title, columns, rows, [f"Cells: {' / '.join(_CAPTIONS[key] for key in SHOWN)}."])


def _one_set(table: MeasuredTable, name: str) -> Table:
    first = table.rows[0].title
    columns = [
        Column("row", ""),
        *(Column(measure, _CAPTIONS[measure]) for measure in SHOWN),
        Column("ratio", "found per true"),
        Column("count_error", "error in the count"),
    ]
    compared = len(table.rows) > 1
    if compared:
        columns += [Column(f"minus {measure}", f"{_CAPTIONS[measure]} - first row") for measure in COMPARED]
    rows = []
    for row in table.rows:
        report = row.reports[name]
        cells: dict[str, Any] = {"row": row.title}
        for measure in (*SHOWN, "count_error"):
            cells[measure] = _with_half_width(report.intervals.get(measure))
        summary = report.summary
        cells["ratio"] = f"{summary.n_predicted / summary.n_true:.2f}" if summary.n_true else "-"
        for measure in COMPARED:
            cells[f"minus {measure}"] = _signed(row.differences.get(name, {}).get(measure))
        rows.append(cells)
    notes = [f"The last columns are paired, image by image, with '{first}'."] if compared else []
    return Table(f"{table.key} {name}", f"{table.title}: {name}", columns, rows, notes)


def _contenders(table: MeasuredTable) -> list[str]:
    """Rows of ours that no peer has an advantage over: they aren't told the count."""
    return [row.title for row in table.rows if row.variant.method == "ours" and not row.variant.told_count]


def _minus_best(table: MeasuredTable, title: str, draws: int) -> Mapping[str, Mapping[str, tuple[str, Interval]]]:
    return minus_best(table, title, list(PEER_ROWS), SHOWN, draws=draws)


def _ours_minus_best(table: MeasuredTable, title: str, draws: int) -> Table:
    columns = [Column("set", "set"), *(Column(measure, _CAPTIONS[measure]) for measure in SHOWN)]
    rows = []
    for name, measures in _minus_best(table, title, draws).items():
        cells = {measure: f"{_signed(value)} {peer}" for measure, (peer, value) in measures.items()}
        rows.append({"set": name, **cells})
    return Table(f"{title} minus best peer", f"{title[:1].upper()}{title[1:]}, minus the best peer", columns, rows)


def _value(report: Report, measure: str) -> float:
    value = getattr(report.summary, measure)
    return math.nan if value is None else float(value)


def _joined(numbers: Sequence[float]) -> str:
    return " / ".join("-" if math.isnan(number) else f"{number:.3f}" for number in numbers)


def _with_half_width(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.value):
        return "-"
    return f"{interval.value:.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _signed(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.value):
        return "-"
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
