"""A run over many images: which ones, where their results go, and a record of what happened to each.

One bad file costs one line of the record. The segmenter is any callable that takes an image and returns a
`sparsespec.Segmentation`.
"""

from __future__ import annotations

from sparsespec.batch.inline import run_batch
from sparsespec.batch.inputs import Inputs, InputsError, find_inputs
from sparsespec.batch.names import output_names
from sparsespec.batch.outputs import OutputsError
from sparsespec.batch.record import BatchResult, Row

__all__ = [
    "BatchResult",
    "Inputs",
    "InputsError",
    "OutputsError",
    "Row",
    "find_inputs",
    "output_names",
    "run_batch",
]
