"""A vision transformer as everybody has it: the graph that an exporter writes, and a module of PyTorch.

Both are made of the same :class:`~sparsespec.models.vit.Vit` as our own graph and end where it does, after the queries,
keys and values of the last block, so that nothing is compared but the way to compute them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.models.vit import FeedForward, Linear, Norm, Vit
from sparsespec.position_table import PositionRule

__all__ = ["can_resize", "load_torch", "plain_graph", "save_weights"]

_OUTPUTS = ("queries", "keys", "values")


def can_resize(rule: PositionRule) -> bool:
    """Tell whether a Resize in a graph brings the position table to size as this rule does."""
    return rule == PositionRule()


class _Graph:
    """Nodes and weights of a graph, under names that count up as an exporter's do."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._make = helper.make_node
        self._from_array = numpy_helper.from_array
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, value: npt.ArrayLike) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(self._from_array(np.ascontiguousarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        name = to or f"t{len(self.nodes)}"
        self.nodes.append(self._make(kind, inputs, [name], **attributes))
        return name

    def shape(self, *lengths: int) -> str:
        return self.weight(np.array(lengths, np.int64))

    def linear(self, tensor: str, linear: Linear, to: str = "") -> str:
        # Exporters write the bias first.
        return self.op("Add", self.weight(linear.bias), self.op("MatMul", tensor, self.weight(linear.weight)), to=to)

    def norm(self, tensor: str, norm: Norm) -> str:
        weights = (self.weight(norm.weight), self.weight(norm.bias))
        return self.op("LayerNormalization", tensor, *weights, axis=-1, epsilon=norm.epsilon)

    def activation(self, tensor: str, kind: str) -> str:
        def number(value: float) -> str:
            return self.weight(np.float32(value))

        if kind == "gelu":
            inner = self.op("Erf", self.op("Div", tensor, number(2**0.5)))
        elif kind == "gelu_tanh":
            cube = self.op("Mul", self.op("Pow", tensor, number(3.0)), number(0.044715))
            inner = self.op("Tanh", self.op("Mul", self.op("Add", tensor, cube), number((2 / np.pi) ** 0.5)))
        else:
            gate, values = f"{tensor}.gate", f"{tensor}.values"
            self.nodes.append(self._make("Split", [tensor], [gate, values], axis=-1))
            return self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), values)
        scaled = self.op("Mul", tensor, self.op("Add", inner, number(1.0)))
        return self.op("Mul", scaled, number(0.5))


def plain_graph(vit: Vit, *, resize: bool) -> Any:
    """Write a vision transformer as an exporter does: one node for each step of the model's code, in float32.

    Parameters
    ----------
    vit : Vit
        The weights; layer scales are in them already, so an export has two products more in each block.
    resize : bool
        Bring the position table to size in the graph, as exports for images of any size do. Otherwise it is an input,
        as ours has it: ``positions`` (1, P + h * w, D).

    Returns
    -------
    onnx.ModelProto
        Input ``image`` (1, 3, H, W); outputs ``queries``, ``keys``, ``values`` (1, P + h * w, D), with the rows of the
        prefix.

    Raises
    ------
    ValueError
        On ``resize`` with a rule that no Resize follows, see :func:`can_resize`.
    """
    from onnx import helper

    if resize and not can_resize(vit.rule):
        raise ValueError(f"a graph can't bring a position table to size by {vit.rule}")
    g = _Graph()
    size, width, prefix = vit.patch_size, vit.embed_dim, len(vit.prefix)
    heads, head = vit.heads, vit.embed_dim // vit.heads
    conv = g.op(
        "Conv",
        "image",
        g.weight(vit.patch.weight),
        g.weight(vit.patch.bias),
        kernel_shape=[size, size],
        strides=[size, size],
    )
    rows = g.op("Transpose", g.op("Reshape", conv, g.shape(0, width, -1)), perm=[0, 2, 1])
    if resize:
        sides = g.op("Div", g.op("Slice", g.op("Shape", "image"), g.shape(2), g.shape(4)), g.shape(size))
        target = g.op("Concat", g.shape(1, width), sides, axis=0)
        table = g.weight(vit.positions.transpose(2, 0, 1)[None].astype(np.float32))
        resized = g.op(
            "Resize",
            table,
            "",
            "",
            target,
            mode="cubic",
            cubic_coeff_a=-0.75,
            coordinate_transformation_mode="half_pixel",
        )
        flat = g.op("Transpose", g.op("Reshape", resized, g.shape(1, width, -1)), perm=[0, 2, 1])
        state = g.op("Add", rows, flat)
        if prefix:
            state = g.op("Concat", g.weight(vit.prefix[None].astype(np.float32)), state, axis=1)
    else:
        if prefix:
            rows = g.op("Concat", g.weight(np.zeros((1, prefix, width), np.float32)), rows, axis=1)
        state = g.op("Add", rows, "positions")

    def split(tensor: str, perm: Sequence[int]) -> str:
        return g.op("Transpose", g.op("Reshape", tensor, g.shape(0, 0, heads, head)), perm=list(perm))

    for index, block in enumerate(vit.blocks):
        attention = block.attention
        normed = g.norm(state, attention.norm)
        last = index == len(vit.blocks) - 1
        names = _OUTPUTS if last else ("", "", "")
        parts = (attention.query, attention.key, attention.value)
        query, key, value = (g.linear(normed, part, name) for part, name in zip(parts, names, strict=True))
        if last:
            break
        rest = block.rest
        assert rest is not None
        scores = g.op("MatMul", split(query, (0, 2, 1, 3)), split(key, (0, 2, 3, 1)))
        weights = g.op("Softmax", g.op("Div", scores, g.weight(np.float32(head**0.5))), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", weights, split(value, (0, 2, 1, 3))), perm=[0, 2, 1, 3])
        state = g.op("Add", g.linear(g.op("Reshape", mixed, g.shape(0, 0, width)), rest.out), state)
        layer = rest.feed_forward
        hidden = g.activation(g.linear(g.norm(state, rest.norm), layer.fc1), layer.activation)
        state = g.op("Add", g.linear(hidden, layer.fc2), state)

    def described(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, 1, list(shape))

    inputs = [described("image", "batch", 3, "height", "width")]
    if not resize:
        inputs.append(described("positions", 1, "positions", width))
    outputs = [described(name, "batch", "tokens", width) for name in _OUTPUTS]
    graph = helper.make_graph(g.nodes, "plain", inputs, outputs, g.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save_weights(vit: Vit, path: str | os.PathLike[str]) -> None:
    """Write the weights to an .npz file that :func:`load_torch` reads, without ONNX."""
    arrays: dict[str, npt.NDArray[Any]] = {}

    def linear(name: str, part: Linear) -> None:
        # As PyTorch keeps it: (outputs, inputs).
        arrays[f"{name}.weight"] = np.ascontiguousarray(part.weight.T, np.float32)
        arrays[f"{name}.bias"] = part.bias.astype(np.float32)

    def norm(name: str, part: Norm) -> float:
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = part.weight, part.bias
        return part.epsilon

    arrays["patch.weight"], arrays["patch.bias"] = vit.patch.weight, vit.patch.bias
    blocks = []
    for index, block in enumerate(vit.blocks):
        attention, rest = block.attention, block.rest
        parts = (attention.query, attention.key, attention.value)
        linear(
            f"{index}.qkv",
            Linear(np.hstack([part.weight for part in parts]), np.concatenate([part.bias for part in parts])),
        )
        about: dict[str, Any] = {"epsilon1": norm(f"{index}.norm1", attention.norm)}
        if rest is not None and index < len(vit.blocks) - 1:
            linear(f"{index}.out", rest.out)
            about["epsilon2"] = norm(f"{index}.norm2", rest.norm)
            layer: FeedForward = rest.feed_forward
            linear(f"{index}.fc1", layer.fc1)
            linear(f"{index}.fc2", layer.fc2)
            about["activation"] = layer.activation
        blocks.append(about)
    arrays["about"] = np.array(json.dumps({"heads": vit.heads, "prefix": len(vit.prefix), "blocks": blocks}))
    save: Any = np.savez  # its type takes every name for an option
    save(path, **arrays)


def load_torch(
    path: str | os.PathLike[str], torch: Any, dtype: str, device: str = "cpu"
) -> Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32]], tuple[Any, Any, Any]]:
    """Return the network in PyTorch, eager, with its scaled dot product attention.

    Parameters
    ----------
    path
        What :func:`save_weights` wrote.
    torch : module
        PyTorch.
    dtype : {"float32", "bfloat16", "float16"}
        Of weights and computations.
    device : {"cpu", "cuda"}
        Where they lie and happen; image, positions and answer are in the memory of the processor.

    Returns
    -------
    callable
        From the image (1, 3, H, W) and the position input (1, P + h * w, D), float32, to queries, keys and values
        (1, P + h * w, D), float32 arrays.
    """
    functional = torch.nn.functional
    kind = getattr(torch, dtype)
    with np.load(path, allow_pickle=False) as content:
        about = json.loads(str(content["about"]))
        weights: Mapping[str, Any] = {
            name: torch.from_numpy(content[name]).to(device, kind) for name in content.files if name != "about"
        }
    heads, size = about["heads"], weights["patch.weight"].shape[-1]

    def linear(state: Any, name: str) -> Any:
        return functional.linear(state, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(state: Any, name: str, epsilon: float) -> Any:
        return functional.layer_norm(
            state, state.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon
        )

    def activation(hidden: Any, kind: str) -> Any:
        if kind == "swiglu":
            gate, values = hidden.chunk(2, dim=-1)
            return functional.silu(gate) * values
        return functional.gelu(hidden, approximate="tanh" if kind == "gelu_tanh" else "none")

    def run(image: npt.NDArray[np.float32], positions: npt.NDArray[np.float32]) -> tuple[Any, Any, Any]:
        with torch.inference_mode():
            pixels = torch.from_numpy(image).to(device, kind)
            conv = functional.conv2d(pixels, weights["patch.weight"], weights["patch.bias"], stride=size)
            state = torch.from_numpy(positions).to(device, kind, copy=True)
            state[:, about["prefix"] :] += conv.flatten(2).transpose(1, 2)
            batch, tokens, width = state.shape
            for index, block in enumerate(about["blocks"]):
                projected = linear(norm(state, f"{index}.norm1", block["epsilon1"]), f"{index}.qkv")
                if "activation" not in block:
                    break
                parts = projected.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
                mixed = functional.scaled_dot_product_attention(*parts.unbind(0))
                state = state + linear(mixed.transpose(1, 2).reshape(batch, tokens, width), f"{index}.out")
                hidden = linear(norm(state, f"{index}.norm2", block["epsilon2"]), f"{index}.fc1")
                state = state + linear(activation(hidden, block["activation"]), f"{index}.fc2")
            queries, keys, values = (part.float().cpu().numpy() for part in projected.chunk(3, dim=-1))
            return queries, keys, values

    return run
