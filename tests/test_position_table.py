from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsespec.position_table import PositionRule, positions_at, resize_positions
from tests.reference.resampling import bicubic_image

GOLDEN = Path(__file__).parent / "golden" / "position_tables.npz"

RULES = [PositionRule(offset, antialias) for offset in (0.0, 0.1) for antialias in (False, True)]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


def table_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_resized_as_pytorch_does(golden: dict[str, np.ndarray], rule: PositionRule) -> None:
    start = f"{rule.offset:g} {rule.antialias:d} "
    names = [name for name in golden if name.startswith(start)]
    assert len(names) >= 10
    for name in names:
        kind, grid = name.removeprefix(start).split()
        height, width = (int(side) for side in grid.split("x"))
        found = resize_positions(golden[kind], (height, width), rule=rule)
        assert found.dtype == np.float32
        # The table's standard deviation is 0.05, and PyTorch computes coordinates in float32.
        np.testing.assert_allclose(found, golden[name], atol=5e-7, rtol=0, err_msg=name)


def test_rules_differ(golden: dict[str, np.ndarray]) -> None:
    # Were the rules to come out the same, the test above would say little.
    found = [resize_positions(golden["square"], (9, 17), rule=rule) for rule in RULES]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (3, 9), (7, 5), (14, 2), (7, 9), (20, 21), (1, 40)])
@pytest.mark.parametrize("size", [(7, 5), (1, 6), (1, 1), (2, 3)])
def test_resized_as_defined(size: tuple[int, int], grid: tuple[int, int], rule: PositionRule) -> None:
    table = table_of(*size, 3)
    expected = bicubic_image(table, grid, offset=rule.offset, antialias=rule.antialias)
    np.testing.assert_allclose(resize_positions(table, grid, rule=rule), expected, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_own_size_is_returned_unchanged(rule: PositionRule) -> None:
    table = table_of(6, 4, 3)
    np.testing.assert_array_equal(resize_positions(table, (6, 4), rule=rule), table)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_position_fills_the_grid(rule: PositionRule) -> None:
    table = table_of(1, 1, 5)
    np.testing.assert_allclose(resize_positions(table, (4, 9), rule=rule), np.tile(table, (4, 9, 1)), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("grid", [(7, 5), (12, 31), (6, 4)])
def test_window_is_a_part_of_the_whole(grid: tuple[int, int], rule: PositionRule) -> None:
    table = table_of(7, 5, 3)
    whole = resize_positions(table, grid, rule=rule)
    window = resize_positions(table, grid, rule=rule, window=(2, 1, 6, 4))
    np.testing.assert_allclose(window, whole[2:6, 1:4], atol=1e-7)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_single_tokens(rule: PositionRule) -> None:
    table = table_of(7, 5, 3)
    whole = resize_positions(table, (12, 9), rule=rule)
    rows, columns = np.array([0, 11, 3, 3, 11]), np.array([8, 0, 4, 4, 7])
    found = positions_at(table, (12, 9), rows, columns, rule=rule)
    np.testing.assert_allclose(found, whole[rows, columns], atol=1e-7)
    none = np.zeros(0, int)
    assert positions_at(table, (12, 9), none, none, rule=rule).shape == (0, 3)


@pytest.mark.parametrize("grid", [(0, 4), (3, -1), (2, 3, 4), (2.5, 3), (7,), 7, "23"])
def test_bad_grid(grid: object) -> None:
    with pytest.raises(ValueError, match="grid must"):
        resize_positions(table_of(4, 4, 2), grid)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4, 2), (0, 4, 2), (4, 4, 0)])
def test_bad_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="position table"):
        resize_positions(np.zeros(shape, np.float32), (3, 3))


@pytest.mark.parametrize("window", [(0, 0, 4, 3), (-1, 0, 2, 2), (2, 0, 1, 2)])
def test_bad_window(window: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="window"):
        resize_positions(table_of(4, 4, 2), (3, 3), window=window)


def test_token_outside_the_grid() -> None:
    with pytest.raises(ValueError, match="inside the grid of 3 x 5"):
        positions_at(table_of(4, 4, 2), (3, 5), np.array([1, 3]), np.array([0, 0]))


@pytest.mark.parametrize("offset", [-0.1, 1.0, float("nan")])
def test_bad_offset(offset: float) -> None:
    with pytest.raises(ValueError, match="offset must"):
        PositionRule(offset)
