"""What PyTorch's own networks compute, straight from a state dict, for ``--verify`` to compare with.

Imports PyTorch, so nothing imports this but :mod:`passl.convert.verify`, when it needs it. Written from the original
projects' code, with nothing of the converter: tensors are found by the ends of their names, as the file has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]

# Of a weight-normed layer, before PyTorch 2 and since.
_GAIN = ("last_layer.weight_g", "last_layer.parametrizations.weight.original0")
_DIRECTION = ("last_layer.weight_v", "last_layer.parametrizations.weight.original1")


class Unseen(NamedTuple):
    """What a network needs to know, and no name or shape shows; None where it has no such thing."""

    num_heads: Optional[int] = None
    epsilon: Optional[float] = None
    pos_embed_mode: Optional[str] = None
    tokens_norm: Optional[bool] = None


def beside(state: Weights, *ends: str) -> Optional[Weights]:
    """The tensors at the level of the first that ends so, by their names from there on; None where none does."""
    for end in ends:
        for key in state:
            if key == end or key.endswith("." + end):
                return _below(state, key[: len(key) - len(end)])
    return None


def backbone(state: Weights, images: Tensor, unseen: Unseen) -> Optional[Tensor]:
    """[B, C, H, W] -> [B, D]; None if no known family is there."""
    if weights := beside(state, "cls_attn_blocks.0.norm1.weight"):
        return _xcit(weights, images, unseen)
    if weights := beside(state, "layer1.0.conv1.weight"):
        return _resnet(weights, images)
    tokens = transformer(state, images, unseen, 1)
    return None if tokens is None else tokens[-1][:, 0]


# --- ViT, DINOv2, region ViT -----------------------------------------------------------------------------------------


def transformer(state: Weights, images: Tensor, unseen: Unseen, n: int) -> Optional[list[Tensor]]:
    """The normalised tokens [B, 1+N, D] after each of the last n blocks; None if there is no ViT."""
    weights = beside(state, "patch_embed.proj.weight", "phi.0.weight")
    if weights is None:
        return None
    if "phi.0.weight" in weights:
        grid = F.gelu(_linear(weights, "phi.0", images.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    else:
        kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
        grid = F.conv2d(images, kernel, bias, stride=kernel.shape[-1])
    x = _with_positions(weights, grid, unseen.pos_embed_mode)
    registers = weights.get("register_tokens", weights.get("reg_token", x[:1, :0]))
    x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    outputs = []
    for prefix in _block_prefixes(weights):
        x = _block(_below(weights, prefix), x, unseen)
        tokens = torch.cat([x[:, :1], x[:, 1 + registers.shape[1] :]], dim=1)
        outputs.append(_layer_norm(weights, "norm", tokens, unseen.epsilon))
    return outputs[-n:]


def _with_positions(weights: Weights, grid: Tensor, mode: Optional[str]) -> Tensor:
    """[B, D, rows, columns] -> [B, 1+N, D]"""
    patches, cls_token = grid.flatten(2).transpose(1, 2), weights["cls_token"].expand(len(grid), -1, -1)
    positions, size = weights["pos_embed"], grid.shape[2:]
    if math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:  # timm's ViTs with registers have none for [CLS]
        cls_token, positions = cls_token + positions[:, :1], positions[:, 1:]
    side = math.isqrt(positions.shape[1])
    if tuple(size) != (side, side):
        resized = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if mode == "scale":  # DINO, and DINOv2 without registers
            factors = tuple((length + 0.1) / side for length in size)
            resized = F.interpolate(resized, scale_factor=factors, mode="bicubic")
        else:  # DINOv2 with registers has antialiasing, clemsgrs has not
            resized = F.interpolate(resized, size=tuple(size), mode="bicubic", antialias=mode == "antialias")
        positions = resized.flatten(2).transpose(1, 2)
    return torch.cat([cls_token, patches + positions], dim=1)


def _block_prefixes(weights: Weights) -> list[str]:
    """Of DINOv2's chunked files too: blocks.CHUNK.INDEX, where INDEX counts through all chunks."""
    found = [re.fullmatch(r"(blocks\.(?:\d+\.)?(\d+)\.)norm1\.weight", name) for name in weights]
    return [match[1] for match in sorted((m for m in found if m), key=lambda match: int(match[2]))]


def _block(weights: Weights, x: Tensor, unseen: Unseen) -> Tensor:
    query, key, value = _query_key_value(weights, _layer_norm(weights, "norm1", x, unseen.epsilon), unseen.num_heads)
    scores = (query @ key.transpose(-2, -1)) * key.shape[-1] ** -0.5
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    x = x + _linear(weights, "attn.proj", mixed) * weights.get("ls1.gamma", 1.0)
    return x + _feed_forward(weights, _layer_norm(weights, "norm2", x, unseen.epsilon)) * weights.get("ls2.gamma", 1.0)


def _query_key_value(weights: Weights, x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [3, B, heads, N, D/heads]"""
    names = ["attn.qkv"] if "attn.qkv.weight" in weights else ["attn.q", "attn.k", "attn.v"]  # timm's XCiT
    qkv = torch.cat([_linear(weights, name, x) for name in names], dim=-1)
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _feed_forward(weights: Weights, x: Tensor) -> Tensor:
    first, second = ("mlp.w12", "mlp.w3") if "mlp.w12.weight" in weights else ("mlp.fc1", "mlp.fc2")
    hidden = _linear(weights, first, x)
    if hidden.shape[-1] == 2 * weights[f"{second}.weight"].shape[1]:
        gate, value = hidden.chunk(2, dim=-1)
        return _linear(weights, second, F.silu(gate) * value)
    return _linear(weights, second, F.gelu(hidden))


# --- XCiT ------------------------------------------------------------------------------------------------------------


def _xcit(weights: Weights, images: Tensor, unseen: Unseen) -> Tensor:
    x = images
    stages = sorted({int(m[1]) for name in weights if (m := re.match(r"patch_embed\.proj\.(\d+)\.0\.weight", name))})
    for stage in stages:
        x = F.conv2d(x, weights[f"patch_embed.proj.{stage}.0.weight"], stride=2, padding=1)
        x = _batch_norm(weights, f"patch_embed.proj.{stage}.1", x)
        x = x if stage == stages[-1] else F.gelu(x)
    rows, columns = x.shape[2:]
    x = (x + _fourier(weights, rows, columns)).flatten(2).transpose(1, 2)
    for prefix in _block_prefixes(weights):
        x = _xcit_block(_below(weights, prefix), x, rows, columns, unseen)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], dim=1)
    depth = sum(bool(re.fullmatch(r"cls_attn_blocks\.\d+\.norm1\.weight", name)) for name in weights)
    for index in range(depth):
        x = _class_attention_block(_below(weights, f"cls_attn_blocks.{index}."), x, unseen)
    return _layer_norm(weights, "norm", x, unseen.epsilon)[:, 0]


def _fourier(weights: Weights, rows: int, columns: int) -> Tensor:
    name = "pos_embeder" if "pos_embeder.token_projection.weight" in weights else "pos_embed"
    ones = torch.ones(1, rows, columns)
    divisors = 10000 ** (2 * torch.div(torch.arange(32), 2, rounding_mode="floor") / 32)
    waves = []
    for axis in (1, 2):
        turns = ones.cumsum(axis)
        turns = turns / (turns.amax(axis, keepdim=True) + 1e-6) * 2 * math.pi
        angles = turns[..., None] / divisors
        waves.append(torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=4).flatten(3))
    grid = torch.cat(waves, dim=3).permute(0, 3, 1, 2)
    return F.conv2d(grid, weights[f"{name}.token_projection.weight"], weights[f"{name}.token_projection.bias"])


def _xcit_block(weights: Weights, x: Tensor, rows: int, columns: int, unseen: Unseen) -> Tensor:
    temperature = weights["attn.temperature"]
    qkv = _query_key_value(weights, _layer_norm(weights, "norm1", x, unseen.epsilon), len(temperature))
    query, key, value = qkv.transpose(-2, -1)  # channels attend to channels
    scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * temperature
    mixed = (scores.softmax(dim=-1) @ value).permute(0, 3, 1, 2).flatten(2)
    x = x + weights["gamma1"] * _linear(weights, "attn.proj", mixed)
    grid = _layer_norm(weights, "norm3", x, unseen.epsilon).transpose(1, 2).unflatten(2, (rows, columns))
    for conv in ("local_mp.conv1", "local_mp.conv2"):
        kernel, bias = weights[f"{conv}.weight"], weights[f"{conv}.bias"]
        grid = F.conv2d(grid, kernel, bias, padding=1, groups=len(kernel))
        grid = _batch_norm(weights, "local_mp.bn", F.gelu(grid)) if conv.endswith("1") else grid
    x = x + weights["gamma3"] * grid.flatten(2).transpose(1, 2)
    return x + weights["gamma2"] * _feed_forward(weights, _layer_norm(weights, "norm2", x, unseen.epsilon))


def _class_attention_block(weights: Weights, x: Tensor, unseen: Unseen) -> Tensor:
    normal = _layer_norm(weights, "norm1", x, unseen.epsilon)
    query, key, value = _query_key_value(weights, normal, unseen.num_heads)
    scores = (query[:, :, :1] @ key.transpose(-2, -1)) * key.shape[-1] ** -0.5
    seen = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    x = x + weights["gamma1"] * torch.cat([_linear(weights, "attn.proj", seen), normal[:, 1:]], dim=1)
    cls_token, patches = x[:, :1], x[:, 1:]
    cls_token = _layer_norm(weights, "norm2", cls_token, unseen.epsilon)
    patches = _layer_norm(weights, "norm2", patches, unseen.epsilon) if unseen.tokens_norm else patches
    # As in the official code, the patches are added to themselves.
    return torch.cat([cls_token + weights["gamma2"] * _feed_forward(weights, cls_token), patches + patches], dim=1)


# --- ResNet ----------------------------------------------------------------------------------------------------------


def _resnet(weights: Weights, images: Tensor) -> Tensor:
    x = F.relu(_convolution(weights, "conv1", "bn1", images, 2))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage in (1, 2, 3, 4):
        depth = sum(bool(re.fullmatch(rf"layer{stage}\.\d+\.conv1\.weight", name)) for name in weights)
        for index in range(depth):
            stride = 2 if stage > 1 and index == 0 else 1
            x = _residual(_below(weights, f"layer{stage}.{index}."), x, stride)
    return x.mean(dim=(2, 3))


def _residual(weights: Weights, x: Tensor, stride: int) -> Tensor:
    skipped = x
    if "downsample.0.weight" in weights:
        skipped = _convolution(weights, "downsample.0", "downsample.1", x, stride)
    if "conv3.weight" in weights:
        x = F.relu(_convolution(weights, "conv1", "bn1", x, 1))
        x = F.relu(_convolution(weights, "conv2", "bn2", x, stride))
        return F.relu(_convolution(weights, "conv3", "bn3", x, 1) + skipped)
    x = F.relu(_convolution(weights, "conv1", "bn1", x, stride))
    return F.relu(_convolution(weights, "conv2", "bn2", x, 1) + skipped)


# --- heads and parts -------------------------------------------------------------------------------------------------


def dino_head(state: Weights, features: Tensor) -> Tensor:
    """The head whose last layer is in ``state``: [B, D] -> [B, K]."""
    weights = beside(state, *_GAIN)
    gain, direction = (next(weights[name] for name in names if name in weights) for names in (_GAIN, _DIRECTION))
    return F.linear(F.normalize(_mlp(weights, features), dim=-1), gain * F.normalize(direction, dim=-1))


def _mlp(weights: Weights, x: Tensor) -> Tensor:
    """Linear layers with a GELU, and a batch norm before it if there is one, between."""
    layers = [name[: -len(".weight")] for name in weights if name.endswith(".weight") and "last_layer" not in name]
    for index, name in enumerate(sorted(layers, key=lambda name: int("0" + re.sub(r"\D", "", name)))):
        if weights[f"{name}.weight"].ndim == 2:
            x = _linear(weights, name, F.gelu(x) if index else x)
        else:
            x = _batch_norm(weights, name, x)
    return x


def _below(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _layer_norm(weights: Weights, name: str, x: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)


def _batch_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    statistics = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def _convolution(weights: Weights, conv: str, norm: str, x: Tensor, stride: int) -> Tensor:
    kernel = weights[f"{conv}.weight"]
    return _batch_norm(weights, norm, F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2))
