from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.evaluation.datasets import KINDS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "datasets.md"


def test_every_kind_has_its_commands() -> None:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    by_title = {section.split("\n")[0]: section for section in sections}
    for kind in KINDS:
        section = by_title[kind]
        output = re.search(r"^sparsespec run  --input \S+ --output (\S+)$", section, re.MULTILINE)
        assert output, kind
        assert f"sparsespec eval --pred {output[1]} --truth " in section
        assert f"--dataset {kind}" in section


def test_the_lines_of_python_run(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make.photo("PennFudanPed/PNGImages/FudanPed00001.png")
    make.labels("PennFudanPed/PedMasks/FudanPed00001_mask.png", np.eye(6, 8, dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], str(PAGE), "exec"), {"__name__": "datasets_page"})
    assert "Penn-Fudan 1 () ()\nFudanPed00001 PennFudanPed/PNGImages/FudanPed00001.png (1, 6, 8) 1" in (
        capsys.readouterr().out.replace("\\", "/")
    )
