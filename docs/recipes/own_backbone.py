"""Segment with a network of your own: build it, learn its directions without labels, and use both.

pip install 'sparsespec[build]'
python own_backbone.py [EXPORT.onnx] [--photographs FOLDER] [--output FOLDER]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sparsespec import Backbone, Segmenter
from sparsespec.batch import InputsError, find_inputs
from sparsespec.fitting import fit_directions
from sparsespec.images import ImageReadError, read_image
from sparsespec.models import BuildError, build_model


def write_toy_export(path: Path, *, patch: int = 8, width: int = 48, heads: int = 4, blocks: int = 2) -> None:
    """Write what torch.onnx.export writes of a vision transformer, at one size, with weights that nothing has taught.

    Its patches see colours and waves, the rest is random: enough to try the way from here to masks, no more.
    """
    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []

    def weight(*shape: int, value: Any = None) -> str:
        array = rng.normal(size=shape, scale=0.5 / np.sqrt(shape[0])) if value is None else np.asarray(value)
        array = array if array.dtype == np.int64 else array.astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"weight{len(weights)}"))
        return weights[-1].name

    def op(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"tensor{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def linear(x: str, inputs: int, outputs: int) -> str:
        return op("Add", op("MatMul", x, weight(inputs, outputs)), weight(value=np.zeros(outputs)))

    def norm(x: str) -> str:
        return op("LayerNormalization", x, weight(value=np.ones(width)), weight(value=np.zeros(width)), epsilon=1e-6)

    def by_head(x: str, order: list[int]) -> str:
        return op("Transpose", op("Reshape", x, weight(value=np.array([1, -1, heads, width // heads]))), perm=order)

    side = 14
    wave = np.cos(np.pi * np.outer(np.arange(4), np.arange(patch) + 0.5) / patch)
    filters = np.einsum("ay,bx,c->abcyx", wave, wave, [1, 1, 1]).reshape(-1, 3, patch, patch)
    filters = np.concatenate([np.eye(3)[:, :, None, None] * np.ones((patch, patch)), filters[: width - 3]]) / patch
    missing = rng.normal(size=(width - len(filters), 3, patch, patch)) / patch
    kernel = weight(value=np.concatenate([filters, missing]))
    x = op("Conv", "pixels", kernel, weight(value=np.zeros(width)), kernel_shape=[patch] * 2, strides=[patch] * 2)
    x = op("Transpose", op("Reshape", x, weight(value=np.array([1, width, -1]))), perm=[0, 2, 1])
    x = op("Concat", weight(1, 1, width), x, axis=1)  # the class token
    x = op("Add", x, weight(1, 1 + side**2, width))
    for _ in range(blocks):
        normed = norm(x)
        query, key, value = (linear(normed, width, width) for _ in range(3))
        product = op("MatMul", by_head(query, [0, 2, 1, 3]), by_head(key, [0, 2, 3, 1]))
        product = op("Mul", product, weight(value=(width // heads) ** -0.5))
        mixed = op("MatMul", op("Softmax", product, axis=-1), by_head(value, [0, 2, 1, 3]))
        joined = op("Reshape", op("Transpose", mixed, perm=[0, 2, 1, 3]), weight(value=np.array([1, -1, width])))
        x = op("Add", x, linear(joined, width, width))
        x = op("Add", x, linear(op("Gelu", linear(norm(x), width, 2 * width)), 2 * width, width))
    nodes.append(helper.make_node("Identity", [norm(x)], ["last_hidden_state"]))
    pixels = helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1, 3, side * patch, side * patch])
    tokens = helper.make_tensor_value_info("last_hidden_state", onnx.TensorProto.FLOAT, [1, 1 + side**2, width])
    graph = helper.make_graph(nodes, "vit", [pixels], [tokens], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("export", nargs="?", type=Path, help=".onnx or .safetensors; without one, a toy is written")
    parser.add_argument("--photographs", default="docs/examples", help="a folder, to learn the directions from")
    parser.add_argument("--output", type=Path, default=Path("own-backbone"))
    parser.add_argument("--precision", default="int8", help="float32, float16 for GPUs, or int8")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.export is None:
        args.export = args.output / "toy-export.onnx"
        write_toy_export(args.export)

    model, learned = args.output / "mine.onnx", args.output / "mine.npz"
    try:
        # Checked against the export before it is written. From here on, neither the export nor onnx is needed.
        build_model(args.export, model, precision=args.precision, name="mine")
        inputs = find_inputs(args.photographs)
        images = [read_image(Path(inputs.root, name)) for name in inputs.images]
    except (BuildError, InputsError, ImageReadError) as error:
        parser.error(str(error))
    backbone = Backbone(model)
    # Half precision is enough to fit to, and keeps the features of hundreds of photographs small.
    features = [backbone.features(image).halved() for image in images]
    directions = fit_directions(features, source_sha256=backbone.features_sha256)
    directions.save(learned)

    # One network for both. A program of yours needs no more than these two files and this line.
    with_directions = Segmenter(backbone, directions=learned)
    without = Segmenter(backbone, directions=None)
    for name, image in zip(inputs.images, images, strict=True):
        print(f"{name}: {len(with_directions(image))} instances, {len(without(image))} without directions")
    print(f"{model} ({model.stat().st_size / 1e6:.1f} MB), {learned} of {len(images)} photographs")


if __name__ == "__main__":
    main()
