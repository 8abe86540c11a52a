"""Make trunk.npz: queries, keys and values of a small made-up picture from the graph in the wheel, as exported.

For tests/test_backbone.py, which doesn't need the wheel. ``python tests/golden/make_trunk.py WHEEL`` needs the onnx
package. Nothing of our own graph is used: the picture is normalised here, and the graph resizes its position table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from sparsespec.models._wheel import read_wheel
from sparsespec.models.from_onnx import read_export


def picture() -> npt.NDArray[np.float32]:
    """Make a smooth picture of 56 x 70 pixels with an edge in it, from formulas only."""
    y, x = np.mgrid[0:56, 0:70] / 70.0
    disc = (x - 0.5) ** 2 + (y - 0.35) ** 2 < 0.06
    channels = [0.5 + 0.4 * np.sin(5 * x + k) * np.cos(4 * y - k) for k in range(3)]
    return np.stack([np.where(disc, 1 - c, c) for c in channels], axis=-1).astype(np.float32)


def main() -> None:
    model = onnx.load_from_string(read_wheel(sys.argv[1]))
    taps = [tap.tensor for tap in read_export(model).taps[-1]]
    del model.graph.output[:]
    for name in taps:
        model.graph.output.add(name=name)
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    image = ((picture() - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(taps, {model.graph.input[0].name: image.transpose(2, 0, 1)[None]})
    parts = {name: part[0, 1:] for name, part in zip(("queries", "keys", "values"), found, strict=True)}
    # Half precision is a hundred times finer than what 8-bit weights do to these numbers.
    arrays = {name: part.astype(np.float16) for name, part in parts.items()}
    np.savez_compressed(Path(__file__).with_name("trunk.npz"), image=picture(), **arrays)


if __name__ == "__main__":
    main()
