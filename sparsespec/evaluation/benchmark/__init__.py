"""Speed and memory against other libraries: what ``sparsespec bench`` measures and ``docs/benchmarks.md`` shows.

Every figure stands beside that of a peer from the same run on the same machine: their ratio says more than either.
"""

from sparsespec.evaluation.benchmark.bench import PARTS, Options, run
from sparsespec.evaluation.benchmark.data import InputError
from sparsespec.evaluation.benchmark.report import Section, Table, check_document, update_document

__all__ = ["PARTS", "InputError", "Options", "Section", "Table", "check_document", "run", "update_document"]
