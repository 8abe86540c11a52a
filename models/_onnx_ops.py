"""ONNX operators in NumPy, as far as they move, select or combine numbers without weights.

Two uses: the arithmetic on shapes that exporters leave in a graph is computed, and numbered entries are sent through a
chain of reshapes to see where each of them ends up. :func:`shape_of` says the shapes of what isn't computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Attributes = Mapping[str, Any]
_Rule = Callable[[Attributes, Sequence[Any]], Array]

# onnx.TensorProto.DataType; bfloat16 (16) is computed in float32.
_DTYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
    16: np.float32,
}
FLOAT_TYPES = frozenset({1, 10, 11, 16})
# Entries of an array made from a few numbers: no part of a vision transformer is larger, a broken file may ask for it.
_MOST = 2**26


def _ints(value: Any) -> list[int]:
    return [int(v) for v in np.asarray(value).reshape(-1)]


def _bounded(entries: float) -> None:
    if not 0 <= entries <= _MOST:
        raise ValueError(f"an array of {entries:.3g} entries")


def _argument(attributes: Attributes, inputs: Sequence[Any], place: int, name: str) -> list[int] | None:
    """What newer opsets take as an input and older ones as an attribute."""
    if len(inputs) > place and inputs[place] is not None:
        return _ints(inputs[place])
    return _ints(attributes[name]) if name in attributes else None


def _reshape(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    data, wanted = inputs[0], _argument(attributes, inputs, 1, "shape")
    if wanted is None:
        raise ValueError("Reshape without a shape")
    if not attributes.get("allowzero", 0):
        wanted = [data.shape[k] if n == 0 else n for k, n in enumerate(wanted)]
    return np.reshape(data, wanted)


def _transpose(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    return np.transpose(inputs[0], attributes.get("perm"))


def _squeeze(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    axes = _argument(attributes, inputs, 1, "axes")
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


def _unsqueeze(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    axes = _argument(attributes, inputs, 1, "axes")
    if axes is None:
        raise ValueError("Unsqueeze without axes")
    return np.expand_dims(inputs[0], tuple(axes))


def _flatten(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    axis = attributes.get("axis", 1)
    axis += inputs[0].ndim if axis < 0 else 0
    return np.reshape(inputs[0], (int(np.prod(inputs[0].shape[:axis])), -1))


def _slice(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    data = inputs[0]
    starts, ends = (_argument(attributes, inputs, k, n) for k, n in ((1, "starts"), (2, "ends")))
    if starts is None or ends is None:
        raise ValueError("Slice without bounds")
    axes = _argument(attributes, inputs, 3, "axes") or list(range(len(starts)))
    steps = _argument(attributes, inputs, 4, "steps") or [1] * len(starts)
    window = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = data.shape[axis]
        # An end far below zero means "through the first entry", which Python writes as None.
        window[axis] = slice(start, None if step < 0 and end < -size else end, step)
    return data[tuple(window)]


def _gather(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    data, axis = inputs[0], attributes.get("axis", 0)
    _bounded(data.size // max(1, data.shape[axis]) * np.size(inputs[1]))
    return np.take(data, np.asarray(inputs[1], np.int64), axis=axis)


def _concat(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    _bounded(sum(np.size(part) for part in inputs))
    return np.concatenate(list(inputs), axis=attributes.get("axis", 0))


def _expand(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(_ints(inputs[1])))
    _bounded(math.prod(shape))  # takes no memory itself, but all that reads it takes time
    return np.broadcast_to(inputs[0], shape)


def _pad(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    pads = _argument(attributes, inputs, 1, "pads")
    if pads is None or attributes.get("mode", "constant") != "constant":
        raise ValueError("Pad of a kind that isn't computed here")
    axes = _argument(attributes, inputs, 3, "axes") or list(range(inputs[0].ndim))
    widths = [(0, 0)] * inputs[0].ndim
    _bounded(sum(abs(p) for p in pads) * max(1, inputs[0].size))
    for k, axis in enumerate(axes):
        widths[axis] = (pads[k], pads[k + len(axes)])
    value = inputs[2] if len(inputs) > 2 and inputs[2] is not None else 0
    return np.pad(inputs[0], widths, constant_values=np.asarray(value).item())


def _scatter_nd(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    if attributes.get("reduction", "none") != "none":
        raise ValueError("ScatterND that adds")
    data, indices, updates = inputs
    out = np.array(data, np.result_type(data, updates))
    out[tuple(np.moveaxis(np.asarray(indices), -1, 0))] = updates
    return out


def _divide(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    a, b = np.asarray(inputs[0]), np.asarray(inputs[1])
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        # Integers are divided towards zero.
        return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)))
    return np.asarray(a / b)


def _modulo(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    return np.asarray((np.fmod if attributes.get("fmod", 0) else np.mod)(inputs[0], inputs[1]))


def _cast(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    if attributes.get("to") not in _DTYPES:
        raise ValueError(f"Cast to type {attributes.get('to')}")
    return np.asarray(inputs[0]).astype(_DTYPES[attributes["to"]])


def _shape(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    return np.array(np.shape(inputs[0])[attributes.get("start", 0) : attributes.get("end")], np.int64)


def _constant_of_shape(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    value = np.asarray(attributes.get("value", np.zeros(1, np.float32))).reshape(-1)
    _bounded(math.prod(_ints(inputs[0])))
    return np.full(_ints(inputs[0]), value[0])


def _tile(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    _bounded(math.prod(_ints(inputs[1])) * inputs[0].size)
    return np.tile(inputs[0], _ints(inputs[1]))


def _range(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    start, stop, step = (np.asarray(v).item() for v in inputs)
    _bounded(max(0.0, (stop - start) / step))
    return np.arange(start, stop, step, dtype=np.asarray(inputs[0]).dtype)


def _reduced(function: Callable[..., Any]) -> _Rule:
    def apply(attributes: Attributes, inputs: Sequence[Any]) -> Array:
        axes = _argument(attributes, inputs, 1, "axes")
        axis = None if axes is None else tuple(axes)
        return np.asarray(function(inputs[0], axis=axis, keepdims=bool(attributes.get("keepdims", 1))))

    return apply


def _numpy(function: Callable[..., Any]) -> _Rule:
    return lambda attributes, inputs: np.asarray(function(*inputs))


def _folded(function: Callable[..., Any]) -> _Rule:
    def apply(attributes: Attributes, inputs: Sequence[Any]) -> Array:
        out = np.asarray(inputs[0])
        for value in inputs[1:]:
            out = function(out, value)
        return out

    return apply


# Entries change their places and nothing else.
MOVES: dict[str, _Rule] = {
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Slice": _slice,
    "Gather": _gather,
    "Expand": _expand,
    "Identity": _numpy(np.asarray),
}
_MORE: dict[str, _Rule] = {
    "Concat": _concat,
    "Tile": _tile,
    "Pad": _pad,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": lambda attributes, inputs: np.array(np.size(inputs[0]), np.int64),
    "Cast": _cast,
    "CastLike": lambda attributes, inputs: np.asarray(inputs[0]).astype(np.asarray(inputs[1]).dtype),
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "ReduceProd": _reduced(np.prod),
    "ReduceSum": _reduced(np.sum),
    "ReduceMax": _reduced(np.max),
    "ReduceMin": _reduced(np.min),
}
_ELEMENTWISE: dict[str, _Rule] = {
    "Add": _numpy(np.add),
    "Sub": _numpy(np.subtract),
    "Mul": _numpy(np.multiply),
    "Div": _divide,
    "Mod": _modulo,
    "Pow": _numpy(np.power),
    "Neg": _numpy(np.negative),
    "Abs": _numpy(np.abs),
    "Sqrt": _numpy(np.sqrt),
    "Reciprocal": _numpy(np.reciprocal),
    "Exp": _numpy(np.exp),
    "Tanh": _numpy(np.tanh),
    "Floor": _numpy(np.floor),
    "Ceil": _numpy(np.ceil),
    "Round": _numpy(np.round),
    "Sign": _numpy(np.sign),
    "Max": _folded(np.maximum),
    "Min": _folded(np.minimum),
    "Equal": _numpy(np.equal),
    "Less": _numpy(np.less),
    "LessOrEqual": _numpy(np.less_equal),
    "Greater": _numpy(np.greater),
    "GreaterOrEqual": _numpy(np.greater_equal),
    "And": _numpy(np.logical_and),
    "Or": _numpy(np.logical_or),
    "Not": _numpy(np.logical_not),
    "Where": _numpy(np.where),
}
COMPUTED: dict[str, _Rule] = {**MOVES, **_MORE, **_ELEMENTWISE}
_SAME_SHAPE = frozenset(
    {"Cast", "CastLike", "Softmax", "LogSoftmax", "LayerNormalization", "Erf", "Sigmoid", "Relu", "LeakyRelu", "Elu"}
    | {"Selu", "HardSigmoid", "HardSwish", "Softplus", "Softsign", "Swish", "Mish", "Gelu", "FastGelu", "QuickGelu"}
    | {"Log", "Sin", "Cos", "Clip", "IsNaN", "IsInf", "BatchNormalization", "InstanceNormalization"}
    | {"RMSNormalization", "SimplifiedLayerNormalization", "ScatterND", "ScatterElements", "CumSum"}
)


def compute(op: str, attributes: Attributes, inputs: Sequence[Any], outputs: int) -> list[Array]:
    """Run one operator of :data:`COMPUTED`, or Split.

    Raises
    ------
    ValueError, TypeError, IndexError
        As NumPy does, when the inputs don't fit.
    """
    if op in _ELEMENTWISE:
        _bounded(math.prod(np.broadcast_shapes(*(np.shape(i) for i in inputs))))
    if op != "Split":
        return [COMPUTED[op](attributes, inputs)]
    axis = attributes.get("axis", 0)
    sizes = _argument(attributes, inputs, 1, "split")
    if sizes is None:
        each = -(-inputs[0].shape[axis] // outputs)
        sizes = [each] * (outputs - 1)
        sizes.append(inputs[0].shape[axis] - sum(sizes))
    if sum(sizes) != inputs[0].shape[axis] or len(sizes) != outputs:
        raise ValueError(f"a Split into {sizes} of an axis of {inputs[0].shape[axis]}")
    return list(np.split(inputs[0], np.cumsum(sizes)[:-1], axis=axis))


def shape_of(
    op: str, attributes: Attributes, shapes: Sequence[Shape | None], values: Sequence[Any], outputs: int
) -> list[Shape | None]:
    """Say the shapes of an operator's outputs; None where that isn't known.

    Parameters
    ----------
    op : str
        Its type.
    attributes : mapping
        Its attributes.
    shapes : sequence of tuple or None
        Of its inputs, None for one that was left out.
    values : sequence of array or None
        Of those inputs that are known numbers.
    outputs : int
        How many it has.

    Raises
    ------
    ValueError, TypeError, IndexError
        When the inputs don't fit together.
    """
    unknown: list[Shape | None] = [None] * outputs
    if not shapes:
        return unknown
    first = shapes[0]
    if op in _ELEMENTWISE:
        known = [s for s in shapes if s is not None]
        return [np.broadcast_shapes(*known)] if len(known) == len(shapes) else unknown
    if first is None:
        return unknown
    if op in _SAME_SHAPE:
        return [first, *unknown[1:]]
    if op in COMPUTED or op == "Split":
        data = len(shapes) if op == "Concat" else 1
        stand_ins = [np.broadcast_to(np.int8(0), s) for s in shapes[:data] if s is not None]
        if len(stand_ins) < data or any(
            s is not None and v is None for s, v in zip(shapes[data:], values[data:], strict=True)
        ):
            return unknown
        return [tuple(out.shape) for out in compute(op, attributes, [*stand_ins, *values[data:]], outputs)]
    if op in ("MatMul", "FusedMatMul") and shapes[1] is not None:
        return [_product_shape(attributes, first, shapes[1])]
    if op == "Gemm" and shapes[1] is not None:
        return [(first[1 if attributes.get("transA") else 0], shapes[1][0 if attributes.get("transB") else 1])]
    if op == "Conv" and shapes[1] is not None:
        return [_convolved_shape(attributes, first, shapes[1])]
    if op.startswith("Reduce"):
        axes = _ints(values[1]) if len(values) > 1 and values[1] is not None else attributes.get("axes")
        rank = len(first)
        chosen = range(rank) if axes is None else [int(axis) for axis in axes]
        if not all(-rank <= axis < rank for axis in chosen):
            raise ValueError(f"{op} over the axes {list(chosen)} of an array of {rank}")
        reduced = {axis % rank for axis in chosen}
        keep = attributes.get("keepdims", 1)
        return [tuple(1 if axis in reduced else n for axis, n in enumerate(first) if keep or axis not in reduced)]
    if op in ("Resize", "Upsample"):
        if len(values) > 3 and values[3] is not None:
            return [tuple(_ints(values[3]))] if np.size(values[3]) == len(first) else unknown
        scales = values[2] if len(values) > 2 else values[-1]
        if scales is None or np.size(scales) != len(first):
            return unknown
        # In single precision, as ONNX Runtime does: (16 / 37) * 37 must stay 16.
        return [tuple(int(np.float32(n) * np.float32(s)) for n, s in zip(first, scales, strict=True))]
    if op in ("Attention", "MultiHeadAttention"):
        return [first, *unknown[1:]]
    return unknown


def _product_shape(attributes: Attributes, a: Shape, b: Shape) -> Shape:
    if attributes.get("transA"):
        a = (*a[:-2], a[-1], a[-2])
    if attributes.get("transB"):
        b = (*b[:-2], b[-1], b[-2])
    if a[-1] != b[max(0, len(b) - 2)]:
        raise ValueError(f"a product of {a} and {b}")
    columns = (b[-1],) if len(b) > 1 else ()
    rows = (a[-2],) if len(a) > 1 else ()
    return (*np.broadcast_shapes(a[:-2], b[:-2]), *rows, *columns)


def _convolved_shape(attributes: Attributes, data: Shape, weight: Shape) -> Shape:
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError("a convolution that pads by itself")
    axes = len(data) - 2
    kernel = weight[2:]
    strides, dilations = (attributes.get(name, [1] * axes) for name in ("strides", "dilations"))
    pads = attributes.get("pads", [0] * 2 * axes)
    spatial = [
        (data[2 + k] + pads[k] + pads[k + axes] - dilations[k] * (kernel[k] - 1) - 1) // strides[k] + 1
        for k in range(axes)
    ]
    return (data[0], weight[0], *spatial)
