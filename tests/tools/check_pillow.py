"""Cut-outs, as Pillow reads them."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import truth
from PIL import Image

output = Path(sys.argv[1])
run = output / "runs"
pairs, colours = [], True
for true, label, mask in truth.by_instance(truth.read(run)):
    photograph = np.asarray(Image.open(output / "photographs" / true.path).convert("RGB"))
    (path,) = [path for path in true.row["cutouts"] if Path(path).stem == f"{label:03d}"]
    with Image.open(run / path) as picture:
        assert picture.mode == "RGBA"
        found = np.asarray(picture)
    left, top, right, bottom = truth.box(mask)
    inside = mask[top:bottom, left:right]
    assert set(np.unique(found[..., 3])) <= {0, 255}
    pairs.append((found[..., 3] > 0, inside))
    colours &= bool((found[..., :3] == photograph[top:bottom, left:right] * inside[..., None]).all())
result, right = truth.agreement(pairs)
result += "; colours equal" if colours else "; colours differ"
truth.report(version("pillow"), "cut-outs", result, right and colours)
