"""What is said about each stage, in figures and on the page: a heading, and sentences with the numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsespec.explanation.stages import Explanation
from sparsespec.pipeline import likely_overlap

__all__ = ["Text", "counted", "of_stage", "summary"]


@dataclass(frozen=True)
class Text:
    """A heading and what is said below it, in paragraphs."""

    heading: str
    paragraphs: tuple[str, ...]


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _text(heading: str, *paragraphs: str) -> Text:
    return Text(heading, paragraphs)


def summary(made: Explanation) -> str:
    """What came out, in a sentence."""
    height, width = made.result.labels.shape
    found = counted(len(made.result), "instance") if len(made.result) else "No instances"
    model = made.result.info["model"]
    how = "the default method" if made.method == "sparse" else "the published method (paper)"
    return f"{found} in {width} × {height} pixels, found by {how} with the model '{model}'."


def of_stage(made: Explanation, stage: str) -> Text:
    """What is said about a stage.

    Parameters
    ----------
    made
        The explanation.
    stage
        "image", "channels", "affinity", "graph", "spectrum", "foreground", "candidates", "edges" or "scores".
    """
    return _STAGES[stage](made)


def _image(made: Explanation) -> Text:
    rows, columns = made.grid
    return _text(
        "From the photograph to tokens",
        f"The network sees the photograph as {rows} × {columns} = {rows * columns:,} tokens, squares of "
        f"{made.token_side:.3g} pixels. Of each it gives a key, a query and a value: three lists of "
        f"{len(made.channels[0].entropy)} numbers. All that follows is arithmetic on them.",
    )


def _channels(made: Explanation) -> Text:
    parts = []
    for choice in made.channels:
        quiet, kept = int(choice.quiet.sum()), int(choice.kept.sum())
        parts.append(f"{choice.name}: {len(choice.quiet)} → {quiet}" + (f" → {kept}" if kept != quiet else ""))
    return _text(
        "Channels: which numbers tell objects apart",
        "Each dot is a channel. A high entropy means that its values scatter evenly over the tokens: that is noise. "
        "Noise channel reduction (NCR) keeps the third on the left. Of these, deviation channel reduction (DCR) "
        "keeps those that differ most from token to token, at the top.",
        f"Kept by NCR, then by DCR: {'; '.join(parts)}.",
    )


def _affinity(made: Explanation) -> Text:
    measure = "BoC (Bray-Curtis over Chebyshev)" if made.similarity.weights == "boc" else "the cosine"
    kinds = "keys, queries and values" if len(made.similarity.features) == 3 else "keys"
    first = (
        f"How alike is the marked token to every other? {measure} of the channels kept, {kinds}. Bright is where "
        "the network sees the same kind of thing, wherever that is."
    )
    if made.graph is None:
        return _text(
            "Affinity: what is like what",
            first,
            "The background was set to zero before, and all its tokens are alike. All pairs are joined.",
        )
    return _text(
        "Affinity: what is like what",
        first,
        "The method compares neighbours only, so that an instance is a connected piece of the picture: two like "
        "things apart from each other stay two.",
    )


def _graph(made: Explanation) -> Text:
    if made.graph is None:
        return _text("The graph", "Every token is joined to every other.")
    edges = made.graph.plain.nnz // 2
    assert made.similarity.sharpness is not None
    first = (
        f"{edges:,} edges join each token to its eight neighbours, with the weight exp({made.similarity.sharpness:g} "
        "(similarity − 1)). Bright lines are weak edges: there it is cheap to cut."
    )
    if made.graph.position is None:
        return _text("The graph that is cut", first, "Without directions it is cut as it is.")
    return _text(
        "The graph that is cut",
        first,
        "Arrows show where in its object each token says that it lies: they point from the middle of the object "
        "outwards. Where this position steps back, one object ends and the next begins, and the edge is weakened.",
    )


def _spectrum(made: Explanation) -> Text:
    values, gap = made.spectrum.values, made.spectrum.gap
    if gap is None:
        return _text("Spectrum: the graph's own pieces", "A single token has no spectrum to speak of.")
    first = (
        f"Small eigenvalues of the graph's Laplacian count pieces that hang together loosely. The largest gap among "
        f"the first {len(values)} lies after number {gap}, from {values[gap - 1]:.3g} to {values[gap]:.3g}: by the "
        f"rule of the eigengap there would be {counted(gap, 'piece')}, background included."
    )
    if made.method == "paper":
        second = "Here the count was given, and k-means on these vectors makes the instances."
    else:
        split = " and from what a closer look takes apart" if any(len(c.taken) > 1 for c in made.crops) else ""
        second = (
            f"It is shown to look at: the count of {counted(len(made.result), 'instance')} comes from the merit of "
            f"regions{split}, below. Of an eigenvector, colours show where it is negative and positive: it cuts "
            "between them."
        )
    return _text("Spectrum: the graph's own pieces", first, second)


def _foreground(made: Explanation) -> Text:
    seen = made.foreground
    if seen.fiedler is not None:
        inside = int(seen.share.sum())
        return _text(
            "Foreground: the Fiedler vector",
            "The second eigenvector of the cosine affinity of all tokens divides the picture in two. Where it is "
            "positive is foreground, after small parts are dropped, holes filled and steps smoothed.",
            f"{inside:,} of {seen.share.size:,} tokens are foreground.",
        )
    if seen.contrast is None or seen.least_contrast is None:
        return _text("Foreground", "The foreground was given.")
    first = (
        "What differs from the photograph's border stands out: the border contrast of keys, of queries and of values"
        + (
            ", and an objectness learned from photographs without labels. "
            if any(m.name == "learned" for m in seen.maps)
            else ". "
        )
        + "Each map is smoothed along the graph, then thresholded: not once, but at "
        f"{counted(len(seen.maps[0].thresholds), 'level')}."
    )
    says = "so there is something" if seen.contrast >= seen.least_contrast else "too little for there to be anything"
    if seen.contrast < seen.least_contrast and seen.anything:
        says = "too little, but a count was asked for"
    return _text(
        "Foreground: what stands out",
        first,
        f"Share: how many of the thresholds a token lies above. The largest contrast is {seen.contrast:.2f}, where "
        f"{seen.least_contrast:.2f} is needed: {says}.",
    )


def _candidates(made: Explanation) -> Text:
    regions = made.candidates
    if regions is None:
        return _text(
            "Instances: k-means",
            f"The count was given. k-means on the eigenvectors makes {counted(len(made.masks), 'group')} of the "
            "foreground's tokens.",
        )
    first = (
        f"Every threshold on every map gives a foreground, and each is cut along the weakest edges, at three prices: "
        f"{regions.partitions} partitions. They hold {counted(len(regions), 'different region')}. A region's votes say "
        "how well all partitions agree on it"
        + (
            "; its merit is votes times wholeness, how well the position of its tokens fits one whole object."
            if regions.residuals is not None
            else "; without directions, they are its merit."
        )
    )
    if not len(regions):
        return _text("Candidates, and how many there are", "There is nothing to cut: no candidates, no instances.")
    upper, lower = regions.gap
    if regions.given is not None:
        second = f"Regions are taken by falling merit. {regions.given} were asked for, so no threshold decides."
        if len(made.masks) > regions.count:
            second += f" There were only {regions.count}; they were cut further."
    elif not regions.count:
        second = f"The best merit is {lower:.2f}, below the threshold of {regions.min_merit:g}: no instances."
    else:
        second = (
            f"Taken by falling merit, each mostly free of better ones, as far as the threshold {regions.min_merit:g}: "
            f"{regions.count}. The next would have {lower:.2f}, the last has {upper:.2f}: any threshold in this gap "
            "gives the same count. This is what decides how many instances there are."
        )
        if not regions.enough.all():
            second += f" {int((~regions.enough).sum())} of them lost so much to better ones that they were dropped."
    return _text("Candidates, and how many there are", first, second)


def _edges(made: Explanation) -> Text:
    if made.method == "paper":
        return _text("From tokens to pixels", "The tokens of each instance are enlarged to pixels, as they are.")
    first = (
        "A guided filter moves the edges of the token masks to those of the photograph. "
        "Then each instance that is small enough is looked at once more in a crop of its own (dashed)."
    )
    redrawn = sum(len(crop.taken) == 1 for crop in made.crops)
    split = sum(len(crop.taken) > 1 for crop in made.crops)
    if not made.crops:
        second = "Here none was: there were no instances, or all are large already, or the closer look is off."
    else:
        kept = len(made.crops) - redrawn - split
        second = f"{counted(len(made.crops), 'crop')}: {redrawn} redrawn, {split} split, {kept} as before."
    return _text("Edges: from tokens to pixels, and a closer look", first, second)


def _scores(made: Explanation) -> Text:
    if made.method == "paper":
        return _text(
            "Scores", "The published method has no scores: each instance gets its share of the foreground's tokens."
        )
    best = float(likely_overlap(np.ones(1))[0])
    return _text(
        "Scores, and what they are made of",
        "Merit is votes × wholeness, of what the instance finally holds on the tokens. The score is the overlap "
        "with a true object that such a merit was worth on photographs with true masks; merit 1 is worth "
        f"{best:.2f}.",
        "Where a crop split an instance, the score is the geometric mean of this and of the part's in the crop.",
    )


_STAGES = {
    "image": _image,
    "channels": _channels,
    "affinity": _affinity,
    "graph": _graph,
    "spectrum": _spectrum,
    "foreground": _foreground,
    "candidates": _candidates,
    "edges": _edges,
    "scores": _scores,
}
