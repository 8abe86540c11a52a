"""Fixed ranges for the inputs of a network's matrix products, for the precision ``int8-static``.

Where the 8-bit steps of an input are fixed beforehand, nothing has to be looked at while the network runs; in return a
few channels that reach far make the steps coarse for all others. So channels are evened out first: a channel of a
product's input is divided by a factor and its row of the matrix multiplied by it, which changes nothing in floating
point numbers. The division is done by the layer normalisation, or the values' columns, that the input comes from. The
factors are those of Xiao et al., SmoothQuant, ICML 2023, equation 4 with alpha = 0.5. The inputs of ``fc2`` come from
an activation function and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .graph import chosen_blocks, write_graph
from .vit import Array, Attention, Block, BuildError, Linear, Norm, Rest, Vit

__all__ = ["Extent", "balanced", "channel_extents"]

Extent = tuple[Array, Array]
"""Least and largest value of each channel, (C,) float32 each."""
_LEAST = 1e-6  # of the largest: channels that hardly speak must not get a factor beyond all bounds


def channel_extents(
    vit: Vit, feeds: Iterable[Mapping[str, npt.NDArray[np.float32]]], *, blocks: Sequence[int] = (-1,)
) -> dict[str, Extent]:
    """Run a network in float32 and note how far each channel of the inputs of its products reaches.

    Parameters
    ----------
    vit : Vit
        The network.
    feeds : iterable of dict
        ``image`` and ``positions`` as :func:`sparsespec.models.graph.write_graph` describes them, one for each picture.
    blocks : sequence of int
        As for ``write_graph``.

    Returns
    -------
    dict of str to Extent
        By the name of the layer, such as ``block.0.fc1``.

    Raises
    ------
    ImportError
        Without ONNX Runtime or the onnx package.
    BuildError
        When there is no picture, or the network gives something else than numbers.
    """
    import onnxruntime
    from onnx import helper

    model = write_graph(vit, blocks=blocks, name="calibration", source="calibration", source_sha256="0" * 64)
    graph = model.graph
    inputs = {
        node.input[1].removesuffix(".weight"): node.input[0]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1].endswith(".weight")
    }
    del graph.output[:]
    names = []
    for layer, tensor in inputs.items():
        for kind in ("ReduceMin", "ReduceMax"):
            names.append(f"{layer}.{kind}")
            graph.node.append(helper.make_node(kind, [tensor], [names[-1]], axes=[0, 1], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(names[-1], 1, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    del model, graph
    found: dict[str, Extent] = {}
    for feed in feeds:
        values = [np.asarray(value, np.float32) for value in session.run(names, dict(feed))]
        if not all(np.isfinite(value).all() for value in values):
            raise BuildError("the network gives something else than finite numbers for a picture to calibrate on")
        for layer, low, high in zip(inputs, values[::2], values[1::2], strict=True):
            before = found.get(layer, (low, high))
            found[layer] = np.minimum(before[0], low), np.maximum(before[1], high)
    if not found:
        raise BuildError("there is no picture to calibrate on")
    return found


def balanced(
    vit: Vit, extents: Mapping[str, Extent], *, blocks: Sequence[int] = (-1,)
) -> tuple[Vit, dict[str, tuple[float, float]]]:
    """Even the channels of the inputs of a network's products out, and return the ranges that the inputs then have.

    Parameters
    ----------
    vit : Vit
        The network.
    extents : mapping of str to Extent
        What :func:`channel_extents` found with the same blocks.
    blocks : sequence of int
        Blocks whose queries, keys and values come out: those stay as they are.

    Returns
    -------
    vit : Vit
        A network that computes the same.
    ranges : dict of str to (float, float)
        Least and largest value of the input of each layer, for :func:`sparsespec.models.graph.write_graph`.
    """
    wanted = chosen_blocks(blocks, len(vit.blocks))
    ranges: dict[str, tuple[float, float]] = {}

    def even_out(layer: str, *weights: Array) -> Array:
        factors = _factors(extents[layer], weights)
        low, high = (side / factors for side in extents[layer])
        ranges[layer] = float(low.min()), float(high.max())
        return factors

    made = list(vit.blocks)
    for index in range(wanted[-1] + 1):
        at, attention, rest = f"block.{index}", vit.blocks[index].attention, vit.blocks[index].rest
        parts = (attention.query, attention.key, attention.value)
        factors = even_out(f"{at}.qkv", *(part.weight for part in parts))
        query, key, value = (_rows_times(part, factors) for part in parts)
        if index < wanted[-1] and rest is not None:
            out, feed_forward = rest.out, rest.feed_forward
            if index in wanted:
                ranges[f"{at}.out"] = _whole(extents[f"{at}.out"])
            else:
                between = even_out(f"{at}.out", out.weight)
                value, out = Linear(value.weight / between, value.bias / between), _rows_times(out, between)
            inner = even_out(f"{at}.fc1", feed_forward.fc1.weight)
            ranges[f"{at}.fc2"] = _whole(extents[f"{at}.fc2"])
            feed_forward = replace(feed_forward, fc1=_rows_times(feed_forward.fc1, inner))
            rest = Rest(out, _divided(rest.norm, inner), feed_forward)
        made[index] = Block(Attention(_divided(attention.norm, factors), query, key, value), rest)
    return replace(vit, blocks=tuple(made)), ranges


def _factors(extent: Extent, weights: Sequence[Array]) -> Array:
    """Return what to divide each channel of an input by; the geometric mean is 1."""
    reach = np.maximum(np.abs(extent[0]), np.abs(extent[1])).astype(np.float64)
    rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0).astype(np.float64)
    if not reach.max() > 0 or not rows.max() > 0:
        return np.ones(len(reach), np.float32)
    logs = (np.log(np.maximum(side, _LEAST * side.max())) for side in (reach, rows))
    exponent = 0.5 * np.subtract(*logs)
    factors: Array = np.exp(exponent - exponent.mean()).astype(np.float32)
    return factors


def _whole(extent: Extent) -> tuple[float, float]:
    return float(extent[0].min()), float(extent[1].max())


def _rows_times(linear: Linear, factors: Array) -> Linear:
    return Linear(linear.weight * factors[:, None], linear.bias)


def _divided(norm: Norm, factors: Array) -> Norm:
    return Norm(norm.weight / factors, norm.bias / factors, norm.epsilon)
