"""Which network a state dict is of, read off its names and shapes."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from paddle import nn

import passl.models  # noqa: F401  (registers the backbones)
from passl.convert.layout import blueprint
from passl.convert.report import ConversionError
from passl.formats.limits import DAMAGE
from passl.models.dino import DINOHead
from passl.registry import BACKBONES

Shapes = Mapping[str, tuple[int, ...]]  # PyTorch's names and shapes

_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_VITS = {(192, 12, 3): "vit_tiny", (384, 12, 6): "vit_small", (768, 12, 12): "vit_base", (1024, 24, 16): "vit_large"}
_DINOV2 = {(384, 12): "small", (768, 12): "base", (1024, 24): "large", (1536, 40): "giant"}
_XCITS = {
    (128, 12): "xcit_nano_12",
    (192, 12): "xcit_tiny_12",
    (192, 24): "xcit_tiny_24",
    (384, 12): "xcit_small_12",
    (384, 24): "xcit_small_24",
    (512, 24): "xcit_medium_24",
}


@dataclass
class Architecture:
    """A registered backbone and its arguments; ``unknown``: what no name or shape shows, so the default stands."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def section(self) -> dict[str, Any]:
        """As a configuration has it."""
        return {"name": self.name, **self.arguments}

    def blueprint(self) -> nn.Layer:
        """The network without memory for its parameters; only its names and shapes are sure to be right.

        Raises:
            ConversionError: there is no such backbone, or it refuses the arguments.
        """
        try:
            # Neither names nor shapes depend on the number of heads.
            heads = {"num_heads": 1} if "num_heads" in self.unknown else {}
            return blueprint(BACKBONES.get(self.name), {**self.arguments, **heads})
        except DAMAGE as error:
            raise ConversionError(f"the architecture {self}: {error}") from error

    def takes(self, argument: str) -> bool:
        """Whether its builder has this argument."""
        return argument in inspect.signature(BACKBONES.get(self.name)).parameters

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        unknown = f"; not visible in the file: {', '.join(self.unknown)}" if self.unknown else ""
        return f"{self.name}({arguments}){unknown}"


def given(name: str, shapes: Shapes, arguments: Mapping[str, Any]) -> Architecture:
    """The architecture that a user names, with the sizes that the file shows where its builder takes them."""
    try:
        accepted = inspect.signature(BACKBONES.get(name)).parameters
    except ValueError as error:
        raise ConversionError(str(error)) from error
    seen = _visible(shapes)
    found = {key: value for key, value in seen.items() if key in accepted and value != accepted[key].default}
    return Architecture(name, {**found, **arguments})


def infer(shapes: Shapes, arguments: Optional[Mapping[str, Any]] = None) -> Architecture:
    """The registered backbone whose tensors have these names and shapes; ``arguments`` add to what is found.

    Raises:
        ConversionError: the names are of no known family.
    """
    known = dict(arguments or {})
    for marker, family in (
        ("pos_embeder.token_projection.weight", _xcit),
        ("phi.0.weight", _region),
        ("patch_embed.proj.weight", _vit),
        ("layer1.0.conv1.weight", _resnet),
    ):
        if marker in shapes:
            return family(shapes, known)
    some = ", ".join(list(shapes)[:6]) or "nothing"
    raise ConversionError(
        f"the names are of no known family (ViT, DINOv2, ResNet, XCiT, region ViT): {some} ...; give --arch NAME "
        "(passl.list_models() has them) if it is one of passl's own"
    )


def infer_head(shapes: Shapes) -> dict[str, Any]:
    """Arguments of :class:`DINOHead` for a head's names and shapes.

    Raises:
        ConversionError: it is no DINO head.
    """
    linear = sorted(
        int(m[1])
        for name in shapes
        if (m := re.fullmatch(r"mlp\.(\d+)\.weight", name, re.ASCII)) and len(shapes[name]) == 2
    )
    first, last = (f"mlp.{linear[0]}.", f"mlp.{linear[-1]}.") if linear else ("mlp.", "mlp.")
    needed = (f"{first}weight", f"{last}weight", "last_layer.weight_g", "last_layer.weight_v")
    if lacking := [name for name in needed if name not in shapes]:
        raise ConversionError(
            f"the head is no DINO head, or a part of one: it has no {', '.join(lacking)}. --kind backbone takes the "
            "backbone alone"
        )
    head: dict[str, Any] = {
        "in_dim": _size(shapes, f"{first}weight", 2)[1],
        "out_dim": _size(shapes, "last_layer.weight_v", 2)[0],
        "bottleneck_dim": _size(shapes, f"{last}weight", 2)[0],
    }
    if len(linear) != 3:
        head["num_layers"] = max(len(linear), 1)
    if len(linear) > 1:
        head["hidden_dim"] = shapes[f"{first}weight"][0]
    if any(name.endswith("running_mean") for name in shapes):
        head["use_bn"] = True
    return _without_defaults(DINOHead, head)


def _without_defaults(builder: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(builder).parameters
    # What it does not know stays, for its own error.
    return {key: v for key, v in arguments.items() if key not in parameters or parameters[key].default != v}


def _visible(shapes: Shapes) -> dict[str, Any]:
    """Sizes that any family shows, by the names of the arguments."""
    try:
        return infer(shapes).arguments
    except ConversionError:
        return {}


def _size(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that tells sizes of the architecture."""
    shape = shapes.get(name)
    if shape is None:
        raise ConversionError(f"the architecture cannot be told: {name} is missing")
    if len(shape) != dimensions or 0 in shape:
        raise ConversionError(f"the architecture cannot be told: {name} has {list(shape)} for {dimensions} sizes")
    return shape


def _count(shapes: Shapes, pattern: str) -> int:
    """How many blocks there are, whose numbers ``pattern`` finds."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name, re.ASCII))}
    if len(numbers) != 1 + max(numbers, default=-1):
        found = ", ".join(map(str, sorted(numbers)))
        family = pattern.partition(r"\.")[0]
        raise ConversionError(f"the architecture cannot be told: of {family} there are only the numbers {found}")
    return len(numbers)


def _ratio(width: int, hidden: int) -> float:
    """mlp_ratio, with which ``int(width * ratio)`` is ``hidden``."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _transformer(shapes: Shapes, width: int, arguments: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What ViT and region ViT have in common, with the defaults of neither."""
    found: dict[str, Any] = {"embed_dim": width, "depth": _count(shapes, r"blocks\.(\d+)\.")}
    unknown: tuple[str, ...] = ()
    if "num_heads" not in arguments:
        # 64 channels each are usual.
        if width % 64 == 0:
            found["num_heads"] = width // 64
        else:
            unknown = ("num_heads",)
    hidden = shapes.get("blocks.0.mlp.fc1.weight", (4 * width,))[0]
    if hidden != 4 * width:
        found["mlp_ratio"] = _ratio(width, hidden)
    if "blocks.0.attn.qkv.bias" not in shapes:
        found["qkv_bias"] = False
    return found, unknown


def _vit(shapes: Shapes, arguments: dict[str, Any]) -> Architecture:
    width, channels, patch, _ = _size(shapes, "patch_embed.proj.weight", 4)
    found, unknown = _transformer(shapes, width, arguments)
    extra: dict[str, Any] = {"patch_size": patch, "img_size": patch * _grid_side(shapes), "in_chans": channels}
    if "register_tokens" in shapes:
        extra["num_register_tokens"] = _size(shapes, "register_tokens", 3)[1]
    is_swiglu = "blocks.0.mlp.w12.weight" in shapes
    if "blocks.0.ls1.gamma" in shapes:
        size = _DINOV2.get((width, found["depth"]))
        if size and is_swiglu == (size == "giant") and len(found) == 3 and "mask_token" in shapes:
            return _named(f"dinov2_vit_{size}", {**extra, **arguments}, ())
        extra.update(layer_scale=1.0, ffn="swiglu" if is_swiglu else "mlp", mask_token="mask_token" in shapes)
        if "register_tokens" in shapes:
            extra["pos_embed_mode"] = "antialias"  # as the registered ones
    elif "mask_token" in shapes:
        extra["mask_token"] = True
    else:
        name = _VITS.get((width, found["depth"], found.get("num_heads")))
        if name and len(found) == 3 and set(arguments) <= set(inspect.signature(BACKBONES.get(name)).parameters):
            return _named(name, {**extra, **arguments}, ())
    return _named("VisionTransformer", {**extra, **found, **arguments}, unknown)


def _grid_side(shapes: Shapes) -> int:
    patches = _size(shapes, "pos_embed", 3)[1] - 1
    side = math.isqrt(patches)
    if side * side != patches or not side:
        distilled = ": a distilled DeiT, which has no counterpart here" if "dist_token" in shapes else ""
        raise ConversionError(f"pos_embed has {patches + 1} positions, not [CLS] and a square grid{distilled}")
    return side


def _region(shapes: Shapes, arguments: dict[str, Any]) -> Architecture:
    width, channels = _size(shapes, "phi.0.weight", 2)
    found, unknown = _transformer(shapes, width, arguments)
    extra = {"in_chans": channels, "grid_size": _grid_side(shapes)}
    # Six heads of 32 channels each, not the usual 64.
    if (width, found["depth"], len(found)) == (192, 6, 3) and not arguments:
        return _named("hvit_xs", extra, ())
    return _named("RegionTransformer", {**extra, **found, **arguments}, unknown)


def _resnet(shapes: Shapes, arguments: dict[str, Any]) -> Architecture:
    bottleneck = "layer1.0.conv3.weight" in shapes
    depths = tuple(_count(shapes, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    width, channels = _size(shapes, "conv1.weight", 4)[:2]
    name = _RESNETS.get((bottleneck, depths)) if width == 64 else None
    if name:
        return _named(name, {"in_chans": channels, **arguments}, ())
    found = {"depths": list(depths), "bottleneck": bottleneck, "width": width, "in_chans": channels}
    return _named("ResNet", {**found, **arguments}, ())


def _xcit(shapes: Shapes, arguments: dict[str, Any]) -> Architecture:
    width = _size(shapes, "cls_token", 3)[-1]
    convs = sum(bool(re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", name)) for name in shapes)
    patch, channels = 2**convs, _size(shapes, "patch_embed.proj.0.0.weight", 4)[1]
    depth = _count(shapes, r"blocks\.(\d+)\.")
    heads = _size(shapes, "blocks.0.attn.temperature", 3)[0]
    name = f"{_XCITS.get((width, depth))}_p{patch}"
    if name in BACKBONES and heads == _heads(name) and not arguments:
        return _named(name, {"in_chans": channels}, ())
    found = {"patch_size": patch, "in_chans": channels, "embed_dim": width, "depth": depth, "num_heads": heads}
    found["mlp_ratio"] = _ratio(width, _size(shapes, "blocks.0.mlp.fc1.weight", 2)[0])
    found["cls_attn_depth"] = _count(shapes, r"cls_attn_blocks\.(\d+)\.")
    return _named("XCiT", {**found, **arguments}, () if "tokens_norm" in arguments else ("tokens_norm",))


def _heads(name: str) -> int:
    """Attention heads of a registered XCiT."""
    return blueprint(BACKBONES.get(name), {}).blocks[0].attn.num_heads


def _named(name: str, arguments: dict[str, Any], unknown: tuple[str, ...]) -> Architecture:
    return Architecture(name, _without_defaults(BACKBONES.get(name), arguments), unknown)
