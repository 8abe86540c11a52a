"""What the parts of the benchmark share: sizes, features, processes and limits."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsespec._threads import available_cpus
from sparsespec.evaluation.benchmark import data, machine, peers
from sparsespec.evaluation.benchmark.measure import ENOUGH, Contender, Outcome, Workers
from sparsespec.evaluation.benchmark.report import Section

__all__ = ["PARTS", "Bench", "Options", "run"]

PARTS = ("kernels", "solver", "image", "backbone")


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes
    ----------
    quick
        Small sizes and few repeats: to see that everything works, not for figures.
    tokens
        Sizes in the place of the usual ones; () for those.
    images
        Folder of photographs; None for those of scikit-image's wheel.
    large
        Photograph of many megapixels; None for a mosaic.
    megapixels
        Sizes of the pictures whose memory is measured; () for the usual ones.
    repeats
        Runs of each contender, of which the fastest counts; None for five, two if quick.
    limit
        Seconds that one run of a contender may take; None for 60, 20 if quick.
    threads
        Of every contender; None for the processors granted to this process.
    cache
        Folder in which features are kept for the next run; None for a temporary one.
    photographs, sizes
        Of the part "soak": so many pictures, of so many sizes; None for 2,000 of 300. Of the part "runs": so many tiny
        images; None for 100,000. Of the part "report": so many images; None for 5,000.
    names
        Of the part "runs": so many images that are only named; None for 200,000.
    seconds
        Of the part "server"; None for ten minutes, one if quick.
    model
        Network of the parts "backbone" and "gpu": a name of the registry or a file; None for the default model.
    """

    quick: bool = False
    tokens: tuple[int, ...] = ()
    images: Path | None = None
    large: Path | None = None
    megapixels: tuple[float, ...] = ()
    repeats: int | None = None
    limit: float | None = None
    threads: int | None = None
    cache: Path | None = None
    photographs: int | None = None
    sizes: int | None = None
    names: int | None = None
    seconds: float | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if any(tokens < 64 for tokens in self.tokens):
            raise ValueError(f"tokens must be numbers of at least 64, not {', '.join(map(str, self.tokens))}")
        if any(not size > 0 for size in self.megapixels):
            raise ValueError(f"megapixels must be above 0, not {', '.join(map(str, self.megapixels))}")
        for name in ("repeats", "limit", "threads", "photographs", "sizes", "names", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")


class Bench:
    """One run of the benchmark.

    Parameters
    ----------
    options
        How to measure.
    folder
        Temporary files.
    say
        Called with a line about what is done now.
    """

    channels = data.CHANNELS

    def __init__(self, options: Options, folder: Path, say: Callable[[str], None]) -> None:
        self.options = options
        self.folder = folder
        self.say = say
        self.quick = options.quick
        self.repeats = options.repeats or (2 if options.quick else 5)
        self.limit = options.limit or (20.0 if options.quick else 60.0)
        self.threads = options.threads or available_cpus()
        self.photos = data.photographs(options.images)
        # Now, not when its turn comes: what can't be read is said at once.
        self.large = None if options.large is None else data.read_photograph(options.large)
        self._workers = Workers(self.threads)
        cache = options.cache or folder
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise data.InputError(f"the folder {cache} can't be made: {error.strerror}") from error
        self._mosaic = data.FeatureMosaic(list(self.photos.values()), cache)

    def close(self) -> None:
        """End all processes."""
        self._workers.close()

    def sizes(self, quick: Sequence[int], full: Sequence[int]) -> list[int]:
        """Numbers of tokens to measure at, ascending."""
        return sorted(set(self.options.tokens)) or list(quick if self.quick else full)

    def features(self, grid: tuple[int, int]) -> str:
        """File of the features of a grid of tokens."""
        return self._mosaic.save(grid, self.folder)

    def unless_missing(self, peer: str) -> Outcome | None:
        """Return None if the peer is installed, else what to say of it."""
        reason = peers.missing(peer)
        return None if reason is None else Outcome("missing", remark=reason)

    def race(
        self,
        contenders: Mapping[str, Contender],
        *,
        fresh: Sequence[str] = (),
        repeats: int | None = None,
        limit: float | None = None,
        environment: Mapping[str, str] | None = None,
        enough: float = ENOUGH,
    ) -> dict[str, Outcome]:
        """Run contenders in turns, see :meth:`Workers.race`."""
        return self._workers.race(
            contenders,
            repeats=repeats or self.repeats,
            limit=limit or self.limit,
            fresh=fresh,
            environment=environment,
            enough=enough,
        )


def run(
    parts: Iterable[str] = PARTS,
    options: Options | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    command: str = "sparsespec bench",
) -> list[Section]:
    """Run parts of the benchmark.

    Parameters
    ----------
    parts
        Of "kernels", "solver", "image" and "backbone", and of "runs", "killing", "scheduler", "server", "soak",
        "report" and "gpu", which aren't run by default.
    options
        How to measure.
    say
        Called with a line whenever something else is measured.
    command
        What the sections say they were measured by.

    Returns
    -------
    list of Section
        One for each part, in their order.

    Raises
    ------
    ValueError
        An unknown part.
    InputError
        No photographs where the options look for them, or one that can't be read; or no such model.
    """
    from sparsespec.evaluation.benchmark import (
        backbone,
        gpu,
        image,
        kernels,
        killing,
        report_page,
        runs,
        scheduler,
        server,
        soak,
        solver,
    )

    chosen = list(parts)
    known: dict[str, Callable[[Bench], Any]] = {
        "kernels": kernels.run,
        "solver": solver.run,
        "image": image.run,
        "backbone": backbone.run,
        "runs": runs.run,
        "killing": killing.run,
        "scheduler": scheduler.run,
        "server": server.run,
        "soak": soak.run,
        "report": report_page.run,
        "gpu": gpu.run,
    }
    for part in chosen:
        if part not in known:
            raise ValueError(f"parts must be of {', '.join(known)}, not {part!r}")
    options = options or Options()
    with tempfile.TemporaryDirectory(prefix="sparsespec-bench-") as folder:
        bench = Bench(options, Path(folder), say)
        with contextlib.closing(bench):
            about = machine.describe(bench.threads)
            return [Section(part, about, command, known[part](bench)) for part in chosen]
