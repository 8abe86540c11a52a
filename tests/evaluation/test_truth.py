from __future__ import annotations

import numpy as np
import pytest

from sparsespec.evaluation import Dataset, Example, TrueInstances


def test_from_labels_each_value_is_one_mask() -> None:
    labels = np.array([[0, 9, 9], [4, 4, 0]])
    truth = TrueInstances.from_labels(labels, void=labels == 9)
    assert len(truth) == 2
    assert truth.shape == (2, 3)
    np.testing.assert_array_equal(truth.masks, [labels == 4, labels == 9])
    assert not truth.crowd.any()
    np.testing.assert_array_equal(truth.void, labels == 9)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64])
def test_from_labels_of_nothing(dtype: type) -> None:
    truth = TrueInstances.from_labels(np.zeros((3, 4), dtype))
    assert len(truth) == 0
    assert truth.masks.shape == (0, 3, 4)
    assert truth.shape == (3, 4)


def test_crowds_do_not_count() -> None:
    assert len(TrueInstances(np.ones((3, 2, 2), bool), np.array([True, False, True]))) == 1


def test_arrays_must_fit() -> None:
    masks, crowd = np.zeros((2, 3, 4), bool), np.zeros(2, bool)
    with pytest.raises(ValueError, match=r"masks must be an \(n, H, W\) bool array, not \(3, 4\) of bool"):
        TrueInstances(masks[0], crowd)
    with pytest.raises(ValueError, match="of uint8"):
        TrueInstances(masks.astype(np.uint8), crowd)
    with pytest.raises(ValueError, match=r"one bool for each of 2 masks, not \(3,\)"):
        TrueInstances(masks, np.zeros(3, bool))
    with pytest.raises(ValueError, match=r"void must be a bool array of shape \(3, 4\), not \(4, 3\)"):
        TrueInstances(masks, crowd, np.zeros((4, 3), bool))
    with pytest.raises(
        ValueError, match=r"labels must be an \(H, W\) array of whole numbers, not \(3, 4, 2\) of int64"
    ):
        TrueInstances.from_labels(np.zeros((3, 4, 2), np.int64))
    with pytest.raises(ValueError, match="of float64"):
        TrueInstances.from_labels(np.zeros((3, 4)))  # type: ignore[arg-type]


def test_a_data_set_is_a_sequence_that_reads_nothing_by_itself(tmp_path) -> None:  # type: ignore[no-untyped-def]
    loaded = []

    def load() -> TrueInstances:
        loaded.append(1)
        return TrueInstances.from_labels(np.eye(2, dtype=int))

    examples = [Example(name, tmp_path / f"{name}.jpg", load) for name in "ab"]
    dataset = Dataset("two", examples)
    assert len(dataset) == 2
    assert [example.name for example in dataset] == ["a", "b"]
    assert loaded == []
    assert len(examples[0].load()) == 1
    assert (tuple(dataset.without_truth), tuple(dataset.without_image)) == ((), ())
