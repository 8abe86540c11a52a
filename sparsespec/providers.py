"""Execution providers: what runs the network, under names people use, and what to install for each.

ONNX Runtime comes as several distributions, ``onnxruntime``, ``onnxruntime-gpu``, ``onnxruntime-directml`` and others.
All install files under the one import name ``onnxruntime``. Two of them in one environment overwrite each
other's files; :func:`runtime_conflict` recognises that. OpenVINO is used through its own package.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AUTO",
    "GRAPH_PRECISION",
    "PROVIDERS",
    "Choice",
    "Provider",
    "ProviderError",
    "available_providers",
    "choose",
    "find_provider",
    "installed_runtimes",
    "missing_message",
    "runtime_conflict",
]

AUTO = "auto"
"""Takes the best provider that is there and starts."""
GRAPH_PRECISION = "graph_precision"
"""The one option that is ours: ``file`` runs the graph as it stands in the file, ``float32`` or ``float16`` one made
from it in memory."""
_GRAPH_PRECISIONS = ("file", "float32", "float16")
_SUFFIX = "ExecutionProvider"


class ProviderError(RuntimeError):
    """An execution provider was asked for and isn't there, or didn't start, or wasn't used."""


@dataclass(frozen=True)
class Provider:
    """What can run the network.

    Attributes
    ----------
    name : str
        As people write it, such as ``cuda``.
    execution_provider : str
        As ONNX Runtime calls it, such as ``CUDAExecutionProvider``.
    install : str or None
        What ``pip install`` has to be given for it; None where no package on the index has it.
    precision : str or None
        What an 8-bit model is turned into for it, ``float16`` or ``float32``; None where it runs well as it is.
    systems : tuple of str
        Values of ``sys.platform`` it exists for; empty for all.
    remark : str
        What else it needs.
    """

    name: str
    execution_provider: str
    install: str | None = None
    precision: str | None = "float32"
    systems: tuple[str, ...] = ()
    remark: str = ""

    @property
    def distribution(self) -> str | None:
        """Name of the distribution in ``install``, without its extras."""
        return None if self.install is None else re.split(r"[\[<>=]", self.install, maxsplit=1)[0]


_LINUX, _WINDOWS, _MAC = ("linux",), ("win32",), ("darwin",)
_CUDA_WHEEL = "onnxruntime-gpu[cuda,cudnn]"
CPU = Provider("cpu", "CPUExecutionProvider", "onnxruntime", precision=None)
OPENVINO = Provider(
    "openvino",
    "OpenVINOExecutionProvider",
    "openvino",
    "float32",
    remark="Intel and other x86-64 processors, Intel GPUs and NPUs; AMX and AVX512-BF16 are used where they are",
)

PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        CPU,
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            _CUDA_WHEEL,
            "float16",
            (*_LINUX, *_WINDOWS),
            "an NVIDIA GPU with its driver, CUDA and cuDNN",
        ),
        Provider(
            "tensorrt",
            "TensorrtExecutionProvider",
            _CUDA_WHEEL,
            "float16",
            (*_LINUX, *_WINDOWS),
            "what cuda needs and TensorRT's libraries; it builds an engine for each size of image, which takes long",
        ),
        OPENVINO,
        Provider("directml", "DmlExecutionProvider", "onnxruntime-directml", "float16", _WINDOWS, "a DirectX 12 GPU"),
        Provider("coreml", "CoreMLExecutionProvider", "onnxruntime", "float16", _MAC),
        Provider(
            "migraphx", "MIGraphXExecutionProvider", "onnxruntime-migraphx", "float16", _LINUX, "an AMD GPU, ROCm"
        ),
        Provider(
            "rocm",
            "ROCMExecutionProvider",
            "onnxruntime-rocm",
            "float16",
            _LINUX,
            "an AMD GPU, ROCm; newer versions of ONNX Runtime have migraphx in its place",
        ),
        # From version 2 on that package is a plug-in beside ONNX Runtime, to be registered by the application.
        Provider("qnn", "QNNExecutionProvider", "onnxruntime-qnn<2", "float16", remark="a Qualcomm NPU"),
        Provider("webgpu", "WebGpuExecutionProvider", "onnxruntime-webgpu", "float16"),
        Provider("cann", "CANNExecutionProvider", "onnxruntime-cann", "float16", _LINUX, "a Huawei Ascend NPU"),
        Provider("xnnpack", "XnnpackExecutionProvider"),
        Provider("dnnl", "DnnlExecutionProvider"),
        Provider("acl", "ACLExecutionProvider"),
        Provider("vitisai", "VitisAIExecutionProvider"),
        Provider("tensorrt-rtx", "NvTensorRTRTXExecutionProvider", precision="float16"),
    )
}
"""Every provider known by name."""

_ALIASES = {"dml": "directml", "gpu": "cuda", "trt": "tensorrt", "core-ml": "coreml", "mps": "coreml"}

# Distributions that install files under the import name "onnxruntime"; the first is the one sparsespec requires.
_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-qnn",
    "onnxruntime-webgpu",
    "onnxruntime-cann",
    "onnxruntime-vitisai",
    "onnxruntime-training",
    "onnxruntime-silicon",
    "onnxruntime-azure",
    "ort-nightly",
    "ort-nightly-gpu",
    "ort-nightly-directml",
)


@dataclass(frozen=True)
class Choice:
    """A provider and its options, checked; hashable, and cheap to send to other processes.

    Attributes
    ----------
    name : str
        ``auto`` or the name of a provider.
    options : tuple of (str, str)
        For the provider, without ours.
    graph_precision : str or None
        ``file``, ``float32`` or ``float16``; None leaves it to the provider.
    """

    name: str = AUTO
    options: tuple[tuple[str, str], ...] = ()
    graph_precision: str | None = None


def find_provider(name: str) -> Provider:
    """Look up a provider.

    Parameters
    ----------
    name : str
        Such as ``cuda``, in any case, or ONNX Runtime's own name such as ``CUDAExecutionProvider``, also of one that
        isn't listed here.

    Returns
    -------
    Provider

    Raises
    ------
    ValueError
        When there is none of that name.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"provider must be {AUTO!r} or one of {', '.join(PROVIDERS)}, not {name!r}")
    wanted = name.strip()
    key = wanted.lower().replace("_", "-")
    key = _ALIASES.get(key, key)
    if key in PROVIDERS:
        return PROVIDERS[key]
    for provider in PROVIDERS.values():
        if provider.execution_provider.lower() == key:
            return provider
    if wanted.endswith(_SUFFIX) and len(wanted) > len(_SUFFIX):
        return Provider(wanted, wanted)
    raise ValueError(
        f"unknown provider {name!r}; there are {AUTO}, {', '.join(PROVIDERS)}, and ONNX Runtime's own names, which end"
        f" in {_SUFFIX}"
    )


def choose(provider: str = AUTO, options: Mapping[str, Any] | None = None) -> Choice:
    """Check a provider's name and options.

    Parameters
    ----------
    provider : str, default "auto"
        See :func:`find_provider`.
    options : mapping of str to str, int, float or bool, optional
        Handed to the provider as text, such as ``device_id``; beside them ``graph_precision``, which is ours.

    Returns
    -------
    Choice

    Raises
    ------
    ValueError
        On an unknown name, an option that isn't text or a number, and options for ``auto`` or for the CPU, which has
        none.
    """
    automatic = isinstance(provider, str) and provider.strip().lower() == AUTO
    name = AUTO if automatic else find_provider(provider).name
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"provider_options must be a mapping of names to values, not {options!r}")
    texts: dict[str, str] = {}
    for key, value in (options or {}).items():
        if not isinstance(key, str) or not key.strip():
            raise ValueError(f"provider_options must have names such as 'device_id' for keys, not {key!r}")
        if isinstance(value, bool):
            texts[key.strip()] = "1" if value else "0"
        elif isinstance(value, (str, int, float)):
            texts[key.strip()] = str(value)
        else:
            raise ValueError(f"provider_options[{key!r}] must be text or a number, not {value!r}")
    precision = texts.pop(GRAPH_PRECISION, None)
    if precision is not None and precision not in _GRAPH_PRECISIONS:
        raise ValueError(
            f"provider_options[{GRAPH_PRECISION!r}] must be one of {', '.join(_GRAPH_PRECISIONS)}, not {precision!r}"
        )
    if texts and name in (AUTO, CPU.name):
        reason = "they are for one provider, name it" if name == AUTO else "it has none"
        raise ValueError(f"provider_options {', '.join(texts)} can't be given with the provider {name!r}: {reason}")
    return Choice(name, tuple(texts.items()), precision)


def available_providers(execution_providers: list[str]) -> list[str]:
    """Give the names of ONNX Runtime's providers as people write them, and add OpenVINO when its package is there."""
    names = {provider.execution_provider: name for name, provider in PROVIDERS.items()}
    found = [names.get(each, each) for each in execution_providers if each != "AzureExecutionProvider"]
    if OPENVINO.name not in found and _version("openvino") is not None:
        found.append(OPENVINO.name)
    return found


def installed_runtimes() -> dict[str, str]:
    """List the installed distributions that provide the module ``onnxruntime``, with their versions.

    Returns
    -------
    dict of str to str
        More than one is a broken installation, see :func:`runtime_conflict`.
    """
    found = {}
    for name in _RUNTIMES:
        version = _version(name)
        if version is not None and _owns_the_module(name):
            found[name] = version
    return found


def runtime_conflict() -> str | None:
    """Say what is wrong when several distributions of ONNX Runtime are installed, and which commands repair it.

    Returns
    -------
    str or None
        One line; None when there is no conflict.
    """
    installed = installed_runtimes()
    if len(installed) < 2:
        return None
    listed = " and ".join(f"{name} {version}" for name, version in installed.items())
    keep = max(installed, key=lambda name: name != "onnxruntime")
    return (
        f"{listed} are both installed, and the files of one have overwritten those of the other; keep one: "
        f"{_swap(keep, installed)}"
    )


def missing_message(provider: Provider, execution_providers: list[str]) -> str:
    """Say that a provider isn't there, what is, and what to install.

    Parameters
    ----------
    provider : Provider
        The one asked for.
    execution_providers : list of str
        Those that the installed ONNX Runtime has, by its own names.

    Returns
    -------
    str
        One line.
    """
    there = ", ".join(available_providers(execution_providers))
    shown = provider.name if provider.name == provider.execution_provider else (
        f"{provider.name} ({provider.execution_provider})"
    )  # fmt: skip
    start = f"the provider {shown} isn't available here; available are {there}. "
    if provider.systems and sys.platform not in provider.systems:
        systems = {"linux": "Linux", "win32": "Windows", "darwin": "macOS"}
        return f"{start}It exists on {' and '.join(systems[each] for each in provider.systems)} only"
    needs = f"; it needs {provider.remark}" if provider.remark else ""
    if provider.install is None or provider.distribution is None:
        return f"{start}No package of the Python index has it: build ONNX Runtime with it, or take another{needs}"
    if provider is OPENVINO:
        return f"{start}Install it with: pip install 'sparsespec[openvino]'"
    installed = installed_runtimes()
    if provider.distribution in installed:
        conflict = runtime_conflict()
        if conflict is not None:
            return f"{start}{conflict[0].upper()}{conflict[1:]}"
        version = installed[provider.distribution]
        return (
            f"{start}{provider.distribution} {version} is installed, but this build of it lacks {provider.name}{needs}"
        )
    return f"{start}Install it with: {_swap(provider.install, installed)}{needs}"


def _swap(keep: str, installed: Mapping[str, str]) -> str:
    """Write down the commands that leave one distribution: all are removed first, since they share their files."""
    wanted = next((p.install for p in PROVIDERS.values() if p.distribution == keep and p.install), keep)
    quoted = f"'{wanted}'" if re.search(r"[\[<>]", wanted) else wanted
    remove = f"pip uninstall -y {' '.join(installed)} && " if installed else ""
    return f"{remove}pip install {quoted}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _owns_the_module(name: str) -> bool:
    """Tell whether a distribution has files in the folder ``onnxruntime``; newer ones can be plug-ins beside it."""
    try:
        files = importlib.metadata.files(name)
    except (OSError, importlib.metadata.PackageNotFoundError):
        return True
    return files is None or any(file.as_posix() == "onnxruntime/__init__.py" for file in files)
