"""Look-ups in an ONNX graph followed at one size of its input: who makes a tensor, of what shape, from which constants.

The many spellings of one thing that exporters know are brought together here, so that what reads the graph sees fewer
of them: casts between float types, identities and reshapes that change nothing vanish, arithmetic on shapes is done,
operators that stand for several are taken apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ._onnx_ops import COMPUTED, FLOAT_TYPES, MOVES, Array, Shape, compute, shape_of
from ._onnx_package import require_onnx

# Constants up to this many entries are computed as they are met, larger ones when asked for.
_SMALL = 4096
_WRONG = (ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError, MemoryError)


class NoMatchError(Exception):
    """What was looked for isn't there; the text says what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class Node:
    """One operator. ``op`` carries its domain in front unless that is ONNX's own; an input left out is ""."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}" if self.name else f"{self.op} that makes {self.outputs[0]!r}"


class Graph:
    """An ONNX graph followed from its inputs to its outputs.

    Parameters
    ----------
    model : onnx.ModelProto
        The model, with its weights inside.
    sizes : mapping of str to tuple of int
        Shapes of the graph's inputs; one that isn't named has an unknown shape.

    Attributes
    ----------
    nodes : list of Node
        Those that compute with data, in their order.
    inputs, outputs : list of str
        Names of the graph's own.
    trouble : list of str
        Where the shapes didn't fit together.
    """

    def __init__(self, model: Any, sizes: Mapping[str, Shape]) -> None:
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._alias: dict[str, str] = {}
        self._value: dict[str, Array] = {}
        self._later: dict[str, Node] = {}
        self._shape: dict[str, Shape] = {name: tuple(t.dims) for name, t in self._weights.items()}
        self._rows: dict[str, str] = {}
        self._maker: dict[str, Node] = {}
        self._takers: dict[str, list[Node]] = {}
        self.nodes: list[Node] = []
        self.trouble: list[str] = []
        self.inputs = [i.name for i in model.graph.input if i.name not in self._weights]
        self._shape.update({name: tuple(shape) for name, shape in sizes.items()})
        self._made = {*self._weights, *self.inputs}
        for raw in canonical_nodes(model):
            # A tensor made twice or taken before it is made breaks the rules of ONNX; so cut, no walk goes in circles.
            if not self._made.intersection(raw.outputs):
                known = (name if name in self._made or not name else f"{name} (missing)" for name in raw.inputs)
                self._follow(replace(raw, inputs=tuple(self.root(name) for name in known)))
                self._made.update(name for name in raw.outputs if name)
        self.outputs = [self.root(o.name) for o in model.graph.output]

    # Look-ups

    def root(self, tensor: str) -> str:
        """Return the first name of a tensor, before identities, casts and reshapes that change nothing."""
        return self._alias.get(tensor, tensor)

    def rows(self, tensor: str) -> str:
        """Return the first name of a tensor, before reshapes that keep its last axis and the order of its rows."""
        tensor = self.root(tensor)
        return self._rows.get(tensor, tensor)

    def shape(self, tensor: str) -> Shape | None:
        """Shape of a tensor, None when it isn't known."""
        return self._shape.get(self.root(tensor))

    def maker(self, tensor: str) -> Node | None:
        """Return the node that computes a tensor from data; None for inputs and constants."""
        return self._maker.get(self.root(tensor))

    def takers(self, tensor: str) -> list[Node]:
        """Return the nodes that take a tensor, or a reshape of it that keeps its rows."""
        return self._takers.get(self.rows(tensor), [])

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is known without the image."""
        tensor = self.root(tensor)
        return tensor in self._value or tensor in self._weights or tensor in self._later

    def value(self, tensor: str) -> Array | None:
        """Value of a constant, None when the tensor isn't one."""
        tensor = self.root(tensor)
        if tensor in self._value:
            return self._value[tensor]
        if tensor in self._weights:
            value = array_of(self._weights[tensor])
        elif tensor in self._later:
            node = self._later[tensor]
            try:
                value = self._compute(node)[node.outputs.index(tensor)]
            except _WRONG as error:
                raise NoMatchError(f"the constant made by {node} can't be computed: {error}") from None
        else:
            return None
        if value.size <= _SMALL:
            self._value[tensor] = value
        return value

    def scalar(self, tensor: str) -> float | None:
        """Value of a constant of one entry, None for anything else."""
        shape = self.shape(tensor)
        if not self.is_constant(tensor) or (shape is not None and int(np.prod(shape)) != 1):
            return None
        value = self.value(tensor)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def split_constant(self, node: Node) -> tuple[str, str] | None:
        """Return the data operand and the constant operand of a node with one of each, in any order."""
        if len(node.inputs) != 2:
            return None
        constant = [self.is_constant(name) for name in node.inputs]
        if constant[0] == constant[1]:
            return None
        return (node.inputs[1], node.inputs[0]) if constant[0] else (node.inputs[0], node.inputs[1])

    def evaluate(self, target: str, given: Mapping[str, Array], *, skip_scale: bool = False) -> Array:
        """Compute a tensor from others, as far as the operators between them only move and combine entries.

        Parameters
        ----------
        target : str
            The tensor wanted.
        given : mapping of str to array
            What to put in for other tensors.
        skip_scale : bool
            Pass by products with, and divisions by, one number.

        Raises
        ------
        NoMatchError
            When an operator on the way does something else.
        """
        values = {self.root(name): value for name, value in given.items()}
        pending = [self.root(target)]
        while pending:
            name = pending[-1]
            if name in values:
                pending.pop()
                continue
            if self.is_constant(name):
                value = self.value(name)
                assert value is not None
                values[name] = value
                continue
            node = self._maker.get(name)
            if node is None:
                raise NoMatchError(f"{name!r} is made of nothing that is known")
            data = self.split_constant(node) if skip_scale and node.op in ("Mul", "Div") else None
            if data is not None and self.scalar(data[1]) is not None:
                if data[0] in values:
                    values[name] = values[data[0]]
                else:
                    pending.append(data[0])
                continue
            if node.op not in COMPUTED and node.op != "Split":
                raise NoMatchError(f"{node} is in the way")
            missing = [n for n in node.inputs if n and n not in values]
            if missing:
                pending += missing
                continue
            try:
                arguments = [values[n] if n else None for n in node.inputs]
                found = compute(node.op, node.attributes, arguments, len(node.outputs))
            except _WRONG as error:
                raise NoMatchError(f"{node} can't be computed: {error}") from None
            values.update(zip(node.outputs, found, strict=False))
        return values[self.root(target)]

    def depends(self, sources: Iterable[str]) -> set[str]:
        """All tensors computed from some of these, themselves included."""
        found = {self.root(name) for name in sources}
        for node in self.nodes:
            if any(name in found for name in node.inputs):
                found.update(node.outputs)
        return found

    # Following the graph

    def _follow(self, node: Node) -> None:
        out = node.outputs[0]
        if node.op == "Constant":
            self._value[out] = np.asarray(node.attributes["value"])
            self._shape[out] = self._value[out].shape
            return
        if node.op in ("Identity", "Dropout") and node.inputs:
            self._alias[out] = node.inputs[0]
            return
        known = [name == "" or self.is_constant(name) for name in node.inputs]
        computable = node.op in COMPUTED or node.op == "Split"
        if computable and all(known) and self._fold(node):
            return
        first = self._shape.get(node.inputs[0]) if node.inputs else None
        if node.op in ("Shape", "Size") and first is not None:
            stand_in = np.broadcast_to(np.int8(0), first)
            self._keep(out, compute(node.op, node.attributes, [stand_in], 1)[0])
            return
        if node.op == "Cast" and node.attributes.get("to") in FLOAT_TYPES and node.inputs:
            self._alias[out] = node.inputs[0]
            return
        if node.op == "Where" and self._guards_against_nan(node):
            # Attention with every score masked out would give 0 / 0; without a mask there is no such row.
            self._alias[out] = node.inputs[2]
            return
        self._measure(node)
        shape = self._shape.get(out)
        if node.op in MOVES and shape is not None and first is not None:
            if shape == first and node.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand"):
                self._alias[out] = node.inputs[0]
                return
            if _keeps_rows(node, first, shape):
                self._rows[out] = self.rows(node.inputs[0])
        self.nodes.append(node)
        for name in node.outputs:
            if name:
                self._maker[name] = node
        for name in set(node.inputs):
            self._takers.setdefault(self.rows(name), []).append(node)

    def _keep(self, name: str, value: Array) -> None:
        self._value[name] = value
        self._shape[name] = np.shape(value)

    def _fold(self, node: Node) -> bool:
        """Compute a node of constants, or leave it for when it is asked for."""
        sizes = [int(np.prod(self._shape.get(name, (_SMALL + 1,)))) for name in node.inputs if name]
        if sum(sizes) <= _SMALL:
            try:
                found = self._compute(node)
            except (*_WRONG, NoMatchError) as error:
                self.trouble.append(f"{node}: {error}")
                return False
            for name, value in zip(node.outputs, found, strict=False):
                self._keep(name, value)
            return True
        self._measure(node)
        self._later.update(dict.fromkeys(node.outputs, node))
        return True

    def _compute(self, node: Node) -> list[Array]:
        arguments = [self.value(name) if name else None for name in node.inputs]
        return compute(node.op, node.attributes, arguments, len(node.outputs))

    def _measure(self, node: Node) -> None:
        """Work out the shapes of what a node makes."""
        shapes = [self._shape.get(name) if name else None for name in node.inputs]
        absent = [not name for name in node.inputs]
        values: list[Array | None] = []
        for name, shape in zip(node.inputs, shapes, strict=True):
            small = shape is not None and int(np.prod(shape)) <= _SMALL
            values.append(self._value_or_none(name) if name and small else None)
        if any(s is None and not a for s, a in zip(shapes[1:], absent[1:], strict=True)) and node.op in COMPUTED:
            return
        try:
            found = shape_of(node.op, node.attributes, shapes, values, len(node.outputs))
        except _WRONG as error:
            self.trouble.append(f"{node}: {error}")
            return
        for name, shape in zip(node.outputs, found, strict=False):
            if name and shape is not None:
                self._shape[name] = tuple(int(n) for n in shape)

    def _value_or_none(self, name: str) -> Array | None:
        try:
            return self.value(name)
        except NoMatchError:
            return None

    def _guards_against_nan(self, node: Node) -> bool:
        if len(node.inputs) != 3:
            return False
        test = self._maker.get(node.inputs[0])
        return test is not None and test.op == "IsNaN" and test.inputs[:1] == (node.inputs[2],)


def _keeps_rows(node: Node, before: Shape, after: Shape) -> bool:
    """Whether a node leaves the last axis as it is, and the order of what stands on the others."""
    if not before or not after or before[-1] != after[-1] or int(np.prod(before)) != int(np.prod(after)):
        return False
    if node.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        return True
    if node.op != "Transpose":
        return False
    order = list(node.attributes.get("perm", range(len(before) - 1, -1, -1)))
    long = [axis for axis in order[:-1] if before[axis] != 1]
    return order[-1] == len(before) - 1 and long == sorted(long)


def array_of(tensor: Any) -> Array:
    """Decode a weight; in bfloat16 it becomes float32.

    Raises
    ------
    NoMatchError
        When it lies in another file, or holds another number of entries than it says.
    """
    onnx = require_onnx()
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise NoMatchError(
            f"the weight {tensor.name!r} lies in another file: read the model with load_export, which fetches it"
        )
    try:
        value = onnx.numpy_helper.to_array(tensor)
    except Exception as error:
        # Whatever the decoder stumbles over, such as too few bytes: the weight can't be had.
        raise NoMatchError(f"the weight {tensor.name!r} can't be read: {error}") from None
    return value.astype(np.float32) if tensor.data_type == onnx.TensorProto.BFLOAT16 else np.asarray(value)


def _attribute(attribute: Any) -> Any:
    """Turn an attribute into plain Python or NumPy; graphs inside a node are left out."""
    onnx = require_onnx()
    kinds = onnx.AttributeProto
    if attribute.type == kinds.TENSOR:
        return array_of(attribute.t)
    if attribute.type in (kinds.FLOAT, kinds.INT, kinds.FLOATS, kinds.INTS):
        value = onnx.helper.get_attribute_value(attribute)
        return value if isinstance(value, (int, float)) else list(value)
    if attribute.type == kinds.STRING:
        return attribute.s.decode("utf-8", "replace")
    return None


_VALUES = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def canonical_nodes(model: Any) -> list[Node]:
    """Read the nodes of a graph; those of ONNX Runtime that stand for several are taken apart."""
    nodes: list[Node] = []
    for proto in model.graph.node:
        domain = "" if proto.domain in ("", "ai.onnx") else f"{proto.domain}."
        outputs = list(proto.output)
        constant = proto.op_type in ("Constant", "ConstantOfShape")
        if not any(outputs) or not (constant or (proto.input and proto.input[0])):
            continue
        outputs[0] = outputs[0] or f"nothing/{len(nodes)}"
        try:
            read = {a.name: _attribute(a) for a in proto.attribute}
            attributes = {name: value for name, value in read.items() if value is not None}
        except NoMatchError:
            # A Constant that can't be decoded: what needs it will not find it.
            continue
        if proto.op_type == "Constant" and not domain:
            value = attributes.get("value")
            for name, dtype in _VALUES.items():
                if name in attributes:
                    value = np.asarray(attributes[name], dtype)
            if value is not None:
                nodes.append(Node("Constant", (), tuple(outputs), {"value": value}, proto.name))
            continue
        node = Node(f"{domain}{proto.op_type}", tuple(proto.input), tuple(outputs), attributes, proto.name)
        nodes += _taken_apart(node)
    return nodes


def _taken_apart(node: Node) -> list[Node]:
    prefix, _, op = node.op.rpartition(".")
    if prefix != "com.microsoft":
        return [node]
    inputs = [*node.inputs, *[""] * 8]
    out = node.outputs[0]

    def step(op: str, arguments: Sequence[str], made: str, **attributes: Any) -> Node:
        return Node(op, tuple(arguments), (made,), attributes, node.name)

    if op in ("Gelu", "QuickGelu", "FusedMatMul", "LayerNormalization"):
        return [replace(node, op=op)]
    if op in ("FastGelu", "BiasGelu"):
        active = "FastGelu" if op == "FastGelu" else "Gelu"
        if not inputs[1]:
            return [step(active, inputs[:1], out)]
        return [step("Add", inputs[:2], f"{out}/sum"), step(active, [f"{out}/sum"], out)]
    if op == "SkipLayerNormalization":
        total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] else f"{out}/sum"
        first = inputs[0]
        steps = []
        if inputs[4]:
            first = f"{out}/biased"
            steps.append(step("Add", [inputs[0], inputs[4]], first))
        steps.append(step("Add", [first, inputs[1]], total))
        epsilon = node.attributes.get("epsilon", 1e-12)
        return [*steps, step("LayerNormalization", [total, inputs[2], inputs[3]], out, axis=-1, epsilon=epsilon)]
    if op == "MultiHeadAttention":
        if any(inputs[4:]) or not (inputs[1] and inputs[2]):
            return [node]
        steps, operands = [], inputs[:3]
        if inputs[3]:
            parts = [f"{out}/bias{k}" for k in range(3)]
            steps.append(Node("Split", (inputs[3],), tuple(parts), {"axis": 0}, node.name))
            operands = [f"{out}/operand{k}" for k in range(3)]
            steps += [step("Add", [inputs[k], parts[k]], operands[k]) for k in range(3)]
        return [*steps, replace(node, op=op, inputs=tuple(operands))]
    if op == "Attention" and not any(inputs[3:]) and not node.attributes.get("unidirectional", 0):
        # The weights of queries, keys and values stand side by side in it.
        sizes = node.attributes.get("qkv_hidden_sizes")
        parts = [f"{out}/part{k}" for k in range(3)]
        steps = [step("MatMul", inputs[:2], f"{out}/product")]
        product = f"{out}/product"
        if inputs[2]:
            steps.append(step("Add", [product, inputs[2]], f"{out}/biased"))
            product = f"{out}/biased"
        attributes = {"axis": -1, **({"split": sizes} if sizes else {})}
        steps.append(Node("Split", (product,), tuple(parts), attributes, node.name))
        return [*steps, Node("MultiHeadAttention", tuple(parts), (out,), node.attributes, node.name)]
    return [node]
