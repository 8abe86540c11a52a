"""A table of instances, one row each, as CSV or Parquet."""

from __future__ import annotations

import csv
import io
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import AtomicFile
from sparsespec._mapped import release

if TYPE_CHECKING:
    from sparsespec.images import PixelSource

__all__ = ["COLUMNS", "TABLE_KINDS", "TableKind", "TableWriter", "instance_properties"]

TableKind = Literal["csv", "parquet"]
TABLE_KINDS: tuple[TableKind, ...] = ("csv", "parquet")
"""What `TableWriter` writes; the names are the endings of the files too."""

COLUMNS: dict[str, str] = {
    "image_id": "int64",
    "file_name": "string",
    "page": "int32",
    "image_width": "int32",
    "image_height": "int32",
    "label": "int32",
    "score": "float64",
    "area": "int64",
    "x": "int32",
    "y": "int32",
    "width": "int32",
    "height": "int32",
    "centroid_x": "float64",
    "centroid_y": "float64",
    "mean_red": "float64",
    "mean_green": "float64",
    "mean_blue": "float64",
    "mask": "string",
}
"""The columns and, by their names in Arrow, their types. ``page`` and ``mask`` may be empty."""

_PROPERTIES = ("centroid_x", "centroid_y", "mean_red", "mean_green", "mean_blue")
_DIGITS = 6
_PIXELS_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 1 << 14
# What a spreadsheet takes for the beginning of a formula, the wide forms included, or skips on the way to one.
_FORMULA_SIGNS = tuple("=+-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}"
                       "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip


def instance_properties(
    image: npt.NDArray[Any] | PixelSource, labels: npt.NDArray[Any], annotations: list[dict[str, Any]]
) -> list[dict[str, float]]:
    """Measure where the instances of an image are and of which colour, in one pass over their pixels.

    Rows are read from top to bottom, about a million pixels at a time, and only from the window that holds instances.

    Parameters
    ----------
    image : (H, W, 3) ndarray or PixelSource
        The photograph, see `sparsespec.images.PixelSource`.
    labels : (H, W) ndarray of int
        0 = background. It may be mapped from a file.
    annotations : list of dict
        Of `sparsespec.formats.instance_annotations`: ``label`` and ``bbox`` are used.

    Returns
    -------
    list of dict
        For each annotation ``centroid_x`` and ``centroid_y``, pixels, where 0 is the centre of the first pixel; and
        ``mean_red``, ``mean_green``, ``mean_blue``, means of the stored values with the largest as 1. Rounded to six
        decimals.

    Raises
    ------
    ValueError
        The labels are not of the size of the image, or an annotation has no pixel in its box.
    """
    from sparsespec.images import as_pixels

    if labels.shape != tuple(image.shape[:2]):
        raise ValueError(f"labels must have the size of the image {tuple(image.shape[:2])}, got {labels.shape}")
    if not annotations:
        return []
    source = as_pixels(image)
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.int64)
    (left, top), (right, bottom) = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    count = 1 + max(annotation["label"] for annotation in annotations)
    sums = np.zeros((6, count))  # pixels, x, y, red, green, blue
    step = max(1, _PIXELS_AT_ONCE // int(right - left))
    for first in range(int(top), int(bottom), step):
        last = min(first + step, int(bottom))
        _add_band(sums, labels[first:last, left:right], source.read(first, int(left), last, int(right)), left, first)
        release(labels)
    scale = 1.0 if source.dtype.kind == "f" else float(np.iinfo(source.dtype).max)
    result = []
    for annotation in annotations:
        pixels, *totals = sums[:, annotation["label"]].tolist()
        if pixels == 0:
            raise ValueError(f"label {annotation['label']} has no pixel in the box {annotation['bbox']}")
        means = np.divide(totals, (pixels, pixels, *[pixels * scale] * 3)).round(_DIGITS).tolist()
        result.append(dict(zip(_PROPERTIES, means, strict=True)))
    return result


def _add_band(
    sums: npt.NDArray[np.float64], labels: npt.NDArray[Any], pixels: npt.NDArray[Any], left: int, top: int
) -> None:
    """Add the sums of some rows, which begin at `left` and `top`, run by run: a run is of one label, in one row."""
    height, width = labels.shape
    begins = np.ones((height, width), bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    rows, columns = np.divmod(starts, width)
    lengths = np.diff(starts, append=height * width).astype(np.float64)
    # Sums of whole numbers, and of halves, are exact: they do not depend on how the rows were parted.
    owners = labels[rows, columns]
    colours = np.add.reduceat(pixels.reshape(-1, 3), starts, axis=0, dtype=np.float64)
    weights = (lengths, lengths * (columns + (left - 0.5) + lengths / 2), lengths * (rows + top), *colours.T)
    known = owners < sums.shape[1]
    for total, weight in zip(sums, weights, strict=True):
        total += np.bincount(owners[known], weights=weight[known], minlength=total.size)


class TableWriter:
    """A table written as the run goes, which appears with `close`.

    The columns are those of `COLUMNS`, with the box (``x``, ``y``, ``width``, ``height``) and the area in pixels. An
    image without instances has no row. CSV is that of RFC 4180 in UTF-8. In either kind, what of a file name is not
    valid Unicode is replaced by U+FFFD, and counted in `replaced_names`. In CSV, a file name that a spreadsheet would
    take for a formula is written with ``./`` before it, which leaves it a path to the same file.

    Parameters
    ----------
    path : str or os.PathLike
        Target; its folder must exist.
    kind : {'csv', 'parquet'}
        Parquet needs pyarrow.

    Attributes
    ----------
    replaced_names : int
        Images whose name or mask is not written as it is, because it is not valid Unicode.

    Raises
    ------
    ValueError
        Another kind.
    ImportError
        pyarrow is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], kind: TableKind = "csv") -> None:
        if kind not in TABLE_KINDS:
            raise ValueError(f"kind must be one of {', '.join(TABLE_KINDS)}, got {kind!r}")
        self.replaced_names = 0
        self._rows: list[tuple[Any, ...]] = []
        self._schema = _arrow_schema() if kind == "parquet" else None
        self._target = AtomicFile(path)
        self._parquet: Any = None
        if self._schema is None:
            self._target.file.write(_csv_lines([tuple(COLUMNS)]))
        else:
            from pyarrow import parquet

            try:
                self._parquet = parquet.ParquetWriter(self._target.file, self._schema)
            except BaseException:
                self._target.discard()
                raise

    def add(
        self,
        image_id: int,
        file_name: str,
        page: int | None,
        width: int,
        height: int,
        annotations: list[dict[str, Any]],
        properties: list[dict[str, float]],
        mask: str | None,
    ) -> None:
        """Add the instances of one image.

        Parameters
        ----------
        image_id : int
            As in ``instances.json``.
        file_name : str
            Path of the image.
        page : int or None
            Page of a file with several.
        width, height : int
            Size of the image, pixels.
        annotations : list of dict
            Of `sparsespec.formats.instance_annotations`.
        properties : list of dict
            Of `instance_properties`.
        mask : str or None
            Path of the label image.

        Raises
        ------
        ValueError
            Not as many properties as annotations.
        """
        name, shown_mask = _unicode(file_name), None if mask is None else _unicode(mask)
        self.replaced_names += name != file_name or shown_mask != mask
        if self._schema is None:
            name, shown_mask = _no_formula(name), None if shown_mask is None else _no_formula(shown_mask)
        for annotation, measured in zip(annotations, properties, strict=True):
            self._rows.append(
                (
                    *(image_id, name, page, width, height),
                    *(annotation["label"], annotation["score"], annotation["area"], *annotation["bbox"]),
                    *(measured[name] for name in _PROPERTIES),
                    shown_mask,
                )
            )
        while len(self._rows) >= _ROWS_AT_ONCE:  # so that the groups do not depend on how many rows come at a time
            self._flush(_ROWS_AT_ONCE)

    def close(self) -> None:
        """Finish the file and put it in its place."""
        try:
            if self._rows:
                self._flush(len(self._rows))
            if self._parquet is not None:
                self._parquet.close()
            self._target.commit()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Give up; a file of an earlier run stays as it was."""
        if self._parquet is not None:
            with suppress(Exception):  # it writes the end of the file, for which there may be no room
                self._parquet.close()
        self._target.discard()

    def _flush(self, count: int) -> None:
        rows, self._rows = self._rows[:count], self._rows[count:]
        if self._schema is None:
            self._target.file.write(_csv_lines(rows))
        else:
            import pyarrow

            columns = [
                pyarrow.array(column, field.type)
                for column, field in zip(zip(*rows, strict=True), self._schema, strict=True)
            ]
            self._parquet.write_table(pyarrow.Table.from_arrays(columns, schema=self._schema), row_group_size=count)


def _arrow_schema() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet  # noqa: F401 - asked for now, not after the first images
    except ImportError as error:
        raise ImportError("a Parquet table needs pyarrow: pip install 'sparsespec[table]'; CSV does not") from error
    optional = ("page", "mask")
    return pyarrow.schema(
        [pyarrow.field(name, getattr(pyarrow, kind)(), nullable=name in optional) for name, kind in COLUMNS.items()]
    )


def _csv_lines(rows: list[tuple[Any, ...]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode("utf-8")


def _unicode(name: str) -> str:
    # Python keeps bytes of a file name that do not decode as halves of surrogate pairs.
    return "".join("\N{REPLACEMENT CHARACTER}" if "\ud800" <= c <= "\udfff" else c for c in name)


def _no_formula(name: str) -> str:
    return "./" + name if name.startswith(_FORMULA_SIGNS) else name
