"""Read the weights of a vision transformer out of an ONNX export, whoever made it.

The parts are recognised by what they compute, never by their names: the convolution that cuts the image into patches,
the tokens that enter the first block, then block after block along the sum that runs through all of them. What comes
behind the last block, such as a decoder or a classifier, is left alone. Weights only are read, so that an export that
runs at one size does as well as one that runs at any.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsespec.position_table import PositionRule, resize_positions

from ._external import load_external
from ._onnx_graph import Graph, Node, NoMatchError
from ._onnx_ops import Array
from ._onnx_package import require_onnx
from ._onnx_parts import ATTENTION_OPS, AttentionMatch, Tap, attention, linear, norm, rest
from .metadata import PREFIX
from .vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Attention,
    Block,
    BuildError,
    Linear,
    UnrecognisedModelError,
    Vit,
    float32,
)

_EXPORT_ANEW = (
    "Export the model anew in float32 with torch.onnx.export or 'optimum-cli export onnx', "
    "or give the weights themselves (.safetensors)"
)
_QUANTISED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger"}
    | {"QLinearConv", "com.microsoft.MatMulNBits", "com.microsoft.QAttention", "com.microsoft.DynamicQuantizeMatMul"}
    | {"com.microsoft.MatMulIntegerToFloat", "com.microsoft.QGemm", "com.microsoft.MatMulBnb4"}
)
# Grids in patches at which an export is tried that doesn't say its size.
_GRIDS = (16, 14, 28, 37)


@dataclass(frozen=True, eq=False)
class Export:
    """A vision transformer read from an export, with what is needed to look at its own queries, keys and values.

    Attributes
    ----------
    vit : Vit
        The weights.
    rule : PositionRule or None
        How the graph itself resizes its position table; None when it doesn't.
    model : onnx.ModelProto
        The export.
    image : str
        Name of its input.
    size : (int, int)
        Height and width in pixels at which it was followed.
    channels_last : bool
        Whether the input is (batch, height, width, 3).
    pixel_scale, pixel_shift : (3,) float64
        What the graph does to its input in front of the patches: ``scale * input + shift``.
    taps : tuple of (Tap, Tap, Tap)
        Where to find queries, keys and values of every block.
    half : bool
        Whether the graph computes in half precision: then what it gives is only that exact, even if the weights are.
    """

    vit: Vit
    rule: PositionRule | None
    model: Any
    image: str
    size: tuple[int, int]
    channels_last: bool
    pixel_scale: Array
    pixel_shift: Array
    taps: tuple[tuple[Tap, Tap, Tap], ...]
    half: bool = False


def load_export(path: str | os.PathLike[str]) -> Any:
    """Load an ONNX file with all its weights.

    Parameters
    ----------
    path : path
        The file; weights kept in files beside it are fetched.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    BuildError
        When it is cut short or no ONNX file, or a file of weights is missing, cut short or not one of its folder.
    OSError
        When it can't be opened.
    ImportError
        Without the onnx package.
    """
    onnx = require_onnx()
    content = Path(path).read_bytes()
    where = repr(os.fspath(path))
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:
        # The decoder's own exception class depends on the version of protobuf.
        raise BuildError(f"{where} isn't an ONNX file, or it is cut short ({len(content):,} bytes): {error}") from None
    if not model.graph.node:
        raise BuildError(f"{where} isn't an ONNX file, or it is cut short: it holds no graph ({len(content):,} bytes)")
    del content  # another copy of every weight
    load_external(model, path)
    return model


def read_export(model: Any, *, rule: PositionRule | None = None) -> Export:
    """Recognise the vision transformer in an ONNX model and take its weights.

    Parameters
    ----------
    model : onnx.ModelProto
        The export, with its weights in it.
    rule : PositionRule or None
        How the position table is brought to other grids. None: as the graph does it, or, where it was exported for one
        size, ``PositionRule()``.

    Returns
    -------
    Export

    Raises
    ------
    UnrecognisedModelError
        When a part wasn't found; the message says which one and what was expected.
    ImportError
        Without the onnx package.
    """
    onnx = require_onnx()
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _refuse_known(model)
    failure: UnrecognisedModelError | None = None
    for sizes in _sizes(model):
        try:
            # A damaged file may hold infinities: they match nothing, and that is said once and for all.
            with np.errstate(all="ignore"):
                return _read(model, Graph(model, sizes), rule)
        except UnrecognisedModelError as error:
            failure = failure or error
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            # A graph that breaks ONNX's own rules, such as an axis that is no number.
            failure = failure or _unrecognised("the graph", f"it isn't a valid one ({error})")
    if failure is None:
        raise _unrecognised("an image", "expected an input of the shape (batch, 3, height, width)", "found none")
    raise failure


def _unrecognised(part: str, expected: str, found: str = "", advice: str = _EXPORT_ANEW) -> UnrecognisedModelError:
    text = ", ".join(filter(None, (expected, found)))
    part = part[0].upper() + part[1:]
    return UnrecognisedModelError(f"this ONNX file isn't a vision transformer as known here. {part}: {text}. {advice}")


def _refuse_known(model: Any) -> None:
    """Say of a file that is something else what it is."""
    if any(entry.key == f"{PREFIX}format" for entry in model.metadata_props):
        raise UnrecognisedModelError(
            "this file was built by sparsespec already: use it as it is, or build from the export it was made of"
        )
    for node in model.graph.node:
        op = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        if op in _QUANTISED:
            raise UnrecognisedModelError(
                f"this file is already quantised (it holds {op}): use the float32 export of the same model, and choose "
                "the precision when building"
            )
        if op in ("If", "Loop", "Scan"):
            raise _unrecognised("the graph", f"expected no control flow, found {op} {node.name!r}")


# Size


def _sizes(model: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of the inputs at which to follow the graph, most likely first."""
    weights = {tensor.name for tensor in model.graph.initializer}
    fixed: dict[str, tuple[int, ...]] = {}
    images = []
    for value in model.graph.input:
        if value.name in weights or not value.type.HasField("tensor_type"):
            continue
        dims = [d.dim_value if d.HasField("dim_value") else 0 for d in value.type.tensor_type.shape.dim]
        if len(dims) == 4:
            images.append((value.name, dims))
        elif dims and all(dims):
            fixed[value.name] = tuple(dims)
    if not images:
        return
    if all(all(dims[1:]) for _, dims in images):
        yield {**fixed, **{name: (dims[0] or 1, *dims[1:]) for name, dims in images}}
        return
    for rows, columns in _pixel_sizes(model):
        sizes = dict(fixed)
        for name, (batch, first, height, last) in images:
            if last == 3 and first != 3:
                sizes[name] = (batch or 1, first or rows, height or columns, 3)
            else:
                sizes[name] = (batch or 1, first or 3, height or rows, last or columns)
        yield sizes


def _pixel_sizes(model: Any) -> list[tuple[int, int]]:
    """Heights and widths to try: those at which a table among the constants has one row per patch, then common ones."""
    strides = set()
    shapes = [tuple(t.dims) for t in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type == "Constant":
            shapes += [tuple(a.t.dims) for a in node.attribute if a.name == "value"]
        if node.op_type == "Conv":
            sides = {a.name: tuple(a.ints) for a in node.attribute}
            stride = sides.get("strides", ())
            if len(stride) == 2 and stride[0] > 1 and sides.get("kernel_shape", stride) == stride:
                strides.add(int(stride[0]))
    grids: list[int] = []
    for shape in shapes:
        if len(shape) in (3, 4) and shape[0] == 1:
            rows = math.prod(shape[1:-1])
            if len(shape) == 4 and shape[2] == shape[3]:
                rows = shape[2] * shape[3]
            # A table has a row for the class token in front of those for the patches, or none, or some for registers.
            grids += [math.isqrt(rows - k) for k in (1, 0, 5, 2, 3, 4, 6, 7, 8, 9) if rows > k and _is_square(rows - k)]
    likely = [g for g in dict.fromkeys(grids) if 1 < g <= 100]
    return [(g * p, g * p) for p in sorted(strides) or [16] for g in dict.fromkeys([*likely[:4], *_GRIDS])]


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


# Reading


def _read(model: Any, graph: Graph, rule: PositionRule | None) -> Export:
    patch, kernel, image, scale, shift = _patch_embedding(graph)
    after_patches = graph.depends(patch.outputs)
    matches, reasons = _attentions(graph, after_patches)
    first = _first_state(graph, matches, reasons)
    prefix, positions, own_rule = _tokens(graph, first, patch, trusted=rule is not None)
    chain = _blocks(graph, first, matches, reasons)

    heads = {match.heads for _, match in chain}
    if len(heads) != 1:
        raise _unrecognised("attention", "expected the same number of heads in every block", f"found {sorted(heads)}")
    widths = {len(match.attention.query.bias) for _, match in chain}
    if widths != {kernel.weight.shape[0]}:
        raise _unrecognised(
            "attention", f"expected queries of {kernel.weight.shape[0]} channels, as the tokens", f"found {widths}"
        )
    mean, std = _normalisation(scale, shift)
    vit = Vit(
        patch=kernel,
        prefix=prefix,
        positions=positions,
        rule=rule or own_rule or PositionRule(),
        heads=heads.pop(),
        blocks=tuple(block for block, _ in chain),
        mean=mean,
        std=std,
    )
    shape = graph.shape(image) or ()
    channels_last = shape[1] != 3
    size = (shape[1], shape[2]) if channels_last else (shape[2], shape[3])
    taps = tuple(_tap(graph, model, match) for _, match in chain)
    half = _computes_in_half(model, patch)
    return Export(vit, own_rule, model, image, size, channels_last, scale, shift, taps, half)


def _computes_in_half(model: Any, patch: Node) -> bool:
    """Whether the patch embedding takes its kernel in half precision, rather than widened by a Cast."""
    raw = next(node for node in model.graph.node if patch.outputs[0] in node.output)
    half = require_onnx().TensorProto.FLOAT16
    constants = {t.name: t.data_type for t in model.graph.initializer}
    constants |= {n.output[0]: a.t.data_type for n in model.graph.node for a in n.attribute if a.name == "value"}
    return constants.get(raw.input[1]) == half


def _tap(graph: Graph, model: Any, match: AttentionMatch) -> tuple[Tap, Tap, Tap]:
    """Look at what goes into a projection where the export keeps no tensor of what comes out."""
    names = {name for node in model.graph.node for name in node.output}
    q, k, v = (
        Tap(tap.tensor, None, tap.columns, tap.factor)
        if tap.tensor in names
        else Tap(match.normed, tap.layer, tap.columns, tap.factor)
        for tap in match.taps
    )
    return q, k, v


def _patch_embedding(graph: Graph) -> tuple[Node, Linear, str, Array, Array]:
    """Find the convolution that cuts the image into patches."""
    convolutions = [node for node in graph.nodes if node.op == "Conv"]
    found = []
    for node in convolutions:
        kernel = graph.shape(node.inputs[1]) if len(node.inputs) > 1 else None
        if kernel is None or len(kernel) != 4 or kernel[1] != 3 or kernel[2] != kernel[3]:
            continue
        plain = node.attributes.get("group", 1) == 1 and not any(node.attributes.get("pads", ()))
        if plain and tuple(node.attributes.get("strides", (1, 1))) == kernel[2:] and kernel[2] > 1:
            try:
                found.append((node, *_image_of(graph, node.inputs[0])))
            except NoMatchError:
                continue
    part = "the patch embedding"
    if len(found) != 1:
        raise _unrecognised(
            part,
            "expected one convolution whose stride is its kernel on the image input (3 channels, square patches)",
            f"found {len(found) or 'none'} like that among {len(convolutions)} convolutions",
        )
    node, image, scale, shift = found[0]
    try:
        weight = graph.value(node.inputs[1])
        bias = graph.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.zeros(1)
    except NoMatchError as error:
        raise _unrecognised(part, str(error)) from None
    shape = graph.shape(node.outputs[0])
    if weight is None or bias is None or bias.size not in (1, len(weight)):
        raise _unrecognised(part, f"expected constant weights of {node}")
    if shape is None or shape[0] != 1 or min(shape[2:]) < 1:
        advice = "Export it with a batch of one, or with dynamic axes"
        raise _unrecognised(part, "expected one image at a time", f"found the shape {shape} behind {node}", advice)
    full_bias = np.broadcast_to(bias.reshape(-1), (len(weight),))
    return node, Linear(float32(weight), float32(full_bias)), image, scale, shift


def _image_of(graph: Graph, tensor: str) -> tuple[str, Array, Array]:
    """Follow the input of the convolution back to the graph's own; what happens between is one factor and one shift."""
    pending, seen, sources = [graph.root(tensor)], set(), []
    while pending:
        name = pending.pop()
        if name in seen or not name or graph.is_constant(name):
            continue
        seen.add(name)
        node = graph.maker(name)
        if node is None:
            sources.append(name)
        else:
            pending += node.inputs
    if len(sources) != 1 or sources[0] not in graph.inputs:
        raise NoMatchError("not made of an image")
    image = sources[0]
    shape = graph.shape(image)
    if shape is None:
        raise NoMatchError("an image of unknown shape")
    if graph.root(tensor) == image:
        return image, np.ones(3), np.zeros(3)
    ramp = np.arange(math.prod(shape), dtype=np.float64).reshape(shape) / math.prod(shape)
    dark, bright, mixed = (
        np.asarray(graph.evaluate(tensor, {image: value}), np.float64)
        for value in (np.zeros(shape), np.ones(shape), ramp)
    )
    shift, scale = dark[0, :, 0, 0], (bright - dark)[0, :, 0, 0]
    expected = ramp if shape[1] == 3 else ramp.transpose(0, 3, 1, 2)
    if (
        mixed.shape != expected.shape
        or scale.shape != (3,)
        or not scale.all()
        or not np.allclose(
            mixed, expected * scale[:, None, None] + shift[:, None, None], atol=1e-4 * np.abs(scale).max()
        )
    ):
        raise NoMatchError("more than a normalisation of the image")
    return image, scale, shift


def _normalisation(scale: Array, shift: Array) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of RGB in [0, 1] that make ``scale * input + shift`` of the graph's own input."""
    if (scale == 1).all() and not shift.any():
        return IMAGENET_MEAN, IMAGENET_STD
    # A deviation above 2 can only be meant for pixels in [0, 255].
    full = 255.0 if (1 / np.abs(scale)).max() > 2 else 1.0
    mean, std = -shift / (scale * full), 1 / (scale * full)
    return (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))


def _attentions(graph: Graph, after: set[str]) -> tuple[dict[str, AttentionMatch], dict[str, str]]:
    """Match every attention behind the patches, by the state it starts from; of the others say why not, by output."""
    matches: dict[str, AttentionMatch] = {}
    reasons: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ATTENTION_OPS and any(name in after for name in node.inputs):
            try:
                match = attention(graph, node)
                matches.setdefault(match.source, match)
            except NoMatchError as error:
                reasons[node.outputs[0]] = str(error)
    return matches, reasons


def _first_state(graph: Graph, matches: Mapping[str, AttentionMatch], reasons: Mapping[str, str]) -> str:
    """Find the state that enters the first block: no attention stands in front of it."""
    if not matches:
        found = f"found {len(reasons)} of another kind" if reasons else "found none"
        reason = f"; of the first, {next(iter(reasons.values()))}" if reasons else ""
        raise _unrecognised(
            "the first block",
            "expected attention, Softmax(queries x keys) x values or an operator for it, of three linear layers behind "
            "a layer normalisation",
            f"{found}{reason}",
        )
    behind = graph.depends([m.output for m in matches.values()] + list(reasons))
    for state in matches:
        if not behind & {state}:
            return state
    reason = next(iter(reasons.values()), "its attention was not found")
    raise _unrecognised("the first block", reason)


def _tokens(graph: Graph, state: str, patch: Node, *, trusted: bool) -> tuple[Array, Array, PositionRule | None]:
    """Find the rows in front of the patches and the position table, between the convolution and the first block.

    What stands there moves and adds numbers, nothing else; so zeros and numbered patches, sent through it, say all.
    """
    part = "the tokens"
    shape, grid = graph.shape(state), graph.shape(patch.outputs[0])
    if shape is None or grid is None or len(shape) != 3 or shape[0] != 1:
        raise _unrecognised(
            part, "expected the shape (1, tokens, channels) in front of the first block", f"found {shape}"
        )
    channels, rows, columns = grid[1:]
    count = rows * columns
    if shape[2] != channels or shape[1] < count:
        raise _unrecognised(part, f"expected {rows} x {columns} patches of {channels} channels", f"found {shape[1:]}")
    resizes = _resizes(graph, state, patch)
    dark = {patch.outputs[0]: np.zeros(grid, np.float32)}
    for node in resizes:
        made = graph.shape(node.outputs[0])
        if made is None or len(made) != 4 or made[1:] != grid[1:]:
            raise _unrecognised(
                "the position table", f"expected it resized to {rows} x {columns} patches", f"found {made}"
            )
        dark[node.outputs[0]] = np.zeros(made, np.float32)
    numbers = np.broadcast_to(np.arange(1, count + 1, dtype=np.float32).reshape(1, 1, rows, columns), grid)
    try:
        constant = float32(graph.evaluate(state, dark)).reshape(shape[1:])
        for name in dark:
            order = graph.evaluate(state, {**dark, name: numbers}).reshape(shape[1:]) - constant.astype(np.float64)
            wanted = np.concatenate([np.zeros(shape[1] - count), np.arange(1, count + 1)])
            if not np.array_equal(np.rint(order), np.broadcast_to(wanted[:, None], shape[1:])):
                raise NoMatchError(
                    "the patches don't follow each other row by row behind the class token and registers"
                )
    except NoMatchError as error:
        reason = f"{error}, between the patch embedding and the first block"
        raise _unrecognised(
            part, "expected a class token, registers and positions put to the patches", f"found that {reason}"
        ) from None
    prefix, table = constant[: shape[1] - count], constant[shape[1] - count :]
    if not resizes:
        if count > 1 and (table == table[:1]).all():
            raise _unrecognised(
                "the position table",
                "expected one row per patch added between the patch embedding and the first block",
                "found none (rotary positions, as in DINOv3, aren't supported)",
            )
        return prefix, table.reshape(rows, columns, channels), None
    if len(resizes) > 1 or table.any():
        raise _unrecognised("the position table", "expected one", f"found {len(resizes)} that are resized, and others")
    return prefix, *_resized_table(graph, resizes[0], (rows, columns), trusted=trusted)


def _resizes(graph: Graph, state: str, patch: Node) -> list[Node]:
    """Nodes that resize something on the way to a state, without the image."""
    found: list[Node] = []
    pending, seen = [graph.root(state)], set(patch.outputs)
    while pending:
        name = pending.pop()
        node = graph.maker(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        if node.op in ("Resize", "Upsample"):
            found.append(node)
        else:
            pending += [n for n in node.inputs if n]
    return found


def _resized_table(
    graph: Graph, node: Node, grid: tuple[int, int], *, trusted: bool
) -> tuple[Array, PositionRule | None]:
    """Take the table that the graph resizes, and how it does it."""
    part = "the position table"
    try:
        table = graph.value(node.inputs[0])
    except NoMatchError as error:
        raise _unrecognised(part, str(error)) from None
    if table is None or table.ndim != 4 or table.shape[0] != 1:
        raise _unrecognised(part, f"expected a constant (1, channels, rows, columns) in front of {node}")
    positions = float32(table[0].transpose(1, 2, 0))
    mode = node.attributes.get("mode", "nearest")
    centres = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    antialias = bool(node.attributes.get("antialias", 0))
    coefficient = node.attributes.get("cubic_coeff_a", -0.75)
    usual = mode == "cubic" and centres in ("half_pixel", "pytorch_half_pixel") and (antialias or coefficient == -0.75)
    if not usual:
        if trusted:
            return positions, None
        raise _unrecognised(
            part,
            "expected bicubic interpolation with half-pixel centres and a = -0.75",
            f"found mode {mode!r}, {centres!r}, a = {coefficient}",
            "Say how it shall be resized (rule=...)",
        )
    offset = 0.0
    scales = graph.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if scales is not None and scales.size == 4:
        # DINO adds 0.1 to the grid before it divides by the size of the table.
        off = [float(s) * n - g for s, n, g in zip(scales[2:], positions.shape, grid, strict=False)]
        if max(abs(o) for o in off) > 1e-3 and abs(off[0] - off[1]) < 1e-2:
            offset = round(off[0], 2)
    return positions, PositionRule(offset, antialias)


def _blocks(
    graph: Graph, state: str, matches: Mapping[str, AttentionMatch], reasons: Mapping[str, str]
) -> list[tuple[Block, AttentionMatch]]:
    """Follow the state from block to block."""
    found: list[tuple[Block, AttentionMatch]] = []
    while True:
        part = f"block {len(found)}"
        match = matches.get(state)
        if match is None:
            if _goes_on(graph, state):
                reason = next((r for name, r in reasons.items() if name in graph.depends([state])), "")
                raise _unrecognised(
                    part,
                    "expected attention of three linear layers behind a layer normalisation",
                    reason or "found another branch added to the tokens",
                )
            cut = _cut_block(graph, state, found[-1][1]) if found else None
            return found if cut is None else [*found, (Block(cut.attention, None), cut)]
        try:
            following, after = rest(graph, match)
        except NoMatchError as error:
            later = graph.depends([match.output])
            if any(m.source in later for m in matches.values()) or any(name in later for name in reasons):
                raise _unrecognised(part, str(error)) from None
            if found and not _goes_on(graph, state) and _used(graph, match.output):
                # Attention of a decoder, on the normalised tokens.
                return found
            found.append((Block(match.attention, None), match))
            return found
        found.append((Block(match.attention, following), match))
        state = after


def _goes_on(graph: Graph, state: str) -> bool:
    """Whether something made of a state is added to it: then another block follows."""
    after = graph.depends([node.outputs[0] for node in graph.takers(state) if node.op != "Add"])
    return any(
        node.op == "Add" and any(graph.rows(name) != state and name in after for name in node.inputs)
        for node in graph.takers(state)
    )


def _used(graph: Graph, tensor: str) -> bool:
    """Whether a tensor feeds anything but an output of the graph."""
    return bool(graph.takers(tensor))


def _cut_block(graph: Graph, state: str, before: AttentionMatch) -> AttentionMatch | None:
    """Find the queries, keys and values of a last block that was cut right behind them."""
    layers = []
    for node in graph.nodes:
        if node.op not in ("MatMul", "Gemm", "FusedMatMul"):
            continue
        name = node.outputs[0]
        for taker in graph.takers(name):
            if taker.op == "Add" and graph.split_constant(taker) is not None:
                name = taker.outputs[0]
        try:
            layer = linear(graph, name)
            found_norm, source = norm(graph, layer.source)
        except NoMatchError:
            continue
        if source == state:
            layers.append((layer, found_norm))
    width = len(before.attention.query.bias)
    tokens = graph.shape(state)
    sizes = [len(layer.linear.bias) for layer, _ in layers]
    whole = all(graph.shape(layer.source) == tokens for layer, _ in layers)
    if not whole or sizes not in ([3 * width], [width] * 3) or len({layer.source for layer, _ in layers}) != 1:
        return None
    parts, taps = [], []
    if len(layers) == 1:
        layer = layers[0][0]
        for k in range(3):
            columns = np.arange(k * width, (k + 1) * width)
            parts.append(Linear(np.ascontiguousarray(layer.linear.weight[:, columns]), layer.linear.bias[columns]))
            taps.append(Tap(layer.output, layer.linear, columns, 1.0))
    else:
        places = {graph.rows(name): k for k, name in reversed(list(enumerate(graph.outputs)))}
        ordered = sorted((layer for layer, _ in layers), key=lambda layer: places.get(layer.output, len(places)))
        for layer in ordered:
            parts.append(layer.linear)
            taps.append(Tap(layer.output, layer.linear, np.arange(width), 1.0))
    q, k_, v = taps
    found_attention = Attention(layers[0][1], *parts)
    return AttentionMatch(found_attention, before.heads, state, layers[0][0].source, "", (q, k_, v))


# Checking


def compare_with_export(export: Export, ours: Any, *, blocks: Sequence[int] = (-1,)) -> float:
    """Run the export and a graph built from it on the same made-up picture.

    Parameters
    ----------
    export : Export
        As :func:`read_export` returned it.
    ours : onnx.ModelProto
        The uniform graph, in float32.
    blocks : sequence of int
        The blocks it gives, in the order in which it was built.

    Returns
    -------
    float
        Largest difference of queries, keys and values, each relative to the largest entry of the original's. A picture
        that isn't square is used if the export runs at that size, otherwise one of the size it was exported for.

    Raises
    ------
    BuildError
        When the export runs at no size.
    """
    vit = export.vit
    numbers = [block % len(vit.blocks) for block in blocks]
    size = vit.patch_size
    native = (export.size[0] // size, export.size[1] // size)
    # The text of an error only: the error itself would keep the session, and so a copy of every weight, alive.
    failure, session, session_is_free = "", None, False
    for grid, free in (((9, 13), True), (native, True), (native, False)):
        image = np.random.default_rng(0).normal(size=(1, 3, grid[0] * size, grid[1] * size)).astype(np.float32)
        try:
            if session is None or session_is_free != free:
                session = None  # before there is another
                session, session_is_free = _tapped_session(export, numbers, free=free), free
            expected = _run_export(export, session, image, numbers)
        except Exception as error:
            # ONNX Runtime has no common class for what it raises; most exports run at one size only.
            failure = str(error)
            continue
        session = None
        # The table as the export resizes it, even if another rule was asked for.
        rule = export.rule or vit.rule
        table = resize_positions(vit.positions, grid, rule=rule).reshape(-1, vit.embed_dim)
        positions = np.concatenate([vit.prefix, table])[None].astype(np.float32)
        names = [
            name if number == numbers[-1] else f"{name}.{number}"
            for number in numbers
            for name in ("queries", "keys", "values")
        ]
        found = _session(ours).run(names, {"image": image, "positions": positions})
        return max(
            float(np.abs(e - f[0]).max() / max(np.abs(e).max(), np.finfo(np.float32).tiny))
            for e, f in zip(expected, found, strict=True)
        )
    raise BuildError(f"the export can't be run, not even at {export.size[0]} x {export.size[1]} pixels: {failure}")


def _taps(export: Export, numbers: Sequence[int]) -> list[Tap]:
    return [tap for number in numbers for tap in export.taps[number]]


def _tapped_session(export: Export, numbers: Sequence[int], *, free: bool) -> Any:
    """Make the export give what is tapped; ``free``: at any size, as many do that declare only one."""
    graph = export.model.graph
    # Changed for as long as it is read, and not copied: most of it is weights.
    kept = [[copy.deepcopy(value) for value in values] for values in (graph.input, graph.output)]
    try:
        del graph.output[:]
        for name in dict.fromkeys(tap.tensor for tap in _taps(export, numbers)):
            graph.output.add(name=name)
        if free:
            value = next(v for v in graph.input if v.name == export.image)
            for axis in (1, 2) if export.channels_last else (2, 3):
                value.type.tensor_type.shape.dim[axis].dim_param = f"size_{axis}"
        return _session(export.model)
    finally:
        for values, before in zip((graph.input, graph.output), kept, strict=True):
            del values[:]
            values.extend(before)


def _run_export(export: Export, session: Any, image: Array, numbers: Sequence[int]) -> list[Array]:
    """Queries, keys and values (patches, D) of some blocks of the export, for a normalised (1, 3, H, W) image."""
    pixels = (image.astype(np.float64) - export.pixel_shift[:, None, None]) / export.pixel_scale[:, None, None]
    if export.channels_last:
        pixels = pixels.transpose(0, 2, 3, 1)
    value = next(v for v in export.model.graph.input if v.name == export.image)
    kind = require_onnx().helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    taps = _taps(export, numbers)
    names = list(dict.fromkeys(tap.tensor for tap in taps))
    values = dict(zip(names, session.run(names, {export.image: pixels.astype(kind)}), strict=True))
    patches = image.shape[2] // export.vit.patch_size * (image.shape[3] // export.vit.patch_size)
    out = []
    for tap in taps:
        found = values[tap.tensor].astype(np.float32)
        found = found.reshape(-1, found.shape[-1])
        if len(found) != len(export.vit.prefix) + patches:
            raise BuildError(f"{len(found)} tokens for {patches} patches")
        if tap.layer is not None:
            found = found @ tap.layer.weight + tap.layer.bias
        out.append(found[len(export.vit.prefix) :, tap.columns] * np.float32(tap.factor))
    return out


def _session(model: Any) -> Any:
    import onnxruntime

    from sparsespec._threads import available_cpus

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = available_cpus(), 1
    options.log_severity_level = 4
    # It runs once: weights in another order for speed would only be another copy.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
