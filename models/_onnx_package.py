"""The onnx package, which an extra brings."""

from __future__ import annotations

from typing import Any


def require_onnx() -> Any:
    """Import the onnx package.

    Returns
    -------
    module

    Raises
    ------
    ImportError
        When it is missing; the message names the extra.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "reading and building models needs the onnx package: pip install 'sparsespec[build]' (or pip install onnx)"
        ) from error
    return onnx
