from __future__ import annotations

import pytest

from sparsespec.server.problems import ProblemError
from sparsespec.server.wish import COCO, LABELS, OVERLAY, PARAMETERS, Wish, negotiated, parse
from tests.server.serving import Limits

MODELS = ["small", "large"]


def wish(query: list[tuple[str, str]], accept: str | None = None) -> Wish:
    return parse(query, accept, MODELS, Limits())


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, COCO),
        ("", COCO),
        ("*/*", COCO),
        ("application/json", COCO),
        ("image/png", LABELS),
        ("IMAGE/PNG", LABELS),
        ("image/jpeg", OVERLAY),
        ("image/*", LABELS),
        ("application/*", COCO),
        ("image/png;q=0.5, image/jpeg;q=0.8", OVERLAY),
        ("image/png ; q=0.5 , image/jpeg ; Q=0.5", LABELS),
        ("image/*, image/png;q=0", OVERLAY),
        ("*/*;q=0.1, image/jpeg", OVERLAY),
        ("text/html, */*;q=0.8", COCO),
        ("image/avif,image/webp,image/png,*/*;q=0.8", LABELS),
        ("application/json;q=0, */*", LABELS),
        ("nonsense, image/png", LABELS),
        ("image/png;q=nonsense, image/jpeg;q=0.1", OVERLAY),
        ("image/png;q=1.5, image/jpeg;q=0.001", OVERLAY),
        ("image/png;charset=utf-8", LABELS),
    ],
)
def test_accept_chooses_the_answer(accept: str | None, kind: str) -> None:
    assert negotiated(accept) == kind


@pytest.mark.parametrize("accept", ["text/html", "image/webp", "application/json;q=0", "*/png", "nonsense", "*/*;q=0"])
def test_nothing_acceptable(accept: str) -> None:
    with pytest.raises(ProblemError) as caught:
        negotiated(accept)
    assert caught.value.problem.status == 406
    assert caught.value.problem.members["available"] == [COCO, LABELS, OVERLAY]


def test_parameters() -> None:
    given = {
        "model": "large",
        "n_instances": "3",
        "long_side": "672",
        "page": "2",
        "polygons": "TRUE",
        "layers": "4",
        "max_side": "640",
    }
    assert set(given) == set(PARAMETERS)
    assert wish(list(given.items()), "image/jpeg") == Wish(OVERLAY, "large", 3, 672, 2, True, 4, 640)
    assert wish([]) == Wish(COCO, "small")
    assert wish([("n_instances", "Auto"), ("polygons", "no")]).n_instances is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n_instances", value) for value in ("", "0", "-1", "1.5", "51", "many", "٣", "1e2", "9" * 30, "+1")),
        *(("long_side", value) for value in ("0", "897", "auto")),
        *(("page", value) for value in ("0", "x")),
        *(("polygons", value) for value in ("", "2", "maybe")),
        *(("layers", value) for value in ("9", "-1")),
        ("max_side", "4097"),
        ("nonsense", "1"),
        ("<script>", "1"),
    ],
)
def test_parameters_that_are_not_valid(name: str, value: str) -> None:
    with pytest.raises(ProblemError) as caught:
        wish([(name, value)])
    problem = caught.value.problem
    assert problem.status == 422
    assert problem.members["parameter"] == name
    assert problem.advice
    assert len(problem.detail) < 200


def test_parameters_given_twice() -> None:
    with pytest.raises(ProblemError, match="not valid") as caught:
        wish([("page", "1"), ("page", "2")])
    assert "twice" in caught.value.problem.detail


def test_a_model_that_is_not_served() -> None:
    with pytest.raises(ProblemError) as caught:
        wish([("model", "huge\n")])
    problem = caught.value.problem
    assert problem.status == 404
    assert problem.members["models"] == MODELS
    assert "small, large" in problem.advice
    assert "\n" not in problem.detail


@pytest.mark.parametrize(
    "given",
    [
        {"max_body": 0},
        {"max_body": 1.5},
        {"max_pixels": True},
        {"time_limit": 0},
        {"time_limit": float("inf")},
        {"time_limit": float("nan")},
        {"max_waiting": -1},
        {"grace": -1.0},
        {"memory_limit": 0},
        {"max_body": 300_000_000},
        {"wait_limit": "long"},
    ],
)
def test_limits_out_of_range(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        Limits(**given)  # type: ignore[arg-type]


def test_limits_that_are_none() -> None:
    assert Limits(max_waiting=0, grace=0, memory_limit=None).max_waiting == 0
