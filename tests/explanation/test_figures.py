from __future__ import annotations

import io
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from sparsespec.explanation import Explanation, explain
from sparsespec.pipeline import Segmenter

pytestmark = pytest.mark.needs("matplotlib")

STAGES = ("image", "channels", "affinity", "graph", "spectrum", "foreground", "candidates", "edges", "scores")
CASES = ("made", "plain", "paper", "nothing", "one_pixel", "one_token", "large")


def drawn(figure: object) -> bytes:
    """Draw with few dots: whatever warns or fails does so at any size."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=25)  # type: ignore[attr-defined]
    return content.getvalue()


@pytest.mark.parametrize(
    "which", [pytest.param(c, marks=[pytest.mark.slow] if c in ("large", "plain") else []) for c in CASES]
)
def test_all_stages_of_all_kinds_of_images(which: str, request: pytest.FixtureRequest) -> None:
    from sparsespec.explanation import figures

    made: Explanation = request.getfixturevalue(which)
    sheet = figures.figure(made)
    assert drawn(sheet).startswith(b"\x89PNG")
    texts = [text.get_text() for text in sheet.texts]
    assert made.name in texts
    headings = [text for text in texts if text[:1].isdigit() and "  " in text]
    assert len(headings) == (8 if which == "paper" else 9)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_by_itself(stage: str, made: Explanation) -> None:
    from sparsespec.explanation import figures

    figure = getattr(figures, stage)(made)
    assert figure.get_figwidth() == 14
    assert drawn(figure).startswith(b"\x89PNG")


def test_panels_show_what_the_explanation_holds(made: Explanation) -> None:
    from sparsespec.explanation import figures

    token = 37
    affinity = figures.affinity(made, token=token)
    heat = affinity.axes[1].images[0].get_array()
    np.testing.assert_array_equal(heat, made.similarity.row(token).reshape(made.grid))

    channels = figures.channels(made)
    shown = [collection.get_offsets() for collection in channels.axes[0].collections]
    assert [len(points) for points in shown] == [256, 68, 60]
    np.testing.assert_allclose(np.sort(shown[2][:, 1]), np.sort(made.channels[0].deviation[made.channels[0].kept]))

    regions = made.candidates
    assert regions is not None
    bars = figures.candidates(made).axes[0].patches
    heights = [bar.get_height() for bar in bars][: len(regions.taken)]
    np.testing.assert_allclose(heights, regions.merit[regions.taken])

    spectrum = figures.spectrum(made)
    points = spectrum.axes[0].collections[-1].get_offsets()
    np.testing.assert_allclose(points[:, 1], made.spectrum.values)
    np.testing.assert_array_equal(spectrum.axes[1].images[0].get_array(), made.spectrum.vectors[1])

    scores = [bar.get_width() for bar in figures.scores(made).axes[0].patches]
    np.testing.assert_allclose(scores, made.result.scores)


def test_a_token_that_is_not_there(made: Explanation) -> None:
    from sparsespec.explanation import figures

    with pytest.raises(ValueError, match="token must be from 0 to 255, not 256"):
        figures.figure(made, token=256)
    with pytest.raises(ValueError, match="token"):
        figures.affinity(made, token=-1)


def test_names_are_no_formulas_and_may_hold_any_letters(segmenter: Segmenter) -> None:
    from sparsespec.explanation import figures

    made = explain(segmenter, np.zeros((16, 16, 3), np.uint8), name="$x_1$ 写真\n.jpg")
    figure = figures.image(made)
    figure.text(0.1, 0.9, made.name, parse_math=False)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_files_are_the_same_bytes_and_sound(nothing: Explanation) -> None:
    from sparsespec.explanation import figures

    first, second = (figures.figure_bytes(figures.scores(nothing), "svg") for _ in range(2))
    assert first == second
    assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"
    with pytest.raises(ValueError, match="kind must be one of 'png', 'svg', not 'pdf'"):
        figures.figure_bytes(figures.scores(nothing), "pdf")


def test_pyplot_stays_out_and_matplotlib_is_asked_for_by_the_name_of_the_extra() -> None:
    code = (
        "import sys; import sparsespec.explanation; assert 'matplotlib' not in sys.modules\n"
        "import sparsespec.explanation.figures; assert 'matplotlib.pyplot' not in sys.modules\n"
        "del sys.modules['sparsespec.explanation.figures']\n"
        "for name in [n for n in sys.modules if n.startswith('matplotlib')]: sys.modules[name] = None\n"
        "try: import sparsespec.explanation.figures as f\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "figures need Matplotlib: pip install 'sparsespec[figures]'"
