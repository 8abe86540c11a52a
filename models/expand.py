"""Model files in another precision, for runtimes that can't run the one they are in.

Products of 8-bit integers whose inputs are quantised as they come exist for ONNX Runtime's CPU provider; elsewhere they
are missing, or fall back to the CPU one by one. Such a runtime gets the same weights as floating point numbers: what
8 bits took from them stays lost, what they would have taken from the inputs isn't.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ._onnx_graph import NoMatchError, array_of
from ._onnx_package import require_onnx
from .graph import write_graph
from .metadata import PRECISIONS, PREFIX, ModelFormatError, TrunkMetadata, parse_trunk_metadata
from .vit import Array, Attention, Block, FeedForward, Linear, Norm, Rest, Vit

__all__ = ["expanded", "read_graph"]

_ACTIVATIONS = {"Gelu": "gelu", "FastGelu": "gelu_tanh"}


def expanded(model: str | os.PathLike[str] | bytes, precision: str) -> bytes:
    """Write a model file in another precision, in memory.

    Parameters
    ----------
    model : str, path or bytes
        An .onnx file that :mod:`sparsespec.models.build` wrote, or its content.
    precision : {"float32", "float16", "int8"}
        The precision wanted. The file itself is returned when it is in that precision already.

    Returns
    -------
    bytes
        The content of an .onnx file with the same inputs, outputs and description. The same file gives the same bytes.

    Raises
    ------
    ImportError
        Without the onnx package.
    ValueError
        On an unknown precision, and on ``int8-static``, which needs pictures.
    ModelFormatError
        When the file isn't a model of ours.
    BuildError
        When the model is too large for one file in that precision.
    OSError
        When the file can't be opened.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    where = "the model given" if isinstance(model, bytes) else os.fspath(model)
    if isinstance(model, bytes):
        content = model
    else:
        with open(model, "rb") as stream:
            content = stream.read()
    proto = _parsed(content, where)
    props = {entry.key: entry.value for entry in proto.metadata_props}
    metadata = parse_trunk_metadata(props, where=where)
    if metadata.precision == precision:
        return content
    vit = read_graph(proto, metadata, where=where)
    written = write_graph(
        vit,
        blocks=metadata.output_blocks,
        precision=precision,
        name=metadata.name,
        source=metadata.source,
        source_sha256=metadata.source_sha256,
    )
    for entry in written.metadata_props:
        # Of a network cut early, only the blocks that are there were read.
        if entry.key == PREFIX + "blocks":
            entry.value = str(metadata.blocks)
    content = written.SerializeToString(deterministic=True)
    assert isinstance(content, bytes)
    return content


def read_graph(model: Any, metadata: TrunkMetadata, *, where: str) -> Vit:
    """Read the weights out of a graph of ours, as floating point numbers.

    Parameters
    ----------
    model : onnx.ModelProto
        What :func:`sparsespec.models.graph.write_graph` wrote.
    metadata : TrunkMetadata
        Its description.
    where : str
        Names the file in error messages.

    Returns
    -------
    Vit
        Up to the last block that the file gives, which ends after its queries, keys and values.

    Raises
    ------
    ModelFormatError
        When a weight is missing, of another shape or can't be read.
    """
    found = _Weights(model, where)
    channels, last = metadata.embed_dim, metadata.output_blocks[-1]
    blocks = []
    for index in range(last + 1):
        at = f"block.{index}"
        qkv = found.linear(f"{at}.qkv", channels, 3 * channels)
        parts = zip(np.split(qkv.weight, 3, axis=1), np.split(qkv.bias, 3), strict=True)
        query, key, value = (Linear(weight, bias) for weight, bias in parts)
        attention = Attention(found.norm(f"{at}.norm1", channels), query, key, value)
        rest = None
        if index < last:
            activation = _ACTIVATIONS.get(found.kinds.get(f"{at}.gelu", ""), "swiglu")
            fc1 = found.linear(f"{at}.fc1", channels, None)
            hidden = fc1.weight.shape[1] // (2 if activation == "swiglu" else 1)
            rest = Rest(
                found.linear(f"{at}.out", channels, channels),
                found.norm(f"{at}.norm2", channels),
                FeedForward(fc1, found.linear(f"{at}.fc2", hidden, channels), activation),
            )
        blocks.append(Block(attention, rest))
    size = metadata.patch_size
    kernel = found.array("patch.weight", (channels, 3, size, size))
    bias = found.array("patch.bias", (channels,), optional=True)
    return Vit(
        patch=Linear(kernel, bias),
        prefix=metadata.prefix,
        positions=metadata.positions,
        rule=metadata.rule,
        heads=metadata.heads,
        blocks=tuple(blocks),
        mean=_three(metadata.mean),
        std=_three(metadata.std),
    )


class _Weights:
    """Look-ups in a graph of ours, by the names that the writer gives."""

    def __init__(self, model: Any, where: str) -> None:
        self._where = where
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.kinds = {node.name: str(node.op_type) for node in model.graph.node}
        self._epsilons = {
            node.name: float(attribute.f)
            for node in model.graph.node
            for attribute in node.attribute
            if attribute.name == "epsilon"
        }

    def array(self, name: str, shape: tuple[int | None, ...], *, optional: bool = False) -> Array:
        """Return a weight in float32; None in its shape stands for any length. An optional one may be zeros."""
        if name not in self._tensors:
            if not optional:
                raise ModelFormatError(f"{self._where!r} is incomplete: its graph has no weight {name!r}")
            return np.zeros([length or 1 for length in shape], np.float32)
        try:
            value: Array = array_of(self._tensors[name])
        except NoMatchError as error:
            raise ModelFormatError(f"{self._where!r} is damaged: {error}") from None
        if len(value.shape) != len(shape) or any(b not in (a, None) for a, b in zip(value.shape, shape, strict=True)):
            raise ModelFormatError(f"{self._where!r} has a weight {name!r} of shape {value.shape}, expected {shape}")
        return value.astype(np.float32, copy=False)

    def linear(self, name: str, inputs: int, outputs: int | None) -> Linear:
        matrix = f"{name}.weight"
        if f"{matrix}_quantized" in self._tensors:
            weight = self.array(f"{matrix}_quantized", (inputs, outputs))
            weight = weight * self.array(f"{matrix}_scale", (weight.shape[1],))
        else:
            weight = self.array(matrix, (inputs, outputs))
        return Linear(weight, self.array(f"{name}.bias", (weight.shape[1],), optional=True))

    def norm(self, name: str, channels: int) -> Norm:
        weight, bias = self.array(f"{name}.weight", (channels,)), self.array(f"{name}.bias", (channels,))
        if name not in self._epsilons:
            raise ModelFormatError(f"{self._where!r} is incomplete: its graph has no layer normalisation {name!r}")
        return Norm(weight, bias, self._epsilons[name])


def _parsed(content: bytes, where: str) -> Any:
    onnx = require_onnx()
    try:
        return onnx.load_from_string(content)
    except Exception as error:  # protobuf's own class
        raise ModelFormatError(f"{where!r} isn't an ONNX file, or is cut short: {error}") from error


def _three(values: Array) -> tuple[float, float, float]:
    # The shortest decimal numbers that are these, not what float32 makes of them.
    first, second, third = (float(str(value)) for value in values)
    return first, second, third
