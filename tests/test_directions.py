from __future__ import annotations

import io
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.backbone import Backbone
from sparsespec.directions import Directions, DirectionsError, find_directions
from sparsespec.models import shipped_directions

C = 6
SHA = "ab" * 32


def made(channels: int = C, seed: int = 0, **changes: Any) -> Directions:
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {
        "objectness": rng.normal(size=3 * channels).astype(np.float32),
        "objectness_offset": -0.25,
        "position": rng.normal(size=(3 * channels, 2)).astype(np.float32),
        "position_offset": np.array([0.5, -0.125], np.float32),
        "source_sha256": SHA,
        "photographs": 7,
    }
    return Directions(**(parts | changes))


def same(one: Directions, other: Directions) -> bool:
    arrays = ("objectness", "position", "position_offset")
    values = ("objectness_offset", "source_sha256", "photographs")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays) and all(
        getattr(one, name) == getattr(other, name) for name in values
    )


def kinds(tokens: int = 20, channels: int = C, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(2, 3, (tokens, channels)).astype(np.float32) for _ in range(3)]


# What they say of tokens


def test_projection_is_that_of_unit_tokens() -> None:
    directions, features = made(), kinds()
    for kind in features:
        kind[3] = 0
    features[1][5] = 0
    unit = []
    for kind in features:
        length = np.linalg.norm(kind.astype(np.float64), axis=1, keepdims=True)
        unit.append(kind / np.where(length > 0, length, 1))
    stacked = np.hstack(unit)
    objectness = directions.objectness_of(*features)
    assert objectness.shape == (20,)
    assert objectness.dtype == np.float64
    np.testing.assert_allclose(objectness, stacked @ directions.objectness - 0.25, atol=1e-5)
    position = directions.position_of(*features)
    assert position.shape == (20, 2)
    np.testing.assert_allclose(position, stacked @ directions.position + [0.5, -0.125], atol=1e-5)
    # A token of zeros says nothing.
    assert objectness[3] == -0.25
    np.testing.assert_array_equal(position[3], [0.5, -0.125])


def test_order_and_length_of_features() -> None:
    directions, (keys, queries, values) = made(), kinds()
    told = directions.objectness_of(keys, queries, values)
    np.testing.assert_allclose(directions.objectness_of(9 * keys, queries, 0.1 * values), told, atol=1e-5)
    assert np.abs(directions.objectness_of(queries, keys, values) - told).max() > 0.1
    only_keys = made(objectness=np.r_[np.ones(C), np.zeros(2 * C)])
    expected = (keys / np.linalg.norm(keys, axis=1, keepdims=True)).sum(axis=1) - 0.25
    np.testing.assert_allclose(only_keys.objectness_of(keys, queries, values), expected, atol=1e-5)


def test_halves_and_other_memory_layouts_do() -> None:
    directions, features = made(), kinds()
    told = directions.position_of(*features)
    halves = [kind.astype(np.float16) for kind in features]
    np.testing.assert_allclose(directions.position_of(*halves), told, atol=5e-3)
    np.testing.assert_array_equal(directions.position_of(*[np.asfortranarray(kind) for kind in features]), told)


def test_features_that_do_not_fit() -> None:
    directions, features = made(), kinds()
    with pytest.raises(DirectionsError, match=r"with 6 channels, but the keys have 5.*sparsespec fit.*directions=None"):
        directions.objectness_of(*kinds(channels=5))
    with pytest.raises(DirectionsError, match="but the values have 7"):
        directions.position_of(features[0], features[1], np.ones((20, 7), np.float32))
    with pytest.raises(ValueError, match="keys are of 20 tokens, but queries of 19"):
        directions.position_of(features[0], features[1][1:], features[2])
    with pytest.raises(ValueError, match=r"queries must be an \(N, C\) array"):
        directions.objectness_of(features[0], features[1][0], features[2])
    features[2][4, 1] = np.nan
    with pytest.raises(ValueError, match=r"values must be finite .* rows 4"):
        directions.objectness_of(*features)


# What they are


def test_shared_by_all_images_they_cannot_be_changed() -> None:
    weights = np.ones(3 * C, np.float64)
    directions = made(objectness=weights)
    weights[:] = 5
    assert directions.objectness.dtype == np.float32
    assert (directions.objectness == 1).all()
    for name in ("objectness", "position", "position_offset"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(directions, name)[...] = 0
    assert directions.channels == C


def test_they_travel_to_other_processes() -> None:
    assert same(pickle.loads(pickle.dumps(made())), made())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectness": np.ones(3 * C + 1)}, r"objectness must hold 3 C weights.*\(19,\)"),
        ({"objectness": np.ones(0), "position": np.ones((0, 2))}, r"objectness must hold 3 C weights.*\(0,\)"),
        ({"objectness": np.ones((3 * C, 1))}, r"objectness must hold 3 C weights.*\(18, 1\)"),
        ({"objectness": np.float32(1)}, r"objectness must hold 3 C weights.*\(\)"),
        ({"position": np.ones((3 * C, 3))}, r"position must be \(18, 2\) with an offset of \(2,\), not \(18, 3\)"),
        ({"position": np.ones((2, 3 * C))}, r"position must be \(18, 2\)"),
        ({"position_offset": np.ones(3)}, r"not \(18, 2\) and \(3,\)"),
        ({"objectness": np.full(3 * C, np.nan)}, "finite"),
        ({"objectness": np.full(3 * C, 1e300)}, "finite"),
        ({"position": np.full((3 * C, 2), -np.inf)}, "finite"),
        ({"position_offset": [0, np.nan]}, "finite"),
        ({"objectness_offset": np.inf}, "finite"),
        ({"objectness": ["a"] * 3 * C}, "objectness must hold real numbers; its dtype is <U1"),
        ({"position": np.ones((3 * C, 2), complex)}, "position must hold real numbers; its dtype is complex128"),
    ],
)
def test_impossible_directions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DirectionsError, match=message):
        made(**changes)


# Files


def test_a_file_says_all_of_it(tmp_path: Path) -> None:
    directions = made()
    path = tmp_path / "mine.npz"
    directions.save(path)
    assert same(Directions.load(path), directions)
    assert same(Directions.load(str(path)), directions)
    # Also under a name without NumPy's ending, which isn't added.
    directions.save(str(tmp_path / "mine"))
    assert same(Directions.load(tmp_path / "mine"), directions)
    # It is an ordinary .npz.
    with np.load(path, allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["position"], directions.position)


def test_same_content_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made().to_bytes()
    later = time.localtime(time.time() + 4e7)
    monkeypatch.setattr(time, "localtime", lambda *_: later)
    made().save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == first
    assert made(photographs=8).to_bytes() != first
    assert Directions.load(tmp_path / "again.npz").to_bytes() == first


def test_a_file_replaces_another_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    path.write_bytes(b"x" * 100_000)
    made().save(path)
    assert path.read_bytes() == made().to_bytes()


def content() -> dict[str, Any]:
    with np.load(io.BytesIO(made().to_bytes())) as stored:
        return {name: stored[name] for name in stored.files}


def archive(**changes: Any) -> bytes:
    """A file with some members changed, and those left out that are None."""
    members = {name: value for name, value in (content() | changes).items() if value is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **(content() | {"objectness": np.array([Bomb()], object)}))
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("word/document.xml", "<w/>")
    return buffer.getvalue()


def damaged() -> bytes:
    whole = bytearray(made().to_bytes())
    place = whole.index(made().objectness.tobytes())
    whole[place] ^= 0xFF
    return bytes(whole)


def single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a file of directions was unpickled",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "is no file of directions, or it is cut short; give a file that 'sparsespec fit' wrote"),
        (lambda: b"objectness 1 2 3\n", "is no file of directions, or it is cut short"),
        (lambda: made().to_bytes()[:500], "is no file of directions, or it is cut short"),
        (lambda: made().to_bytes()[:-30], "is no file of directions, or it is cut short"),
        (lambda: pickle.dumps({"objectness": Bomb()}), "is no file of directions"),
        (single_array, "is no file of directions"),
        (zipped, "is no file of directions, but holds something else"),
        (damaged, "is no file of directions, or it is damaged .*CRC"),
        (pickled, "is no file of directions, or it is damaged .*allow_pickle=False"),
        (lambda: archive(format=None), "is no file of directions, but holds something else"),
        (lambda: archive(format=np.array("sparsespec-directions")), "but holds something else"),
        (lambda: archive(format=np.ones(2)), "but holds something else"),
        (lambda: archive(format=np.array(["weather", "1"])), "holds 'weather' of version 1; this version .* reads"),
        (
            lambda: archive(format=np.array(["sparsespec-directions", "2"])),
            "holds 'sparsespec-directions' of version 2; this version of sparsespec reads .* of version 1",
        ),
        (lambda: archive(position=None), "holds no usable directions: 'position' is missing"),
        (lambda: archive(photographs=None), "holds no usable directions: 'photographs' is missing"),
        (lambda: archive(objectness=np.full(18, np.nan, np.float32)), "holds no usable directions: .*finite"),
        (lambda: archive(objectness_offset=np.float64("inf")), "holds no usable directions: .*finite"),
        (lambda: archive(objectness_offset=np.zeros(1)), r"objectness_offset must be a single value; .*\(1,\)"),
        (lambda: archive(photographs=np.array("many")), "photographs must be a single value; it is an array of <U4"),
        (lambda: archive(source_sha256=np.ones(2)), "source_sha256 must be a single value"),
        (lambda: archive(objectness=np.ones(17)), r"objectness must hold 3 C weights"),
        (lambda: archive(position=np.ones((18, 1))), r"position must be \(18, 2\)"),
        (lambda: archive(position=np.array(["a"])), "position must hold real numbers"),
    ],
)
def test_wrong_files(make: Callable[[], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.npz"
    path.write_bytes(make())
    with pytest.raises(DirectionsError, match=message) as caught:
        Directions.load(path)
    assert repr(os.fspath(path)) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.npz", tmp_path, "", "missing\0.npz"):
        with pytest.raises(DirectionsError, match=r"there is no file of directions .*'sparsespec fit'"):
            Directions.load(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().save(tmp_path / "mine.npz")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # The superuser, who runs tests in containers, may read everything.
    monkeypatch.setattr("sparsespec.directions.np.load", refuse)
    with pytest.raises(DirectionsError, match=r"mine\.npz' can't be read: Permission denied"):
        Directions.load(tmp_path / "mine.npz")


# For a network


def test_directions_for_a_network(tmp_path: Path) -> None:
    directions = made()
    assert find_directions(None, source_sha256=SHA, channels=C) is None
    assert find_directions(directions, source_sha256=SHA, channels=C) is directions
    directions.save(tmp_path / "default")
    for path in (tmp_path / "default", str(tmp_path / "default")):
        found = find_directions(path, source_sha256=SHA, channels=C)
        assert found is not None
        assert same(found, directions)
    # Where one of the two doesn't say what it comes from, the channels decide.
    assert find_directions(made(source_sha256=""), source_sha256=SHA, channels=C) is not None
    assert find_directions(directions, source_sha256="", channels=C) is directions


def test_directions_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    made().save(path)
    for given, where in ((made(), "the directions were"), (path, "the directions in '.*mine.npz' were")):
        with pytest.raises(DirectionsError, match=rf"{where} .*SHA-256 abababababab\.\.\., this .* from cdcdcdcdcdcd"):
            find_directions(given, source_sha256="cd" * 32, channels=C)
        with pytest.raises(DirectionsError, match="of a network with 6 channels, this one has 384; fit them anew"):
            find_directions(given, source_sha256=SHA, channels=384)


def test_the_default_without_directions_for_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_directions("default", source_sha256="cd" * 32, channels=C) is None
    assert find_directions("default", source_sha256="", channels=C) is None
    monkeypatch.setattr("sparsespec.directions.shipped_directions", lambda _: tmp_path / "lost.npz")
    with pytest.raises(DirectionsError, match=r"missing from this installation: .*lost\.npz'; reinstall sparsespec"):
        find_directions("default", source_sha256=SHA, channels=C)


def test_the_shipped_directions_fit_the_embedded_model() -> None:
    backbone = Backbone()
    path = shipped_directions(backbone.source_sha256)
    assert path is not None
    directions = Directions.load(path)
    assert directions.photographs == 165
    assert directions.source_sha256 == backbone.source_sha256
    assert directions.channels == backbone.channels == 384
    found = find_directions("default", source_sha256=backbone.source_sha256, channels=backbone.channels)
    assert found is not None
    assert same(found, directions)
    assert find_directions("default", source_sha256=backbone.source_sha256, channels=backbone.channels) is found
    # Fitted to unit deviation, with more background than objects.
    assert 0.1 < np.linalg.norm(directions.objectness) < 100
    assert np.linalg.norm(directions.position, axis=0).min() > 0.1
