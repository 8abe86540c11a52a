from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import sparsespec
from sparsespec.batch.plan import (
    SHARD_SIZES,
    Plan,
    PlanError,
    fewest_digests,
    inputs_digest,
    shard_count,
    shard_of,
)


def test_a_plan_is_read_as_it_was_written() -> None:
    plan = Plan({"seed": 0, "scale": 0.5, "input": "/in/café", "limit": None}, inputs_digest(["a"]), 7)
    read = Plan.decode(plan.encode())
    assert read == plan
    assert read.version == sparsespec.__version__
    assert plan.differences(read) == []
    assert json.loads(plan.encode())["program"] == "sparsespec"


def test_values_that_json_changes_make_no_difference() -> None:
    plan = Plan({"sizes": (1, 2), "path": Path("a"), 3: {2, 1}}, "", 1)
    assert plan.differences(Plan.decode(plan.encode())) == []


def test_differences_say_what_was_and_what_is() -> None:
    former = Plan({"seed": 0, "old": "x", "same": 1, "long": "a" * 200}, "one", 3, version="0.1")
    plan = Plan({"seed": 1, "new": None, "same": 1, "long": "b" * 200}, "two", 5, version="0.2")
    *others, seed = plan.differences(former)
    assert others[0] == "sparsespec was 0.1, is 0.2"
    assert others[1].startswith('long was "aaa')
    assert len(others[1]) < 200
    assert others[2:] == ["new is null, was not set", 'old was "x", is not set']
    assert seed == "seed was 0, is 1"


def test_number_and_text_are_different_settings() -> None:
    assert Plan({"seed": 1}, "", 1).differences(Plan({"seed": "1"}, "", 1)) == ['seed was "1", is 1']


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"format": 1}', b'{"format": 1, "shards": 3}'),
        *(
            json.dumps(json.loads(Plan({}, "", 1).encode()) | change).encode()
            for change in ({"shards": 0}, {"shards": "3"}, {"parameters": []}, {"shards": None})
        ),
    ],
)
def test_a_damaged_plan_is_refused(content: bytes) -> None:
    with pytest.raises(PlanError, match="it is damaged"):
        Plan.decode(content)


def test_every_cut_of_a_plan_is_refused() -> None:
    content = Plan({"seed": 0}, "digest", 3).encode().rstrip()
    for length in range(len(content)):
        with pytest.raises(PlanError):
            Plan.decode(content[:length])


def test_a_plan_of_another_format_is_refused() -> None:
    content = json.loads(Plan({}, "", 1, version="9.9").encode()) | {"format": 9}
    with pytest.raises(PlanError, match=r"the format 9, of sparsespec 9\.9; this version reads 2"):
        Plan.decode(json.dumps(content).encode())


@pytest.mark.parametrize(
    ("files", "size", "shards"),
    [(0, 64, 1), (1, 64, 1), (64, 64, 1), (65, 64, 2), (1_000_000, 512, 1954), (200, 128, 2)],
)
def test_as_many_shards_as_needed(files: int, size: int, shards: int) -> None:
    assert shard_count(files, size) == shards


@pytest.mark.parametrize("size", [0, 63, 513, -1])
def test_bad_sizes_of_shards(size: int) -> None:
    with pytest.raises(ValueError, match=f"shard_size must lie in 64..512, not {size}"):
        shard_count(10, size)


def test_the_shard_of_a_path_is_the_same_everywhere() -> None:
    # Of SHA-256: no other machine, version or order may give another.
    assert [shard_of(path, 1000) for path in ("a.jpg", "b/ü.png", "caf\udce9.png")] == [26, 938, 616]


def test_shards_have_about_the_size_stated() -> None:
    size = 128
    shards = shard_count(50_000, size)
    found = [0] * shards
    for number in range(50_000):
        found[shard_of(f"folder/{number:06}.jpg", shards)] += 1
    assert sum(found) == 50_000
    assert SHARD_SIZES[0] <= min(found)
    assert max(found) <= SHARD_SIZES[1]


def test_pictures_of_the_report_are_chosen_by_their_paths_alone() -> None:
    paths = [f"{number}.jpg" for number in range(500)]
    chosen = fewest_digests(paths, 20)
    assert chosen is not None
    assert len(chosen) == 20
    shuffled = random.Random(0).sample(paths, len(paths))
    assert fewest_digests(shuffled, 20) == chosen
    # One more image takes the place of one at most.
    more = fewest_digests([*paths, "new.jpg"], 20)
    assert more is not None
    assert len(more & chosen) >= 19
    assert fewest_digests(paths, 500) is None
    assert fewest_digests([], 0) is None


def test_the_digest_of_the_inputs_tells_lists_apart() -> None:
    lists = [[], ["a"], ["a", "b"], ["ab"], ["b", "a"], ["a\udce9"], ["a", ""]]
    assert len({inputs_digest(paths) for paths in lists}) == len(lists)
