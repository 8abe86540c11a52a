from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sparsespec.evaluation import Dataset, Example, Report, TrueInstances, measure
from sparsespec.evaluation.ablation import PEER_ROWS, Ablation, MeasuredRow, MeasuredTable, Plan, Variant, plans
from sparsespec.evaluation.benchmark.report import check_document, update_document
from sparsespec.evaluation.intervals import Interval
from sparsespec.evaluation.results import section_names, sections, to_dict

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMAND = "sparsespec eval --ablation --truth a --truth b"


def report(found: int, images: int = 3) -> Report:
    """Of images with two objects each, of which so many are found in every image."""
    truth = np.zeros((8, 20), int)
    truth[1:4, 1:5], truth[4:7, 8:18] = 1, 2
    predicted = np.where(truth <= found, truth, 0)
    return measure((str(k), predicted, [0.9, 0.5], truth) for k in range(images)).with_intervals(n=20)


@pytest.fixture
def ablation() -> Ablation:
    example = Example("x", Path(), lambda: TrueInstances.from_labels(np.eye(2, dtype=int)))
    sets = [Dataset("a", [example] * 3), Dataset("b", [example], without_truth=("lost",), without_image=("y", "z"))]
    change = {name: {"mean_iou": Interval(-0.5, -0.7, -0.25), "f1_50": Interval(0.0, 0.0, 0.0)} for name in "ab"}
    both = {"a": report(2), "b": report(2, 1)}
    one = {"a": report(1), "b": report(1, 1)}
    peers = [MeasuredRow(title, variant, one, change) for title, variant in PEER_ROWS.items()]
    tables = [
        MeasuredTable(
            "peers",
            "Peers",
            [
                MeasuredRow("ours", Variant(), both, {}),
                MeasuredRow("ours, told the count", Variant(told_count=True), both, change),
                *peers,
            ],
        ),
        MeasuredTable("steps", "Steps", [MeasuredRow("ours", Variant(), both, {})]),
    ]
    return Ablation(sets, tables, {"a": {"b": 1}, "b": {"a": 3}}, draws=20)


@pytest.mark.needs("pycocotools")
def test_markdown_shows_all_sets_first_and_the_intervals_below(ablation: Ablation) -> None:
    head, peers, steps = sections(ablation, COMMAND)
    assert (head.name, peers.name, steps.name) == ("sets", "peers", "steps")
    text = head.to_markdown()
    assert f"`{COMMAND}`" in text
    assert "| a | 3 | 6 | 0 | none |" in text
    assert "| b | 1 | 2 | 0 | 1 without truth, 2 without image |" in text
    assert "a: 1; b: 3" in text
    text = peers.to_markdown()
    glance, folded = text.split("<details>")
    found = "1.000 / 1.000 / 1.000 / 1.000"
    assert f"| ours | {found} | {found} | {found} |" in glance
    assert re.search(r"\| TokenCut \| (0\.500 / 0\.667 / 0\.505 / 0\.444) \| \1 \| \1 \|", glance)
    assert "### Ours, minus the best peer" in glance
    assert "told the count, minus" not in glance
    assert "| a | +0.500 [+0.500, +0.500] TokenCut |" in glance
    assert "| TokenCut | 0.500 ± 0.000 | 0.667 ± 0.000 |" in folded
    assert "| 0.50 | 1.000 ± 0.000 | -0.500 [-0.700, -0.250] | +0.000 [+0.000, +0.000] |" in folded
    assert "with 'ours'" in folded
    assert "first row" not in steps.to_markdown()


def test_text_has_every_table(ablation: Ablation) -> None:
    text = "\n\n".join(section.to_text() for section in sections(ablation, COMMAND))
    for title in (
        "Sets",
        "Peers",
        "Ours, minus the best peer",
        "Peers: a",
        "Peers: b",
        "Steps",
        "Steps: a",
        "Steps: b",
    ):
        assert f"\n{title}\n---" in f"\n{text}"


@pytest.mark.needs("pycocotools")
def test_json_has_every_measure_with_its_interval(ablation: Ablation) -> None:
    values = json.loads(json.dumps(to_dict(ablation, COMMAND), allow_nan=False))
    assert values["command"] == COMMAND
    assert values["sets"]["b"] == {
        "images": 1,
        "without_truth": ["lost"],
        "without_image": ["y", "z"],
        "directions_without_it_fitted_on": {"a": 3},
    }
    row = values["tables"]["peers"]["rows"][2]
    assert row["title"] == "TokenCut"
    assert row["sets"]["a"]["summary"]["mean_iou"] == pytest.approx(0.5)
    assert row["sets"]["a"]["intervals"]["ap_75"].keys() == {"low", "high"}
    assert row["sets"]["a"]["minus_first_row"]["mean_iou"] == {"value": -0.5, "low": -0.7, "high": -0.25}
    best = values["minus_best_peer"]["ours"]["b"]["f1_50"]
    assert best["peer"] == "TokenCut"
    assert best["value"] == pytest.approx(1 / 3)


def test_tables_take_their_place_in_a_page(ablation: Ablation, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    names = section_names([Plan("peers", "", {}), Plan("steps", "", {})])
    page.write_text("# T\n" + "".join(f"before {n}\n<!-- begin {n} -->\nold\n<!-- end {n} -->\n" for n in names))
    update_document(page, sections(ablation, COMMAND))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# T\nbefore sets\n<!-- begin sets -->\n")
    assert "\nold\n" not in text
    assert text.index("before peers") < text.index("### Peers") < text.index("before steps") < text.index("### Steps")
    update_document(page, sections(ablation, COMMAND))
    assert page.read_text(encoding="utf-8") == text


def test_the_page_of_results_has_a_place_for_every_table() -> None:
    check_document(DOCS / "results.md", section_names(plans()))
