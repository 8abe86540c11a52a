"""Make weights.npz: tiny random vision transformers of each repository and what PyTorch computes with them.

For tests/tiny_models.py, which need no PyTorch. ``pip install torch==2.13.0 transformers==5.23.0 timm==1.0.31`` in an
environment of its own, then ``python tests/golden/make_weights.py``.

timm and transformers build their models themselves. Those of facebookresearch can't be installed: the modules below
have the parameters and do the arithmetic of facebookresearch/dino and facebookresearch/dinov2, written anew.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.layers
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

PATCH, HEADS, WIDTH, DEPTH, SIDE = 4, 2, 16, 2, 5
GRIDS = [(5, 5), (7, 2)]


def image(grid: tuple[int, int]) -> Tensor:
    y, x = np.mgrid[0 : grid[0] * PATCH, 0 : grid[1] * PATCH] / 7.0
    channels = [np.sin(3 * x + k * y) + np.cos(5 * y - 2 * k * x) * (x > y) for k in range(3)]
    return torch.from_numpy(np.stack(channels).astype(np.float32))[None]


# facebookresearch


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.w12(x).tensor_split(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * values)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).tensor_split(3, dim=-1)
        q, k, v = (part.reshape(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts)
        mixed = torch.softmax(q @ k.mT / math.sqrt(WIDTH // HEADS), dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Layer(nn.Module):
    def __init__(self, scaled: bool, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = SelfAttention(), GatedMlp() if gated else Mlp()
        self.ls1, self.ls2 = (Scale() if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Original(nn.Module):
    """DINO with version=1; DINOv2 with version=2, in ``chunks`` chunks of blocks (0: none), with registers or not."""

    def __init__(self, version: int, *, chunks: int = 0, registers: int = 0, gated: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + SIDE**2, WIDTH))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, WIDTH)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, WIDTH)) if version == 2 else None
        layers = [Layer(version == 2, gated) for _ in range(DEPTH)]
        self.layers_in_order = layers
        if chunks:
            size = DEPTH // chunks
            starts = range(0, DEPTH, size)
            # Each chunk begins with as many empty places as there are blocks before it.
            filled = [[nn.Identity()] * start + layers[start : start + size] for start in starts]
            self.blocks = nn.ModuleList(nn.ModuleList(chunk) for chunk in filled)
        else:
            self.blocks = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        # DINOv2: offset 0.1 without registers; antialiasing, and a size instead of a factor, with them.
        self.offset, self.antialias = (0.0, True) if registers else (0.1, False)

    def positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == (SIDE, SIDE):
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
        where: dict[str, Any] = {"size": (rows, columns)}
        if self.offset:
            where = {"scale_factor": ((rows + self.offset) / SIDE, (columns + self.offset) / SIDE)}
        table = nn.functional.interpolate(table, mode="bicubic", antialias=self.antialias, **where)
        return torch.cat([self.pos_embed[:, :1], table.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def forward(self, picture: Tensor) -> Tensor:
        patches = self.patch_embed.proj(picture)
        x = torch.cat([self.cls_token, patches.flatten(2).mT], dim=1) + self.positions(*patches.shape[2:])
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens, x[:, 1:]], dim=1)
        for layer in self.layers_in_order:
            x = layer(x)
        return self.norm(x)


# All styles


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter random numbers of half precision, large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        numbers = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith((".weight", "gamma", "lambda1")):
            numbers = 1 + 0.3 * numbers
        elif parameter.ndim == 2 and name.endswith(".weight"):
            numbers = numbers / math.sqrt(parameter.shape[1])
        else:
            numbers = 0.3 * numbers
        parameter.data = numbers.half().float()
    return model.eval()


def see(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[name] = output.detach()[0]

    return hook


def run(model: nn.Module, attentions: list[nn.Module], **arguments: Any) -> dict[str, np.ndarray]:
    """Queries, keys and values of the patches, (blocks, 3, tokens, D), at each of GRIDS."""
    seen: dict[str, Tensor] = {}
    for block in range(DEPTH):
        for name in ("qkv", "q_proj", "k_proj", "v_proj"):
            if hasattr(attentions[block], name):
                getattr(attentions[block], name).register_forward_hook(see(seen, f"{block} {name}"))
    arrays = {}
    for grid in GRIDS:
        with torch.no_grad():
            model(image(grid), **arguments)
        blocks = []
        for block in range(DEPTH):
            if f"{block} qkv" in seen:
                parts = seen[f"{block} qkv"].tensor_split(3, dim=-1)
            else:
                parts = tuple(seen[f"{block} {part}_proj"] for part in "qkv")
            blocks.append(torch.stack([part[-grid[0] * grid[1] :] for part in parts]))
        arrays[f"{grid[0]}x{grid[1]}"] = torch.stack(blocks).numpy()
    return arrays


def saved(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What transformers writes: names that differ from those in memory, and the configuration."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors"), json.loads(Path(folder, "config.json").read_text())


def main() -> None:
    arrays: dict[str, np.ndarray] = {}

    def add(style: str, state: dict[str, Tensor], results: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        # In one array instead of dozens: each would cost more to name than to hold.
        numbers = torch.cat([tensor.detach().flatten() for tensor in state.values()])
        assert torch.equal(numbers, numbers.half().float())
        arrays[f"{style}/numbers"] = numbers.half().numpy()
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        arrays[f"{style}/names"] = np.array(json.dumps({"shapes": shapes, "config": config}))
        arrays.update({f"{style}/{name}": result for name, result in results.items()})

    original: dict[str, dict[str, Any]] = {
        "dino": {"version": 1},
        "dinov2": {"version": 2},
        "dinov2-chunks": {"version": 2, "chunks": 2},
        "dinov2-registers": {"version": 2, "registers": 4},
        "dinov2-giant": {"version": 2, "gated": True},
    }
    for seed, (style, arguments) in enumerate(original.items()):
        model = fill(Original(**arguments), seed)
        results = run(model, [layer.attn for layer in model.layers_in_order])
        add(style, model.state_dict(), results, {})

    common: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
    }
    hub: dict[str, Any] = {
        # An epsilon that would be missed.
        "vit": transformers.ViTModel(
            transformers.ViTConfig(intermediate_size=2 * WIDTH, layer_norm_eps=1e-2, **common)
        ),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **common)),
        "giant": transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=3, use_swiglu_ffn=True, **common)),
        "registers": transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **common)
        ),
    }
    for seed, (name, model) in enumerate(hub.items(), 10):
        fill(model, seed)
        layers = model.layers if name == "vit" else model.encoder.layer
        results = run(
            model,
            [layer.attention for layer in layers],
            **({"interpolate_pos_encoding": True} if name == "vit" else {}),
        )
        state, config = saved(model)
        add(f"transformers-{name}", state, results, config)
        if name in ("vit", "giant"):
            add(f"transformers-{name}-in-memory", model.state_dict(), {}, config)

    sizes: dict[str, Any] = {
        "img_size": SIDE * PATCH,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 2,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    others: dict[str, dict[str, Any]] = {
        "vit": {"num_classes": 3},
        "dinov2": {"init_values": 1.0},
        "registers": {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True},
        "registers-positions": {"reg_tokens": 2},
        "giant": {
            "init_values": 1.0,
            "mlp_ratio": 4,
            "mlp_layer": timm.layers.SwiGLUPacked,
            "act_layer": nn.SiLU,
        },
    }
    for seed, (name, arguments) in enumerate(others.items(), 20):
        model = fill(timm.models.VisionTransformer(**(sizes | arguments)), seed)
        results = run(model, [block.attn for block in model.blocks])
        config = {"architecture": f"tiny_{name}", "model_args": {"num_heads": HEADS}, "pretrained_cfg": {}}
        add(f"timm-{name}", model.state_dict(), results, config)

    np.savez_compressed(Path(__file__).with_name("weights.npz"), **arrays)


if __name__ == "__main__":
    main()
