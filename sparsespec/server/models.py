"""Which models a server has, and how it segments with them; small enough to be sent to worker processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sparsespec.pipeline import Segmentation

__all__ = ["Model", "OpenModel", "ServedModel"]

_MOST_KEPT = 32


class OpenModel(Protocol):
    """A model in the process that works with it."""

    def __call__(
        self, image: Any, /, *, n_instances: int | None, long_side: int | None, eigenvectors: int
    ) -> Segmentation:
        """Segment an (H, W, 3) array; None leaves a choice to the model."""
        ...


class ServedModel(Protocol):
    """A model that can be sent to another process and opened there."""

    def opened(self, threads: int) -> OpenModel:
        """Open it, warmed up, for one image at a time with so many threads."""
        ...


@dataclass(frozen=True)
class Model:
    """A model and how it is to be used: what :class:`sparsespec.Segmenter` is made of.

    Attributes
    ----------
    model : str
        A registry name, or the path of an .onnx file.
    options : mapping
        Further arguments of :class:`sparsespec.Segmenter`, ``threads`` excepted.
    """

    model: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)

    def opened(self, threads: int) -> OpenModel:
        """Open it, warmed up, for one image at a time with so many threads.

        Raises
        ------
        ValueError, ImportError, OSError
            As :class:`sparsespec.Segmenter`.
        """
        from sparsespec.backbone import Backbone
        from sparsespec.pipeline import Segmenter

        options = dict(self.options)
        running = {name: options.pop(name) for name in ("provider", "provider_options") if name in options}
        network = Backbone(self.model, threads=threads, concurrency=1, **running)
        usual = Segmenter(network, **options)
        usual.warm_up()

        @lru_cache(maxsize=_MOST_KEPT)
        def segmenter(n_instances: int | None, long_side: int | None) -> Callable[..., Segmentation]:
            changed: dict[str, Any] = {}
            if n_instances is not None:
                changed["n_instances"] = n_instances
            if long_side is not None:
                # One of three ways to say how large the network's input is.
                changed |= {"scale": None, "megapixels": None, "long_side": long_side}
            return Segmenter(network, **{**options, **changed}) if changed else usual

        def segment(
            image: Any, /, *, n_instances: int | None, long_side: int | None, eigenvectors: int
        ) -> Segmentation:
            return segmenter(n_instances, long_side)(image, eigenvectors=eigenvectors)

        return segment
