"""What is true of an image: its instances, and the pixels about which nothing is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TrueInstances:
    """The true instances of one image.

    Attributes
    ----------
    masks
        (n, H, W) bool; they may overlap, and one may be empty.
    crowd
        (n,) bool: regions that hold objects nobody counted (``iscrowd`` of COCO). They need not be found, and a
        prediction that lies in one is not wrong.
    void
        (H, W) bool, pixels that nobody judged, such as the rims of Pascal VOC; None where there are none. They count
        neither for nor against a prediction.
    """

    masks: BoolArray
    crowd: BoolArray
    void: BoolArray | None = None

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or self.masks.dtype != bool:
            raise ValueError(f"masks must be an (n, H, W) bool array, not {self.masks.shape} of {self.masks.dtype}")
        if self.crowd.shape != self.masks.shape[:1] or self.crowd.dtype != bool:
            raise ValueError(f"crowd must hold one bool for each of {len(self.masks)} masks, not {self.crowd.shape}")
        if self.void is not None and (self.void.shape != self.masks.shape[1:] or self.void.dtype != bool):
            raise ValueError(f"void must be a bool array of shape {self.masks.shape[1:]}, not {self.void.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        height, width = self.masks.shape[1:]
        return height, width

    def __len__(self) -> int:
        """Instances that count: those that are no crowd."""
        return int(np.count_nonzero(~self.crowd))

    @classmethod
    def from_labels(cls, labels: npt.NDArray[np.integer], void: BoolArray | None = None) -> TrueInstances:
        """From an (H, W) label image: 0 is background, every other value one instance, in ascending order."""
        labels = np.asarray(labels)
        if labels.ndim != 2 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
            raise ValueError(f"labels must be an (H, W) array of whole numbers, not {labels.shape} of {labels.dtype}")
        values = np.unique(labels)
        values = values[values != 0]
        return cls(labels == values[:, None, None], np.zeros(len(values), bool), void)


@dataclass(frozen=True)
class Example:
    """One image of a data set and how to get at what is true of it.

    Attributes
    ----------
    name
        What the image is called in reports and in the output of a run: its path below the data set's image folder,
        without suffix, with forward slashes.
    image
        The image file.
    load
        Reads the truth; called when it is needed, so that a large set takes no memory.
    """

    name: str
    image: Path
    load: Callable[[], TrueInstances]


@dataclass(frozen=True)
class Dataset:
    """Images with truth, in a fixed order.

    Attributes
    ----------
    name
        Of the set, for tables.
    examples
        Images that have a truth, by name.
    without_truth, without_image
        Names of images that nothing is said about, and of truths whose image isn't there: listed, never left out in
        silence.
    """

    name: str
    examples: Sequence[Example]
    without_truth: Sequence[str] = field(default_factory=tuple)
    without_image: Sequence[str] = field(default_factory=tuple)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)
