"""A vision transformer out of its state dict, under the names of facebookresearch, timm or transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsespec.position_table import PositionRule

from ._tensors import load_config, load_tensors
from .vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Array,
    Attention,
    Block,
    BuildError,
    FeedForward,
    Linear,
    Norm,
    Rest,
    UnrecognisedModelError,
    Vit,
    float32,
)

__all__ = ["load_config", "load_tensors", "read_weights"]

# A state dict says by its names alone what is what. Every name is brought to ours, part by part; a part that has no
# name here is an error, for it would do something in the model that we'd leave out.
_ORIGINAL = {
    "patch_embed.proj": "patch",
    "cls_token": "class",
    "pos_embed": "positions",
    "register_tokens": "registers",
    "reg_token": "registers",
}
_ORIGINAL_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "ls1.gamma": "scale1",
    "norm2": "norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "mlp.w12": "gate_values",
    "mlp.w3": "fc2",
    "ls2.gamma": "scale2",
}
_TRANSFORMERS = {
    "embeddings.patch_embeddings.projection": "patch",
    "embeddings.cls_token": "class",
    "embeddings.position_embeddings": "positions",
    "embeddings.register_tokens": "registers",
}
_TRANSFORMERS_BLOCK = {
    "layernorm_before": "norm1",
    "norm1": "norm1",
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "attention.q_proj": "query",
    "attention.k_proj": "key",
    "attention.v_proj": "value",
    "attention.output.dense": "out",
    "attention.o_proj": "out",
    "layer_scale1.lambda1": "scale1",
    "layernorm_after": "norm2",
    "norm2": "norm2",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "mlp.weights_in": "gate_values",
    "mlp.weights_out": "fc2",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "values",
    "mlp.down_proj": "fc2",
    "layer_scale2.lambda1": "scale2",
}


@dataclass(frozen=True)
class _Names:
    """How a family calls its parts."""

    family: str
    outside: Mapping[str, str]
    block: re.Pattern[str]
    inside: Mapping[str, str]
    unused: re.Pattern[str]

    @property
    def anchor(self) -> str:
        """Name of the one part that a state dict is recognised by."""
        return f"{next(iter(self.outside))}.weight"


_ORIGINAL_NAMES = _Names(
    "facebookresearch, timm",
    _ORIGINAL,
    # DINOv2 can keep its blocks in chunks: blocks.<chunk>.<block>., counted through.
    re.compile(r"blocks\.(?:\d+\.)?(\d+)\.(.+)"),
    _ORIGINAL_BLOCK,
    re.compile(r"(norm|fc_norm|head|dino_head|ibot_head)\.|mask_token$"),
)
_TRANSFORMERS_NAMES = _Names(
    "transformers",
    _TRANSFORMERS,
    re.compile(r"(?:encoder\.layer|encoder\.layers|layers|layer)\.(\d+)\.(.+)"),
    _TRANSFORMERS_BLOCK,
    re.compile(r"(layernorm|pooler|classifier|head)\.|embeddings\.mask_token$"),
)
_FAMILIES = (_ORIGINAL_NAMES, _TRANSFORMERS_NAMES)

# Widths at which every model in use has heads of 64 channels; wider ones differ.
_USUAL_HEAD = 64
_WIDEST_USUAL = 1024
_GIANT = 1536

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass
class _Parts:
    """A state dict under our names: ``patch.weight`` outside the blocks, ``fc1.bias`` in one."""

    names: _Names
    prefix: str
    outside: dict[str, Array] = field(default_factory=dict)
    blocks: dict[int, dict[str, Array]] = field(default_factory=dict)
    called: dict[str, str] = field(default_factory=dict)
    """What the state dict calls our names, behind the prefix or the start of the block."""
    starts: dict[int, str] = field(default_factory=dict)
    """What stands before the names of each block."""
    unknown: list[str] = field(default_factory=list)
    is_timm: bool = False


def read_weights(
    tensors: Mapping[str, Array],
    *,
    config: Mapping[str, Any] | None = None,
    heads: int | None = None,
    rule: PositionRule | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Vit:
    """Find a vision transformer in a state dict.

    The names of facebookresearch's DINO and DINOv2 (with registers, with SwiGLU, with its blocks in chunks), of timm,
    and of transformers' ViT, Dinov2 and Dinov2WithRegisters (as saved and as in memory) are known, under any prefix
    such as ``module.``, ``backbone.`` or ``vit.``; of a student and a teacher the teacher is read. Heads for training
    and classification are left aside, every other name that isn't known is an error.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        As :func:`load_tensors` returns them.
    config : mapping, optional
        ``config.json`` of transformers or timm, as :func:`load_config` returns it. It says the number of heads, the
        epsilon of the layer norms, the activation, the grid of a position table that isn't square, and the
        normalisation of the image.
    heads : int, optional
        Attention heads, which no tensor says. Left out, the number is taken from ``config``, and without it there are
        D / 64, as in all of DINO and DINOv2; where D is no multiple of 64, or greater than 1024 and not 1536, it must
        be said.
    rule : PositionRule, optional
        How the position table is brought to other grids. Left out, it follows the code that the names come from:
        offset 0.1 for DINO and for DINOv2 without registers by facebookresearch, antialiasing for its DINOv2 with
        registers, neither for transformers' models without registers, antialiasing for those with them and for timm.
        Two pairs can be told apart only by ``config``, in which timm says ``"architecture"``: DINO by facebookresearch
        has the names of timm without layer scale and is assumed, and DINOv2 by facebookresearch whose mask token was
        left out those of timm with layer scale, which is assumed.
    mean, std : (float, float, float), optional
        Normalisation of RGB in [0, 1]. Left out, that of ``config``, and ImageNet's without it.

    Returns
    -------
    Vit
        Layer scales multiplied into the layers before them.

    Raises
    ------
    UnrecognisedModelError
        If these aren't the weights of such a transformer, or it has parts that would be left out.
    BuildError
        If tensors are missing or of a wrong shape, a number isn't finite, or ``heads`` doesn't fit.
    """
    config = config or {}
    parts = _sort_out(tensors, config)
    _refuse_incomplete(parts)
    patch = parts.outside["patch.weight"]
    if patch.ndim != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3] or not patch.size:
        raise UnrecognisedModelError(
            f"{_called(parts, 'patch.weight')} has the shape {patch.shape}: a patch embedding of square patches of an "
            "RGB image, (channels, 3, side, side), is wanted"
        )
    width = patch.shape[0]
    _refuse_wrong_shapes(parts, width)
    _refuse_other_config(parts, config, width)
    prefix, positions = _tokens(parts, width, _grid_in(config, patch.shape[-1]))
    epsilon = _epsilon(parts, config)
    activation = _activation(parts, config)
    return Vit(
        patch=Linear(float32(patch), float32(parts.outside["patch.bias"])),
        prefix=prefix,
        positions=positions,
        rule=_family_rule(parts) if rule is None else rule,
        heads=_heads(heads, config, width),
        blocks=tuple(_block(parts.blocks[i], epsilon, activation) for i in range(len(parts.blocks))),
        mean=_triple(mean, config, "mean", IMAGENET_MEAN),
        std=_triple(std, config, "std", IMAGENET_STD),
    )


# Names


def _sort_out(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> _Parts:
    names, prefix = _anchor(tensors)
    parts = _Parts(names, prefix)
    for name in tensors:
        if not name.startswith(prefix):
            continue
        rest = name[len(prefix) :]
        in_block = names.block.fullmatch(rest)
        if in_block:
            number, rest = int(in_block[1]), in_block[2]
            ours = _translated(rest, names.inside)
            if ours and ours not in parts.blocks.setdefault(number, {}):
                parts.blocks[number][ours] = tensors[name]
                parts.called.setdefault(ours, rest)
                parts.starts[number] = name[: len(name) - len(rest)]
                continue
        elif ours := _translated(rest, names.outside):
            if ours not in parts.outside:
                parts.outside[ours] = tensors[name]
                parts.called[ours] = rest
                continue
        elif names.unused.match(rest):
            continue
        parts.unknown.append(name)
    if names is _ORIGINAL_NAMES:
        # Both repositories of facebookresearch keep a position for the class token, and DINOv2 a mask token.
        parts.is_timm = (
            "architecture" in config
            or prefix + "reg_token" in tensors
            or _lacks_class_position(parts)
            or (any("scale1" in block for block in parts.blocks.values()) and prefix + "mask_token" not in tensors)
        )
    return parts


def _anchor(tensors: Mapping[str, Array]) -> tuple[_Names, str]:
    """Find the patch embedding; what stands before its name stands before all others."""
    found = [
        (names, name.removesuffix(names.anchor))
        for names in _FAMILIES
        for name in tensors
        if name.endswith(names.anchor) and (name == names.anchor or name[-len(names.anchor) - 1] == ".")
    ]
    if len(found) > 1:
        # DINO teaches a student and keeps the teacher, which is the better of the two.
        found = [(names, prefix) for names, prefix in found if "teacher" in prefix] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise UnrecognisedModelError(
            "there are several vision transformers, under "
            f"{', '.join(repr(prefix) for _, prefix in found)}: keep the tensors of one of them"
        )
    wanted = " nor ".join(f"{names.anchor} ({names.family})" for names in _FAMILIES)
    rotary = any("rope" in name or name.endswith("embeddings.patch_embeddings.weight") for name in tensors)
    raise UnrecognisedModelError(
        f"no patch embedding found, so this isn't a vision transformer that is known here: there is neither {wanted} "
        f"among {len(tensors)} tensors ({_some(tensors)}){_NO_ROTARY if rotary else ''}"
    )


def _translated(name: str, table: Mapping[str, str]) -> str | None:
    """Bring a name to ours: by itself, or with ``weight`` or ``bias`` behind it."""
    if name in table:
        return table[name]
    stem, _, last = name.rpartition(".")
    return f"{table[stem]}.{last}" if stem in table and last in ("weight", "bias") else None


def _called(parts: _Parts, ours: str, block: int | None = None) -> str:
    """Name of a part in the state dict, or what it should have been."""
    table = parts.names.outside if block is None else parts.names.inside
    part, _, last = ours.partition(".")
    usual = next(name for name, own in table.items() if own == part) + (f".{last}" if last else "")
    return (parts.prefix if block is None else parts.starts[block]) + parts.called.get(ours, usual)


def _some(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


# Completeness

_NO_ROTARY = ". Models that tell positions by rotation (RoPE), such as DINOv3, aren't supported; DINO and DINOv2 are"


def _refuse_incomplete(parts: _Parts) -> None:
    if "positions" not in parts.outside:
        raise UnrecognisedModelError(f"no position table found: there is no {_called(parts, 'positions')}{_NO_ROTARY}")
    if not parts.blocks:
        usual = "blocks.0." if parts.names is _ORIGINAL_NAMES else "encoder.layer.0."
        raise UnrecognisedModelError(
            f"no blocks found: there is {_called(parts, 'patch.weight')}, but nothing like {parts.prefix}{usual}"
        )
    if parts.unknown:
        norms = any(re.search(r"\.(q_norm|k_norm)\.", name) for name in parts.unknown)
        hint = " (normalised queries and keys aren't supported)" if norms else ""
        raise UnrecognisedModelError(
            f"the state dict holds tensors that belong to no part of a vision transformer known here{hint}: "
            f"{_some(parts.unknown)}; save it without them"
        )
    gap = next(number for number in range(len(parts.blocks) + 1) if number not in parts.blocks)
    if gap < len(parts.blocks):
        raise BuildError(
            f"the state dict is incomplete: block {gap} is missing, though there are {len(parts.blocks)} others, "
            f"up to {max(parts.blocks)}"
        )
    wanted = ["patch.bias"]
    if "class" not in parts.outside and _is_square(_rows(parts, "positions") - 1):
        # A position without a token.
        wanted.append("class")
    missing = [_called(parts, name) for name in wanted if name not in parts.outside]
    in_block = _wanted_parts(parts)
    for number, block in sorted(parts.blocks.items()):
        missing += [_called(parts, name, number) for name in in_block if name not in block]
    if missing:
        raise BuildError(f"the state dict is incomplete, these tensors are missing: {_some(missing)}")


def _wanted_parts(parts: _Parts) -> list[str]:
    """Say what each block must hold: what a block can't do without, and what any other block has."""
    present = list(dict.fromkeys(name for block in parts.blocks.values() for name in block))
    wanted = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "out.weight", "fc2.weight"]
    fused = parts.names is _ORIGINAL_NAMES
    wanted += ["qkv.weight"] if fused else ["query.weight", "key.weight", "value.weight"]
    if "gate_values.weight" in present:
        wanted += ["gate_values.weight"]
    elif "gate.weight" in present or "values.weight" in present:
        wanted += ["gate.weight", "values.weight"]
    else:
        wanted += ["fc1.weight"]
    return wanted + [name for name in present if name not in wanted]


def _refuse_wrong_shapes(parts: _Parts, width: int) -> None:
    wrong = []

    def check(name: str, tensor: Array, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected:
            wrong.append(f"{name} has the shape {tensor.shape} instead of {expected}")
        elif tensor.dtype.kind != "f":
            raise BuildError(f"{name} is kept as {tensor.dtype}: save the weights as float32, float16 or bfloat16")
        elif not np.isfinite(tensor).all():
            raise BuildError(f"{name} holds numbers that aren't finite: the file is damaged or was saved too coarsely")

    for name, tensor in parts.outside.items():
        check(_called(parts, name), tensor, (width,) if name == "patch.bias" else tensor.shape)
    for number, block in parts.blocks.items():
        fc2 = block["fc2.weight"]
        hidden = fc2.shape[1] if fc2.ndim == 2 else 0
        # timm packs gate and values into what it calls fc1.
        fc1 = 2 * hidden if _is_packed(parts, block) else hidden
        outputs = {"qkv": 3 * width, "gate_values": 2 * hidden, "fc1": fc1, "gate": hidden, "values": hidden}
        for name, tensor in block.items():
            part, _, last = name.partition(".")
            rows = outputs.get(part, width)
            is_matrix = last == "weight" and not part.startswith("norm")
            columns = hidden if part == "fc2" else width
            check(_called(parts, name, number), tensor, (rows, columns) if is_matrix else (rows,))
    if wrong:
        raise BuildError(f"tensors don't fit the width of {width}: {'; '.join(wrong[:3])}")


def _is_packed(parts: _Parts, block: Mapping[str, Array]) -> bool:
    if not parts.is_timm or "fc1.weight" not in block:
        return False
    return block["fc1.weight"].ndim == 2 and len(block["fc1.weight"]) == 2 * block["fc2.weight"].shape[-1]


def _refuse_other_config(parts: _Parts, config: Mapping[str, Any], width: int) -> None:
    counts = {
        "hidden_size": width,
        "num_hidden_layers": len(parts.blocks),
        "num_register_tokens": _rows(parts, "registers"),
    }
    for name, there in counts.items():
        if isinstance(config.get(name), int) and config[name] != there:
            raise BuildError(f"config.json says {name} = {config[name]}, but the weights have {there}: not its weights")


# Tokens


def _rows(parts: _Parts, name: str) -> int:
    """Count the tokens or positions of a part; 0 where there is none."""
    tensor = parts.outside.get(name)
    return tensor.shape[-2] if tensor is not None and tensor.ndim > 1 else 0


def _lacks_class_position(parts: _Parts) -> bool:
    rows = _rows(parts, "positions")
    return "class" in parts.outside and _is_square(rows) and not _is_square(rows - 1)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _tokens(parts: _Parts, width: int, said: tuple[int, int] | None) -> tuple[Array, Array]:
    """Take the position table apart: what stands in front of the patches, and the table of the patches."""
    name = _called(parts, "positions")
    table = parts.outside["positions"]
    if table.ndim not in (2, 3) or table.shape[-1] != width or table.size != table.shape[-2] * width:
        raise BuildError(f"{name} has the shape {table.shape} instead of (1, positions, {width})")
    table = table.reshape(-1, width)
    tokens = [
        parts.outside[part].reshape(-1, width) if parts.outside[part].shape[-1:] == (width,) else None
        for part in ("class", "registers")
        if part in parts.outside
    ]
    if any(part is None for part in tokens):
        raise BuildError(f"the class token and the registers must have {width} channels like the patch embedding")
    front = np.concatenate([np.zeros((0, width), np.float32), *(part for part in tokens if part is not None)])
    rows = len(table)
    # The rows in front of those of the patches: for the class token, for none, for the registers too.
    classes = len(parts.outside["class"].reshape(-1, width)) if "class" in parts.outside else 0
    choices = [classes, 0, len(front)] if parts.names is _ORIGINAL_NAMES else [classes]
    for extra in choices:
        left = rows - extra
        grid = said if said and said[0] * said[1] == left else (math.isqrt(left),) * 2 if _is_square(left) else None
        if grid:
            front[:extra] += table[:extra]
            return float32(front), float32(table[extra:].reshape(*grid, width))
    counts = " nor ".join(str(rows - extra) for extra in dict.fromkeys(choices))
    raise BuildError(
        f"{name} has {rows} positions, and neither {counts} patches make a square: a config.json with the image size "
        "must say how many rows and columns there are"
    )


def _grid_in(config: Mapping[str, Any], patch: int) -> tuple[int, int] | None:
    """Rows and columns of the table, from the image size that the model was trained at."""
    timm = config.get("pretrained_cfg")
    size = config.get("image_size")
    if isinstance(config.get("model_args"), Mapping) and "img_size" in config["model_args"]:
        size = config["model_args"]["img_size"]
    elif isinstance(timm, Mapping) and isinstance(timm.get("input_size"), list | tuple):
        size = timm["input_size"][-2:]
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0] // patch, size[1] // patch
    return None


# What no tensor says


def _family_rule(parts: _Parts) -> PositionRule:
    registers = "registers" in parts.outside
    if parts.names is _TRANSFORMERS_NAMES:
        return PositionRule(antialias=registers)
    if parts.is_timm:
        return PositionRule(antialias=True)
    return PositionRule(antialias=True) if registers else PositionRule(offset=0.1)


def _epsilon(parts: _Parts, config: Mapping[str, Any]) -> float:
    if parts.names is _ORIGINAL_NAMES:
        return 1e-6
    is_vit = "layernorm_before" in parts.called["norm1.weight"]
    epsilon = config.get("layer_norm_eps", 1e-12 if is_vit else 1e-6)
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise BuildError(f"config.json says layer_norm_eps = {epsilon!r}: a small number is wanted")
    return float(epsilon)


def _activation(parts: _Parts, config: Mapping[str, Any]) -> str:
    block = parts.blocks[0]
    if "gate_values.weight" in block or "gate.weight" in block or _is_packed(parts, block):
        return "swiglu"
    said = config.get("hidden_act", "gelu")
    if said not in _ACTIVATIONS:
        raise UnrecognisedModelError(
            f"config.json says hidden_act = {said!r}: {', '.join(_ACTIVATIONS)} and SwiGLU are supported"
        )
    return _ACTIVATIONS[said]


def _heads(heads: int | None, config: Mapping[str, Any], width: int) -> int:
    if heads is None:
        heads = config.get("num_attention_heads")
        if heads is None and isinstance(config.get("model_args"), Mapping):
            heads = config["model_args"].get("num_heads")
    if heads is None:
        if width % _USUAL_HEAD or (width > _WIDEST_USUAL and width != _GIANT):
            raise BuildError(
                f"the number of attention heads of a model of {width} channels can't be told from its weights: "
                "say it with heads=, or put its config.json beside the weights"
            )
        heads = width // _USUAL_HEAD
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise BuildError(f"{heads!r} heads don't share {width} channels evenly")
    return heads


def _triple(
    given: tuple[float, float, float] | None, config: Mapping[str, Any], name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    timm = config.get("pretrained_cfg")
    said = given or config.get(f"image_{name}") or (timm.get(name) if isinstance(timm, Mapping) else None) or default
    try:
        red, green, blue = (float(value) for value in said)
    except (TypeError, ValueError):
        raise BuildError(f"{name} must be three numbers, for red, green and blue, got {said!r}") from None
    return red, green, blue


# Weights


def _block(block: Mapping[str, Array], epsilon: float, activation: str) -> Block:
    def norm(name: str) -> Norm:
        return Norm(float32(block[f"{name}.weight"]), float32(block[f"{name}.bias"]), epsilon)

    def linear(name: str, scale: str | None = None) -> Linear:
        weight = float32(block[f"{name}.weight"].T)
        bias = float32(block.get(f"{name}.bias", np.zeros(weight.shape[1])))
        # What follows the layer times its scale is the layer with all its outputs scaled.
        factor = block.get(scale or "", np.ones(1)).astype(np.float32)
        return Linear(weight * factor, bias * factor)

    if "qkv.weight" in block:
        qkv = linear("qkv")
        weights, biases = np.split(qkv.weight, 3, axis=1), np.split(qkv.bias, 3)
        query, key, value = (Linear(float32(w), b) for w, b in zip(weights, biases, strict=True))
    else:
        query, key, value = (linear(name) for name in ("query", "key", "value"))
    if "gate.weight" in block:
        gate, values = linear("gate"), linear("values")
        fc1 = Linear(np.hstack([gate.weight, values.weight]), np.hstack([gate.bias, values.bias]))
    else:
        fc1 = linear("gate_values" if "gate_values.weight" in block else "fc1")
    return Block(
        Attention(norm("norm1"), query, key, value),
        Rest(linear("out", "scale1"), norm("norm2"), FeedForward(fc1, linear("fc2", "scale2"), activation)),
    )
