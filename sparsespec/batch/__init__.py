"""A run over many images: which ones, where their results go, and a record of what happened to each.

One bad file costs one line of the record. The segmenter is any callable that takes an image and returns a
`sparsespec.Segmentation`.
"""

from __future__ import annotations

from sparsespec.batch.inline import Inline
from sparsespec.batch.inputs import Inputs, InputsError, find_inputs
from sparsespec.batch.job import Formats
from sparsespec.batch.names import output_names
from sparsespec.batch.outputs import OutputsError
from sparsespec.batch.record import BatchResult, Row
from sparsespec.batch.run import run_batch
from sparsespec.batch.store import LocalStore, Store, open_store

__all__ = [
    "BatchResult",
    "Formats",
    "Inline",
    "Inputs",
    "InputsError",
    "LocalStore",
    "OutputsError",
    "Row",
    "Store",
    "find_inputs",
    "open_store",
    "output_names",
    "run_batch",
]
