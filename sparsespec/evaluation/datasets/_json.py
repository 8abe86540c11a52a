"""Annotations in JSON: read once, kept small, and told apart by kind."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsespec.evaluation.datasets._common import DatasetError

_KEPT = ("id", "image_id", "video_id", "iscrowd", "segmentation", "segmentations")


def read_annotations(path: Path) -> dict[str, Any]:
    """Read annotations of images or videos.

    Of each annotation only what masks are made of is kept, with numbers in arrays (polygons as ``array("d")``, runs as
    ``array("q")``), which takes a third of the memory.

    Raises
    ------
    DatasetError
        The file can't be read, is not JSON or cut short, or holds a list, as detectors write their results.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=_smaller)
    except OSError as error:
        raise DatasetError(f"cannot read the annotations '{path}': {error.strerror or error}") from error
    except RecursionError as error:
        raise DatasetError(f"'{path}' is nested too deeply to be annotations") from error
    except ValueError as error:
        raise DatasetError(f"'{path}' is not JSON, or cut short ({error}); unpack or download it again") from error
    if isinstance(data, list):
        raise DatasetError(
            f"'{path}' holds a list, as detectors write their results, and no annotations: give the truth of the set"
        )
    if not isinstance(data, dict):
        raise DatasetError(f"'{path}' holds no annotations but a {type(data).__name__}")
    return data


def entries(data: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    """Return the list `key`, every entry an object with a whole number as ``id``."""
    rows = data.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"'{path}' has no list of objects {key!r}; it has {', '.join(map(repr, data)) or 'nothing'}")
    for row in rows:
        whole(row, "id", f"an entry of {key!r} in '{path}'")
    return rows


def whole(row: dict[str, Any], key: str, where: str, least: int | None = None) -> int:
    """Return a whole number of an entry, of at least `least`."""
    value = row.get(key)
    if type(value) is not int or (least is not None and value < least):
        wanted = "a whole number" if least is None else f"a whole number of at least {least}"
        raise DatasetError(f"{where} has {key} {value!r}, which should be {wanted}")
    return value


def unique_ids(rows: Iterable[dict[str, Any]], key: str, path: Path) -> None:
    """Check that no two entries have the same ``id``."""
    seen: set[int] = set()
    for row in rows:
        if row["id"] in seen:
            raise DatasetError(f"'{path}' has two entries of {key!r} with the id {row['id']}")
        seen.add(row["id"])


def by_id(rows: Iterable[dict[str, Any]], key: str, path: Path) -> dict[int, dict[str, Any]]:
    """Index entries by their ``id``, which must differ."""
    rows = list(rows)
    unique_ids(rows, key, path)
    return {row["id"]: row for row in rows}


def grouped(
    annotations: Iterable[dict[str, Any]], owner: str, owners: dict[int, dict[str, Any]], path: Path
) -> dict[int, list[dict[str, Any]]]:
    """Sort annotations by the image or video they belong to, in one pass."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for annotation in annotations:
        where = f"annotation {annotation['id']} of '{path}'"
        number = whole(annotation, owner, where)
        if number not in owners:
            raise DatasetError(f"{where} belongs to {owner} {number}, which the file does not list")
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise DatasetError(f"{where} has iscrowd {annotation['iscrowd']!r}, which should be 0 or 1")
        groups.setdefault(number, []).append(annotation)
    return groups


def other_kind(data: dict[str, Any]) -> str | None:
    """Say what annotations without masks of single images are, or None."""
    if "videos" in data:
        return "annotations of videos"
    rows = data.get("annotations")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    if "caption" in first:
        return "captions"
    if "segments_info" in first:
        return "panoptic annotations"
    if "segmentation" in first or "images" not in data:
        return None
    if "keypoints" in first:
        return "keypoints without masks"
    if "bbox" in first:
        return "boxes without masks"
    return None


def _smaller(row: dict[str, Any]) -> dict[str, Any]:
    counts = row.get("counts")
    if isinstance(counts, list):
        row["counts"] = _packed("q", counts)
    is_annotation = ("image_id" in row or "video_id" in row) and ("segmentation" in row or "segmentations" in row)
    if not is_annotation:
        return row
    kept = {key: row[key] for key in _KEPT if key in row}
    if isinstance(kept.get("segmentation"), list):
        kept["segmentation"] = [_packed("d", part) for part in kept["segmentation"]]
    if isinstance(kept.get("segmentations"), list):
        kept["segmentations"] = [
            [_packed("d", part) for part in frame] if isinstance(frame, list) else frame
            for frame in kept["segmentations"]
        ]
    return kept


def _packed(typecode: str, values: Any) -> Any:
    """Pack a list of numbers; anything else stays as it is, to be refused where it is used."""
    if not isinstance(values, list):
        return values
    try:
        return array(typecode, values)
    except (TypeError, OverflowError):
        return values
