"""Writes a vision transformer as the one graph that :class:`sparsespec.backbone.Backbone` runs.

* The trunk ends after the queries, keys and values of the last block wanted.
* Queries, keys and values of a block come from one matrix product.
* Attention is one ``com.microsoft.MultiHeadAttention`` with bare q, k and v, which takes ONNX Runtime's flash path:
  memory grows linearly with the number of tokens, not with its square.
* The position table is an input, because exporters and runtimes disagree on how to resize it; the tokens in front of
  the patches (class token, registers) come with it.
* With ``int8`` every matrix of the blocks is kept in 8 bits, one scale per column, and inputs are quantised as they
  come. With ``int8-static`` the steps of the inputs are fixed, and the graph says so in the standard's own operators
  (QuantizeLinear, DequantizeLinear), of which a runtime makes what suits it. With ``float16`` products and attention
  are in half precision, sums and normalisations in single.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._onnx_package import require_onnx
from .metadata import FILE_PRECISIONS, STATIC, describe
from .vit import Array, Attention, BuildError, FeedForward, Linear, Norm, Vit

__all__ = ["chosen_blocks", "write_graph"]

_LARGEST_FILE = 2**31 - 2**20  # protobuf's limit, with room for the nodes and the table
_MICROSOFT = "com.microsoft"


def chosen_blocks(blocks: Sequence[int], count: int) -> tuple[int, ...]:
    """Turn block numbers, negative ones counted from the end, into ascending zero-based ones without repetition.

    Parameters
    ----------
    blocks : sequence of int
        Such as ``(-1,)``.
    count : int
        Blocks there are.

    Returns
    -------
    tuple of int

    Raises
    ------
    ValueError
        When there is none, or one is out of range.
    """
    if isinstance(blocks, str | bytes) or not isinstance(blocks, Sequence) or not blocks:
        raise ValueError(f"blocks must be block numbers such as (8, 11) or (-1,), got {blocks!r}")
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int | np.integer):
            raise ValueError(f"blocks must be whole numbers, got {block!r}")
        if not -count <= block < count:
            raise ValueError(f"there is no block {block}: this network has blocks 0 to {count - 1}, or -{count} to -1")
    return tuple(sorted({int(block) % count for block in blocks}))


class _Writer:
    """Collects nodes and weights under names that depend on nothing but their place."""

    def __init__(self, precision: str, ranges: Mapping[str, tuple[float, float]]) -> None:
        onnx = require_onnx()
        self._ranges = ranges
        self._helper = onnx.helper
        self._precision = precision
        self.half = precision == "float16"
        # Filled in place: every helper that takes a list of tensors copies them, a gigabyte for a large network.
        self.model = onnx.ModelProto()
        self.bounds: list[str] = []
        self._bytes = 0

    def weight(self, name: str, value: Array) -> str:
        self._bytes += value.nbytes
        # Checked as they come, before another copy of weights too large for a file fills the memory.
        if self._bytes > _LARGEST_FILE:
            raise BuildError(
                f"an ONNX file holds at most 2 GB and this model needs more in {self._precision}: "
                "choose float16 or int8, or an earlier block"
            )
        tensor = self.model.graph.initializer.add(name=name, dims=value.shape)
        tensor.data_type = self._helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor.raw_data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        return name

    def op(self, op: str, inputs: Sequence[str], output: str, *more: str, domain: str = "", **attributes: Any) -> str:
        node = self._helper.make_node(op, inputs, [output, *more], name=output, domain=domain, **attributes)
        self.model.graph.node.append(node)
        return output

    def narrow(self, tensor: str) -> str:
        """Go to half precision, where that is wanted."""
        return self.op("Cast", [tensor], f"{tensor}.half", to=10) if self.half else tensor

    def widen(self, tensor: str, name: str) -> str:
        """Name a tensor, in single precision again."""
        return self.op("Cast", [tensor], name, to=1)

    def norm(self, tensor: str, norm: Norm, name: str) -> str:
        weight, bias = self.weight(f"{name}.weight", norm.weight), self.weight(f"{name}.bias", norm.bias)
        return self.op("LayerNormalization", [tensor, weight, bias], name, axis=-1, epsilon=norm.epsilon)

    def product(self, tensor: str, weight: Array, name: str, matrix: str) -> str:
        if self._precision == STATIC:
            return self.static_product(tensor, weight, name, matrix)
        if self._precision != "int8":
            return self.op("MatMul", [tensor, self.weight(matrix, self._kept(weight, matrix))], name)
        # The steps and the order that ONNX Runtime fuses into one when it loads the file.
        quantised, scale, zero = f"{matrix}.input", f"{matrix}.input_scale", f"{matrix}.input_zero"
        self.op("DynamicQuantizeLinear", [tensor], quantised, scale, zero)
        small, column_scales = quantised_columns(weight)
        scales = self.op("Mul", [scale, self.weight(f"{matrix}_scale", column_scales)], f"{matrix}.scales")
        zeros = self.weight(f"{matrix}_zero_point", np.zeros(small.shape[1], np.int8))
        inputs = [quantised, self.weight(f"{matrix}_quantized", small), zero, zeros]
        counted = self.op("MatMulInteger", inputs, f"{matrix}.integers")
        return self.op("Mul", [self.op("Cast", [counted], f"{matrix}.floats", to=1), scales], name)

    def static_product(self, tensor: str, weight: Array, name: str, matrix: str) -> str:
        step, zero = input_steps(*self._ranges[matrix.removesuffix(".weight")])
        steps = [self.weight(f"{matrix}.input_scale", step), self.weight(f"{matrix}.input_zero", zero)]
        quantised = self.op("QuantizeLinear", [tensor, *steps], f"{matrix}.input")
        near = self.op("DequantizeLinear", [quantised, *steps], f"{matrix}.near")
        small, column_scales = quantised_columns(weight)
        parts = [self.weight(f"{matrix}_quantized", small), self.weight(f"{matrix}_scale", column_scales)]
        parts.append(self.weight(f"{matrix}_zero_point", np.zeros(small.shape[1], np.int8)))
        return self.op("MatMul", [near, self.op("DequantizeLinear", parts, f"{matrix}.floats", axis=1)], name)

    def linear(self, tensor: str, linear: Linear, name: str) -> str:
        if not linear.bias.any():
            return self.product(tensor, linear.weight, name, f"{name}.weight")
        product = self.product(tensor, linear.weight, f"{name}.product", f"{name}.weight")
        return self.op("Add", [product, self.weight(f"{name}.bias", self._kept(linear.bias, f"{name}.bias"))], name)

    def qkv(self, tensor: str, attention: Attention, name: str, outputs: Sequence[str]) -> None:
        parts = (attention.query, attention.key, attention.value)
        fused = Linear(np.hstack([p.weight for p in parts]), np.concatenate([p.bias for p in parts]))
        self.op("Split", [self.linear(tensor, fused, f"{name}.qkv")], *outputs, axis=-1)

    def feed_forward(self, tensor: str, layer: FeedForward, name: str) -> str:
        hidden = self.linear(tensor, layer.fc1, f"{name}.fc1")
        if layer.activation == "gelu":
            active = self.op("Gelu", [hidden], f"{name}.gelu", domain=_MICROSOFT)
        elif layer.activation == "gelu_tanh":
            active = self.op("FastGelu", [hidden], f"{name}.gelu", domain=_MICROSOFT)
        elif layer.activation == "swiglu":
            gate, values = f"{name}.gate", f"{name}.gated"
            self.op("Split", [hidden], gate, values, axis=-1)
            open_gate = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
            active = self.op("Mul", [open_gate, values], f"{name}.swiglu")
        else:
            raise BuildError(f"no graph can be written for the activation {layer.activation!r}")
        return self.linear(active, layer.fc2, f"{name}.fc2")

    def _kept(self, value: Array, name: str) -> Array:
        if not self.half:
            return value
        with np.errstate(over="ignore"):
            narrow = value.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise BuildError(
                f"{name} holds {np.abs(value).max():.3g}, which is too large for half precision: choose float32 or int8"
            )
        return narrow


def quantised_columns(weight: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round the columns of a matrix to -127 ... 127 times a scale each.

    Parameters
    ----------
    weight : (inputs, outputs) float32
        The matrix.

    Returns
    -------
    integers : (inputs, outputs) int8
    scales : (outputs,) float32
        ``integers * scales`` approximates ``weight``. 1 for a column of zeros.
    """
    scales = (np.abs(weight).max(axis=0).astype(np.float64) * 2 / 254).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1
    integers: npt.NDArray[np.int8] = np.clip(np.rint(weight.astype(np.float32) / scales), -127, 127).astype(np.int8)
    return integers, scales


def input_steps(low: float, high: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Lay 256 steps over a range; zero is one of them.

    Parameters
    ----------
    low, high : float
        Least and largest value expected. Values beyond are brought to the nearest end.

    Returns
    -------
    step : () float32
        From one to the next. 1 for a range of nothing but zero.
    zero : () uint8
        Which of them stands for zero: ``(integer - zero) * step`` approximates a value.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32((high - low) / 255)
    if step < np.finfo(np.float32).tiny:
        step = np.float32(1)
    return np.asarray(step), np.asarray(np.clip(np.rint(-low / float(step)), 0, 255), np.uint8)


def write_graph(
    vit: Vit,
    *,
    blocks: Sequence[int] = (-1,),
    precision: str = "float32",
    name: str,
    source: str,
    source_sha256: str,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Any:
    """Write a vision transformer as a graph of our own.

    Inputs: ``image`` (batch, 3, height, width) float32, normalised, height and width multiples of the patch size;
    ``positions`` (1, P + h * w, D) float32: the tokens in front of the patches as they enter the first block, then the
    positions of the patches, row by row. Outputs: ``queries``, ``keys``, ``values`` (batch, h * w, D) float32 of the
    last block wanted, and of every other one under names such as ``keys.8``.

    Parameters
    ----------
    vit : Vit
        The weights.
    blocks : sequence of int
        Blocks whose queries, keys and values come out; zero-based, negative numbers count from the end. What lies
        behind the last of them is left out.
    precision : {"float32", "float16", "int8", "int8-static"}
        How to keep the weights of the blocks. With ``float16`` the products and the attention are in half precision as
        well; inputs and outputs stay float32.
    name : str
        Name of the model, for the metadata.
    source, source_sha256 : str
        Where the weights come from and the SHA-256 of that file, for the metadata.
    ranges : mapping of str to (float, float), optional
        For ``int8-static``: least and largest value of the inputs of each layer, by names such as ``block.0.fc1``; see
        :func:`sparsespec.models.calibration.balanced`.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    ImportError
        Without the onnx package.
    ValueError
        On an unknown precision, a block out of range, or ranges that are missing or not used.
    BuildError
        When the weights don't fit in one file (2 GB) or in half precision.
    """
    if precision not in FILE_PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(FILE_PRECISIONS)}, got {precision!r}")
    if (ranges is not None) != (precision == STATIC):
        raise ValueError(f"ranges belong to the precision {STATIC} and to no other, got precision {precision!r}")
    wanted = chosen_blocks(blocks, len(vit.blocks))
    require_onnx()
    from onnx import helper

    w = _Writer(precision, ranges or {})
    prefix = len(vit.prefix)
    state = _tokens(w, vit)
    outputs: list[str] = []
    for index, block in enumerate(vit.blocks[: wanted[-1] + 1]):
        last = index == wanted[-1]
        at = f"block.{index}"
        normed = w.norm(state, block.attention.norm, f"{at}.norm1")
        names = [f"{at}.{part}" for part in ("queries", "keys", "values")]
        if last:
            # Nobody asks for the rows in front of the patches, so they aren't even computed.
            narrow = w.narrow(_without_prefix(w, normed, prefix, "patches"))
            # float32 tensors can be the outputs themselves.
            heads = names if w.half else ["queries", "keys", "values"]
            w.qkv(narrow, block.attention, at, heads)
            if w.half:
                for part, tensor in zip(("queries", "keys", "values"), names, strict=True):
                    w.widen(tensor, part)
            outputs = ["queries", "keys", "values", *outputs]
            break
        w.qkv(w.narrow(normed), block.attention, at, names)
        if index in wanted:
            for part, tensor in zip(("queries", "keys", "values"), names, strict=True):
                outputs.append(_output(w, tensor, prefix, f"{part}.{index}"))
        if block.rest is None:
            raise BuildError(f"block {index} ends after its queries, keys and values, but block {wanted[-1]} is wanted")
        mixed = w.op("MultiHeadAttention", names, f"{at}.mixed", domain=_MICROSOFT, num_heads=vit.heads)
        state = _sum(w, state, w.linear(mixed, block.rest.out, f"{at}.out"), f"{at}.middle")
        normed = w.narrow(w.norm(state, block.rest.norm, f"{at}.norm2"))
        state = _sum(w, state, w.feed_forward(normed, block.rest.feed_forward, at), f"{at}.end")

    def value(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, 1, list(shape))

    model = w.model
    model.graph.name = "trunk"
    model.graph.input.extend([value("image", "batch", 3, "height", "width")])
    model.graph.input.extend([value("positions", 1, "positions", vit.embed_dim)])
    model.graph.output.extend(value(output, "batch", "tokens", vit.embed_dim) for output in outputs)
    model.opset_import.extend([helper.make_opsetid("", 17), helper.make_opsetid(_MICROSOFT, 1)])
    model.ir_version = 8  # what opset 17 came with; newer ones would only shut out older runtimes
    model.producer_name, model.producer_version = "sparsespec.models.build", ""
    props = describe(
        vit, output_blocks=wanted, precision=precision, name=name, source=source, source_sha256=source_sha256
    )
    for key in sorted(props):
        model.metadata_props.add(key=key, value=props[key])
    return model


def _tokens(w: _Writer, vit: Vit) -> str:
    """Write the way from the image to what enters the first block."""
    size = vit.patch_size
    inputs = ["image", w.weight("patch.weight", vit.patch.weight)]
    if vit.patch.bias.any():
        inputs.append(w.weight("patch.bias", vit.patch.bias))
    patches = w.op("Conv", inputs, "patch", kernel_shape=[size, size], strides=[size, size])
    flat = w.op("Reshape", [patches, w.weight("flat.shape", np.array([0, vit.embed_dim, -1], np.int64))], "flat")
    rows = w.op("Transpose", [flat], "rows", perm=[0, 2, 1])
    if len(vit.prefix):
        # Rows of zeros in front; what stands there comes with the position table, and need not be repeated here.
        pads = w.weight("room.pads", np.array([0, len(vit.prefix), 0, 0, 0, 0], np.int64))
        rows = w.op("Pad", [rows, pads], "room")
        for key, bound in (("from", len(vit.prefix)), ("to", 2**62), ("axis", 1)):
            w.bounds.append(w.weight(f"patches.{key}", np.array([bound], np.int64)))
    return w.op("Add", [rows, "positions"], "tokens")


def _without_prefix(w: _Writer, tensor: str, prefix: int, name: str) -> str:
    """Cut the rows in front of the patches off."""
    return w.op("Slice", [tensor, *w.bounds], name) if prefix else tensor


def _output(w: _Writer, tensor: str, prefix: int, name: str) -> str:
    if w.half:
        tensor = _without_prefix(w, tensor, prefix, f"{tensor}.patches")
        return w.widen(tensor, name)
    if prefix:
        return _without_prefix(w, tensor, prefix, name)
    return w.op("Identity", [tensor], name)


def _sum(w: _Writer, state: str, change: str, name: str) -> str:
    """Add in single precision: the state grows from block to block, up to hundreds in a few channels."""
    return w.op("Add", [state, w.widen(change, f"{change}.single") if w.half else change], name)
