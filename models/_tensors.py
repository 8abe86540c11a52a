"""Weights out of files: safetensors through that package, PyTorch's own through PyTorch; no pickle is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .vit import Array, BuildError

PYTORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
"""Files that only PyTorch reads."""

_INDEX = ".index.json"

SUFFIXES = (".safetensors", *PYTORCH_SUFFIXES, _INDEX)
"""What :func:`load_tensors` takes, besides folders."""

SAFETENSORS_IN_FOLDER = ("model.safetensors", f"model.safetensors{_INDEX}")
PYTORCH_IN_FOLDER = ("pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
"""What a folder as the Hugging Face hub keeps it may hold, in one file or several."""

_IN_FOLDER = (*SAFETENSORS_IN_FOLDER, *PYTORCH_IN_FOLDER)
_CONFIG, _PREPROCESSING = "config.json", "preprocessor_config.json"

# Below this version an argument that promises not to execute anything doesn't keep it (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read every tensor of a file of weights.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file; a PyTorch file (``.pth``, ``.pt``, ``.bin``, ``.ckpt``), for which PyTorch must be
        installed and which is read without executing what it holds; the ``.index.json`` of weights in several files;
        or a folder with ``model.safetensors`` or ``pytorch_model.bin``, in one file or several.

    Returns
    -------
    dict of str to ndarray
        By name; floating-point tensors as float32, whole numbers as they are. Dictionaries inside dictionaries are
        joined by dots: the weights under ``teacher`` are called ``teacher.backbone...``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ImportError
        If the package that reads the file isn't installed; the message says which one.
    BuildError
        If the file is empty, cut off or of another format, needs code of its own to be executed, or holds no tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no file of weights at {path}")
    tensors = _sharded(path) if path.name.endswith(_INDEX) else _single(path)
    if not tensors:
        raise BuildError(f"{path} holds no tensors")
    return tensors


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """List the files that :func:`load_tensors` reads for a file: itself, and the parts that an index names.

    Parameters
    ----------
    path : path
        A file of weights, no folder.

    Returns
    -------
    list of pathlib.Path

    Raises
    ------
    BuildError
        If an index can't be read, or names a file that isn't beside it.
    """
    path = Path(path)
    if not path.name.endswith(_INDEX):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_weight_map(path).values())))]


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``config.json``, and the normalisation of ``preprocessor_config.json``, from the folder of the weights.

    Parameters
    ----------
    path : path
        The file of weights, or its folder.

    Returns
    -------
    dict
        As in ``config.json`` of transformers or timm, with ``image_mean`` and ``image_std`` of the other file added;
        empty where neither file is there.

    Raises
    ------
    BuildError
        If one of them is there and can't be read.
    """
    config: dict[str, Any] = {}
    for file in config_files(path):
        content = _json_object(file)
        if file.name == _PREPROCESSING:
            content = {name: content[name] for name in ("image_mean", "image_std") if name in content}
        config |= content
    return config


def config_files(path: str | os.PathLike[str]) -> list[Path]:
    """List the files that :func:`load_config` reads, as far as they are there.

    Parameters
    ----------
    path : path
        The file of weights, or its folder.

    Returns
    -------
    list of pathlib.Path
    """
    folder = Path(path)
    folder = folder if folder.is_dir() else folder.parent
    return [folder / name for name in (_CONFIG, _PREPROCESSING) if (folder / name).exists()]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BuildError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise BuildError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _in_folder(folder: Path) -> Path:
    for name in _IN_FOLDER:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"none of {', '.join(_IN_FOLDER)} in {folder}: give the file of weights itself")


def _single(path: Path) -> dict[str, Array]:
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise BuildError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise BuildError(f"{path} is a pointer of Git LFS and not the weights: run 'git lfs pull' there")
    if path.suffix.lower() == ".safetensors":
        return _safetensors(path)
    if path.suffix.lower() in PYTORCH_SUFFIXES:
        return _pytorch(path)
    raise BuildError(
        f"{path}: weights are read from {', '.join(SUFFIXES)}; {path.suffix or 'no suffix'} is none of them"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Read which tensor is in which file; the files are there, beside the index."""
    parts = _json_object(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise BuildError(f"{index} has no 'weight_map' that says which tensor is in which file")
    for name in sorted(set(parts.values())):
        # A file name with a folder in it could point anywhere.
        if Path(name).name != name or name in ("", ".", ".."):
            raise BuildError(f"{index} names the file {name!r}: the parts must lie beside it")
        if not (index.parent / name).exists():
            raise BuildError(f"{index} names {name}, which isn't beside it: the weights are incomplete")
    return parts


def _sharded(index: Path) -> dict[str, Array]:
    parts = _weight_map(index)
    tensors: dict[str, Array] = {}
    for name in sorted(set(parts.values())):
        tensors |= _single(index.parent / name)
    missing = sorted(set(parts) - set(tensors))
    if missing:
        raise BuildError(f"{index} promises {len(missing)} tensors that its files don't hold: {', '.join(missing[:5])}")
    return tensors


# Safetensors


def _safetensors(path: Path) -> dict[str, Array]:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "reading .safetensors needs the package safetensors: pip install 'sparsespec[build]'"
        ) from error
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: _safetensor(path, file, name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise BuildError(f"{path} can't be read as safetensors, cut off or something else: {error}") from error


def _safetensor(path: Path, file: Any, name: str) -> Array:
    part = file.get_slice(name)
    kind = part.get_dtype()
    if kind == "BF16":
        # NumPy has no such type: its 16 bits are the upper ones of a float32.
        return _float32_of_bfloat16(_raw_bytes(path, name)).reshape(part.get_shape())
    if kind not in ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"):
        raise BuildError(f"{path} keeps {name} as {kind}, which isn't read: save it as float32, float16 or bfloat16")
    return _readable(file.get_tensor(name))


def _raw_bytes(path: Path, name: str) -> bytes:
    """Read the bytes of one tensor; the package has checked the header by now."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        return file.read(end - start)


def _float32_of_bfloat16(content: bytes) -> Array:
    return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)


def _readable(tensor: Array) -> Array:
    return tensor.astype(np.float32, copy=False) if np.issubdtype(tensor.dtype, np.floating) else tensor


# PyTorch


def _pytorch(path: Path) -> dict[str, Array]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs PyTorch 2.6 or later (pip install torch); the same weights as .safetensors, "
            "which the Hugging Face hub has of most models, are read without it"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE_TORCH:
        raise ImportError(
            f"PyTorch {torch.__version__} can be made to execute code by a file of weights: reading {path.name} needs "
            "2.6 or later (pip install --upgrade torch), or take the weights as .safetensors"
        )
    import argparse

    try:
        # Checkpoints of the original repositories keep their command line beside the weights: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can end in any exception.
    except Exception as error:
        # Its first sentence: what follows may be the advice to have the file's code executed.
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        raise BuildError(
            f"{path} can't be read: it is cut off, isn't a PyTorch file, or holds code or objects besides tensors, "
            f"which are not executed. Save its state dict alone, best as .safetensors. PyTorch says: {reason}"
        ) from error
    if not isinstance(content, Mapping):
        raise BuildError(f"{path} holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    tensors = {}
    for name, tensor in _flat(content, torch.Tensor):
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise BuildError(f"{path} keeps {name} in a quantised or sparse form, which isn't read: save it as float32")
        tensors[name] = tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype).numpy()
    return tensors


def _flat(content: Mapping[Any, Any], tensor: type) -> Iterator[tuple[str, Any]]:
    """Walk through dictionaries inside dictionaries; what is no tensor is passed over."""
    for name, value in content.items():
        if isinstance(value, tensor):
            yield str(name), value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", found) for inner, found in _flat(value, tensor))
