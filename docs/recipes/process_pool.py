"""Segment photographs in worker processes, and print a line of JSON for each as soon as it is done.

python process_pool.py FOLDER [--workers N]
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import sparsespec
from sparsespec.batch import InputsError, find_inputs
from sparsespec.formats import instance_annotations
from sparsespec.images import read_image

segmenter: sparsespec.Segmenter


def start(given: sparsespec.Segmenter) -> None:
    """Keep the segmenter of this worker: it opens the model with its first photograph, and never again."""
    global segmenter
    segmenter = given


def instances_of(path: Path) -> dict[str, Any]:
    # What is returned is pickled: masks as run-length encodings have kilobytes where label images have megabytes.
    try:
        result = segmenter(read_image(path))
        return {"path": str(path), "instances": instance_annotations(result.labels, result.scores)}
    except Exception as error:  # one bad photograph costs its own line, not the others'
        return {"path": str(path), "error": f"{type(error).__name__}: {error}"}


def streamed(
    pool: Executor, function: Callable[[Path], Any], items: Iterable[Path], *, ahead: int
) -> Iterator[dict[str, Any]]:
    """Give results as they come, with no more than `ahead` of them on their way, however many items there are."""
    pending: set[Future[Any]] = set()
    for item in items:
        pending.add(pool.submit(function, item))
        if len(pending) >= ahead:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in wait(pending).done)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", nargs="?", default="docs/examples")
    parser.add_argument("--workers", type=int, help="the default is one for each processor")
    args = parser.parse_args(arguments)
    try:
        inputs = find_inputs(args.photographs)
    except InputsError as error:
        parser.error(str(error))

    whole = sparsespec.Segmenter()
    granted = whole.backbone.threads  # processors that this process may use, which a container limits
    workers = args.workers or granted
    each = max(1, granted // workers)
    # Read by the libraries when a worker starts; otherwise every worker would start threads for all processors.
    os.environ["NUMBA_NUM_THREADS"] = str(each)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # Spawned, not forked: a forked process has the parent's threads in name only.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start, initargs=(whole.with_threads(each),)) as pool:
        paths = (Path(inputs.root, name) for name in inputs.images)
        for answer in streamed(pool, instances_of, paths, ahead=4 * workers):
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
