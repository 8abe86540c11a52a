"""Make exports.tar.xz: tiny vision transformers with random weights, exported in the ways people export them.

For tests/models/test_from_onnx.py, which needs no PyTorch. ``python tests/golden/make_exports.py`` needs torch,
transformers, timm, onnx, onnxscript, onnxslim and onnxruntime. For every model the queries, keys and values of all
blocks are caught by hooks in PyTorch, at the size of the export and, where the model runs there, at one that isn't
square; a few rows of them are kept. The weights are multiples of powers of two, so that they pack well.
"""

from __future__ import annotations

import io
import json
import logging
import math
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional

TARGET = Path(__file__).with_name("exports.tar.xz")
DIM, HEADS, BLOCKS, HIDDEN = 16, 2, 2, 32
ROWS = (0, 1, 5, -1)


def image(height: int, width: int) -> np.ndarray:
    """Make the picture that all models see; the tests make the same one."""
    return np.random.default_rng(height * 1000 + width).normal(size=(1, 3, height, width)).astype(np.float32)


# Models in the manner of the original repositories, written for this file


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q * (dim // HEADS) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Library(nn.MultiheadAttention):
    """PyTorch's own attention, as torchvision uses it."""

    def __init__(self) -> None:
        super().__init__(DIM, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Original(nn.Module):
    """A transformer as the first DINO (scale=False) or DINOv2 (scale=True) computes it."""

    def __init__(
        self,
        *,
        patch: int = 4,
        scale: bool = False,
        fused: bool = False,
        decoder: bool = False,
        library: bool = False,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(3, DIM, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.positions = nn.Parameter(torch.zeros(1, 17, DIM))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM, eps=1e-6) for _ in range(2 * BLOCKS + 1))
        self.attention = nn.ModuleList(Library() if library else Attention(fused) for _ in range(BLOCKS))
        self.fc1 = nn.ModuleList(nn.Linear(DIM, HIDDEN) for _ in range(BLOCKS))
        self.fc2 = nn.ModuleList(nn.Linear(HIDDEN, DIM) for _ in range(BLOCKS))
        self.gamma = nn.ParameterList([torch.ones(DIM) for _ in range(2 * BLOCKS)]) if scale else [1.0] * 2 * BLOCKS
        self.decoder = Decoder() if decoder else None

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        height, width = picture.shape[2] // self.patch, picture.shape[3] // self.patch
        x = self.projection(picture).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        table = self.positions
        if (height, width) != (4, 4):
            grid = table[:, 1:].reshape(1, 4, 4, DIM).permute(0, 3, 1, 2)
            factors = ((height + 0.1) / 4, (width + 0.1) / 4)
            grid = functional.interpolate(grid, scale_factor=factors, mode="bicubic")
            table = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, DIM)], dim=1)
        x = x + table
        for k in range(BLOCKS):
            x = x + self.gamma[2 * k] * self.attention[k](self.norms[2 * k](x))
            x = x + self.gamma[2 * k + 1] * self.fc2[k](functional.gelu(self.fc1[k](self.norms[2 * k + 1](x))))
        x = self.norms[-1](x)
        return self.decoder(x) if self.decoder is not None else x[:, 0]


class Decoder(nn.Module):
    """Queries that look at the tokens, then at each other, then a convolution: nothing of it belongs to the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, 3, DIM))
        self.key, self.value, self.again = (nn.Linear(DIM, DIM) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)
        self.mask = nn.Conv2d(DIM, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = (self.queries @ self.key(x).transpose(1, 2)).softmax(-1) @ self.value(x)
        own = self.norm(seen)
        seen = seen + (own @ self.again(own).transpose(1, 2)).softmax(-1) @ own
        side = 4
        maps = self.mask(x[:, 1:].transpose(1, 2).reshape(len(x), DIM, side, side))
        return functional.interpolate(maps, scale_factor=2.0, mode="nearest") + seen.mean(-1)[:, :, None, None]


class Interpolated(nn.Module):
    """A ViT of transformers told to resize its positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.model(picture, interpolate_pos_encoding=True).last_hidden_state


# Catching queries, keys and values


def fill(model: nn.Module) -> nn.Module:
    """Give every parameter multiples of 1/16 or so that depend on its shape and on how often that came before."""
    seen: dict[tuple[int, ...], int] = {}
    for parameter in model.parameters():
        shape = tuple(parameter.shape)
        seen[shape] = seen.get(shape, 0) + 1
        rng = np.random.default_rng([seen[shape], *shape])
        size = 2.0 ** -round(math.log2(max(8.0, 2 * math.sqrt(parameter[0].numel()))))
        value = rng.integers(-5, 6, shape) * size
        if parameter.ndim == 1:
            value = value * (8 / 16) + (1 if parameter.mean() > 0.5 else 0)
        parameter.data = torch.from_numpy(np.asarray(value, np.float32))
    return model.eval()


def hooked(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that make queries, keys and values, in the order of the blocks."""
    names = ("q_proj", "k_proj", "v_proj", "qkv")
    named = [(n.rsplit(".", 1)[-1], m) for n, m in model.named_modules()]
    return [(n, m) for n, m in named if n in names or isinstance(m, Library)]


def catch(model: nn.Module, picture: np.ndarray) -> np.ndarray:
    """Run a model; return (blocks, 3, rows, D)."""
    found: list[np.ndarray] = []
    handles = []

    def project(module: Library, inputs: tuple[torch.Tensor, ...]) -> None:
        out = functional.linear(inputs[0], module.in_proj_weight, module.in_proj_bias)
        found.extend(p[0].numpy() for p in out.chunk(3, dim=-1))

    for name, module in hooked(model):
        if isinstance(module, Library):
            handles.append(module.register_forward_pre_hook(project))
            continue
        parts = 3 if name == "qkv" else 1
        handles.append(
            module.register_forward_hook(
                lambda _m, _i, out, parts=parts: found.extend(p[0].numpy() for p in out.chunk(parts, dim=-1))
            )
        )
    with torch.no_grad():
        model(torch.from_numpy(picture))
    for handle in handles:
        handle.remove()
    stacked = np.stack(found).reshape(-1, 3, *found[0].shape)
    return stacked[:, :, list(ROWS)]


# Exporting


def export(model: nn.Module, size: int, *, dynamo: bool, opset: int, dynamic: bool) -> onnx.ModelProto:
    picture = torch.from_numpy(image(size, size))
    if dynamo:
        free = torch.export.Dim.DYNAMIC
        shapes = ({2: free, 3: free},) if dynamic else None
        program = torch.onnx.export(
            model, (picture,), dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
        )
        proto = program.model_proto
    else:
        axes = {"pixels": {0: "batch", 2: "height", 3: "width"}} if dynamic else None
        buffer = io.BytesIO()
        torch.onnx.export(
            model, (picture,), buffer, dynamo=False, opset_version=opset, input_names=["pixels"], dynamic_axes=axes
        )
        proto = onnx.load_from_string(buffer.getvalue())
    return slim(proto)


def slim(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Leave out what exporters write for people."""
    proto.doc_string = ""
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    for item in [*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output]:
        item.doc_string = ""
        del item.metadata_props[:]
    return proto


def by_onnxslim(proto: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    return slim(onnxslim.slim(proto))


def by_onnxruntime(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Let ONNX Runtime fuse what it can."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder, "fused.onnx"))
        options.log_severity_level = 3
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return slim(onnx.load(options.optimized_model_filepath))


def transformers_model(kind: str, attention: str = "eager", *, patch: int = 4, **more: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=DIM,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        **({"mlp_ratio": HIDDEN // DIM} if kind.startswith("Dinov2") else {"intermediate_size": HIDDEN}),
        image_size=4 * patch,
        patch_size=patch,
        attn_implementation=attention,
        **{k: v for k, v in more.items() if k != "head"},
    )
    return getattr(transformers, f"{kind}{more.get('head', 'Model')}")(config)


def timm_model(*, fused: bool = True, **more: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    options = {"num_classes": 0, "mlp_ratio": HIDDEN / DIM, **more}
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=DIM, depth=BLOCKS, num_heads=HEADS, **options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def swiglu_layers() -> dict[str, Any]:
    from timm.layers import SwiGLUPacked

    return {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * HIDDEN / DIM}


PLAIN, OFFSET, SMOOTH = (0.0, False), (0.1, False), (0.0, True)
"""Offset and antialiasing of the position table."""
OLD, NEW = {"dynamo": False}, {"dynamo": True}
# Name, model, rule of its positions, whether it runs at any size, exports: name to options.
MODELS: list[tuple[str, Callable[[], nn.Module], tuple[float, bool], bool, dict[str, dict[str, Any]]]] = [
    (
        "vit",
        lambda: transformers_model("ViT"),
        PLAIN,
        False,
        {
            "old17": {**OLD, "opset": 17, "dynamic": True},
            "new20": {**NEW, "opset": 20, "dynamic": False},
            "old17_onnxslim": {**OLD, "opset": 17, "dynamic": True, "after": by_onnxslim},
            "old17_onnxruntime": {**OLD, "opset": 17, "dynamic": False, "after": by_onnxruntime},
        },
    ),
    (
        "vit_sdpa",
        lambda: transformers_model("ViT", "sdpa", head="ForImageClassification", qkv_bias=False),
        PLAIN,
        False,
        {
            "old14": {**OLD, "opset": 14, "dynamic": True},
            "new18": {**NEW, "opset": 18, "dynamic": False},
            "new23": {**NEW, "opset": 23, "dynamic": False},
        },
    ),
    (
        "vit_resized",
        lambda: Interpolated(transformers_model("ViT")),
        PLAIN,
        True,
        {"old17": {**OLD, "opset": 17, "dynamic": True}},
    ),
    (
        "dinov2",
        lambda: transformers_model("Dinov2"),
        PLAIN,
        True,
        {
            "old14": {**OLD, "opset": 14, "dynamic": True},
            "old17": {**OLD, "opset": 17, "dynamic": False},
            "new18": {**NEW, "opset": 18, "dynamic": True},
        },
    ),
    (
        "dinov2_14",
        lambda: transformers_model("Dinov2", "sdpa", patch=14),
        PLAIN,
        True,
        {"old17": {**OLD, "opset": 17, "dynamic": True}},
    ),
    (
        "dinov2_swiglu",
        lambda: transformers_model("Dinov2", use_swiglu_ffn=True),
        PLAIN,
        True,
        {"old17": {**OLD, "opset": 17, "dynamic": True}},
    ),
    (
        "dinov2_registers",
        lambda: transformers_model("Dinov2WithRegisters", "sdpa"),
        SMOOTH,
        True,
        {
            "new20": {**NEW, "opset": 20, "dynamic": False},
            "new23": {**NEW, "opset": 23, "dynamic": True},
            # Its table is folded to another grid than the one it was learnt on.
            "new18_folded": {**NEW, "opset": 18, "dynamic": False, "size": 20},
        },
    ),
    (
        "timm",
        lambda: timm_model(fused=False, dynamic_img_size=True),
        SMOOTH,
        True,
        {
            "old17": {**OLD, "opset": 17, "dynamic": False},
            "new18": {**NEW, "opset": 18, "dynamic": True},
        },
    ),
    (
        "timm_registers",
        lambda: timm_model(reg_tokens=4, no_embed_class=True, init_values=1.0, dynamic_img_size=True),
        SMOOTH,
        True,
        {
            "new18": {**NEW, "opset": 18, "dynamic": True},
            "new23": {**NEW, "opset": 23, "dynamic": False},
        },
    ),
    (
        "timm_registers_embedded",
        lambda: timm_model(reg_tokens=2, class_token=True, init_values=1.0, qkv_bias=False),
        SMOOTH,
        False,
        {"old17": {**OLD, "opset": 17, "dynamic": False}},
    ),
    (
        "timm_tanh",
        lambda: timm_model(act_layer=lambda: nn.GELU(approximate="tanh"), class_token=False, global_pool="avg"),
        SMOOTH,
        False,
        {
            "old17": {**OLD, "opset": 17, "dynamic": False},
            "new20": {**NEW, "opset": 20, "dynamic": False},
        },
    ),
    (
        "timm_swiglu",
        lambda: timm_model(**swiglu_layers()),
        SMOOTH,
        False,
        {"old17": {**OLD, "opset": 17, "dynamic": False}, "new20": {**NEW, "opset": 20, "dynamic": False}},
    ),
    (
        "original_v1",
        lambda: Original(),
        OFFSET,
        True,
        {
            "old14": {**OLD, "opset": 14, "dynamic": False},
            "new20": {**NEW, "opset": 20, "dynamic": False},
            "new18_folded": {**NEW, "opset": 18, "dynamic": False, "size": 20},
        },
    ),
    (
        "original_v2",
        lambda: Original(scale=True, fused=True),
        OFFSET,
        True,
        {
            "old17": {**OLD, "opset": 17, "dynamic": False},
            "new23": {**NEW, "opset": 23, "dynamic": False},
        },
    ),
    (
        "library",
        lambda: Original(library=True),
        OFFSET,
        True,
        {
            "old17": {**OLD, "opset": 17, "dynamic": False},
            "new20": {**NEW, "opset": 20, "dynamic": False},
        },
    ),
    (
        "decoder",
        lambda: Original(scale=True, decoder=True),
        OFFSET,
        False,
        {
            "old17": {**OLD, "opset": 17, "dynamic": False},
            "new20": {**NEW, "opset": 20, "dynamic": False},
        },
    ),
]


def others() -> dict[str, Callable[[], onnx.ModelProto]]:
    """Networks of other kinds, which must be refused."""
    import timm
    import transformers

    def text() -> onnx.ModelProto:
        layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, batch_first=True, norm_first=True, activation="gelu")
        model = fill(nn.Sequential(nn.Embedding(30, DIM), layer))
        buffer = io.BytesIO()
        words = torch.ones(1, 5, dtype=torch.int64)
        torch.onnx.export(model, (words,), buffer, dynamo=False, opset_version=17, input_names=["words"])
        return slim(onnx.load_from_string(buffer.getvalue()))

    def clip() -> nn.Module:
        config = transformers.CLIPVisionConfig(
            hidden_size=DIM,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            image_size=16,
            patch_size=4,
            attn_implementation="eager",
        )
        return transformers.CLIPVisionModel(config)

    def convolutional() -> nn.Module:
        return timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=2)

    def one(model: Callable[[], nn.Module], size: int = 16) -> Callable[[], onnx.ModelProto]:
        return lambda: export(fill(model()), size, dynamo=True, opset=20, dynamic=False)

    return {
        "rotary": one(lambda: transformers_model("DINOv3ViT")),
        "qk_norm": one(lambda: timm_model(qk_norm=True)),
        "clip": one(clip),
        "convnext": one(convolutional, 32),
        "text": text,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    files: dict[str, bytes] = {}
    cases: dict[str, dict[str, Any]] = {}
    for name, make, rule, any_size, exports in MODELS:
        model = fill(make())
        patch = 14 if name.endswith("_14") else 4
        sizes = [(4 * patch, 4 * patch)] + ([(3 * patch, 6 * patch)] if any_size else [])
        for how, options in exports.items():
            after = options.get("after", lambda proto: proto)
            size = options.get("size", 4 * patch)
            chosen = {key: options[key] for key in ("dynamo", "opset", "dynamic")}
            files[f"{name}-{how}.onnx"] = after(export(model, size, **chosen)).SerializeToString(deterministic=True)
            seen = [(size, size)] if size != 4 * patch else sizes
            cases[f"{name}-{how}"] = {"model": name, "rule": rule, "patch": patch, "sizes": seen}
            print(f"{name}-{how}", flush=True)
        for height, width in {tuple(s) for how in exports for s in cases[f"{name}-{how}"]["sizes"]}:
            buffer = io.BytesIO()
            np.save(buffer, catch(model, image(height, width)))
            files[f"{name}-{height}x{width}.npy"] = buffer.getvalue()
    for name, make_other in others().items():
        files[f"other-{name}.onnx"] = make_other().SerializeToString(deterministic=True)
        print(f"other-{name}", flush=True)
    files["cases.json"] = json.dumps(cases).encode()
    # Files alike stand beside each other, which packs better.
    with tarfile.open(TARGET, "w:xz", preset=9) as archive:
        for name in sorted(files, key=lambda n: (n.rpartition(".")[2], n)):
            entry = tarfile.TarInfo(name)
            entry.size = len(files[name])
            archive.addfile(entry, io.BytesIO(files[name]))
    print(f"{TARGET}: {len(files)} files, {sum(map(len, files.values())):,} bytes, packed {TARGET.stat().st_size:,}")


if __name__ == "__main__":
    main()
