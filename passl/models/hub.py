"""The official models by their official names, with or without their weights.

    from passl.models import hub
    model = hub.dino_vits16(pretrained=True)

The weights are PyTorch's own files, converted as they are read. Not imported by ``passl.models``: it stands above
``passl.convert``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from paddle import nn

import passl.models  # noqa: F401  (registers the backbones)
from passl import checkpoint, convert, download
from passl.registry import BACKBONES

_CACHE = "~/.cache/passl/hub"
_DINO = "https://dl.fbaipublicfiles.com/dino/{0}/{0}.pth"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}{1}_pretrain.pth"

PathLike = Union[str, Path]


class Official(NamedTuple):
    """An official model: the backbone to build, and where its weights are."""

    backbone: str  # as in BACKBONES
    arguments: dict[str, Any]
    address: str
    summary: str


# k-NN and linear: top-1 on ImageNet-1k, as the official README has it.
OFFICIAL = {
    "dino_vits16": Official(
        "vit_small",
        {"patch_size": 16},
        _DINO.format("dino_deitsmall16_pretrain"),
        "ViT-S/16 (D = 384, 21 M parameters; official k-NN 74.5 %, linear 77.0 %)",
    ),
    "dino_vits8": Official(
        "vit_small",
        {"patch_size": 8},
        _DINO.format("dino_deitsmall8_pretrain"),
        "ViT-S/8 (D = 384, 21 M parameters; official k-NN 78.3 %, linear 79.7 %)",
    ),
    "dino_vitb16": Official(
        "vit_base",
        {"patch_size": 16},
        _DINO.format("dino_vitbase16_pretrain"),
        "ViT-B/16 (D = 768, 85 M parameters; official k-NN 76.1 %, linear 78.2 %)",
    ),
    "dino_vitb8": Official(
        "vit_base",
        {"patch_size": 8},
        _DINO.format("dino_vitbase8_pretrain"),
        "ViT-B/8 (D = 768, 85 M parameters; official k-NN 77.4 %, linear 80.1 %)",
    ),
    "dino_resnet50": Official(
        "resnet50",
        {},
        _DINO.format("dino_resnet50_pretrain"),
        "ResNet-50 (D = 2048, 23 M parameters; official k-NN 67.5 %, linear 75.3 %)",
    ),
    "dino_xcit_small_12_p16": Official(
        "xcit_small_12_p16",
        {},
        _DINO.format("dino_xcit_small_12_p16_pretrain"),
        "XCiT-S12/16 (D = 384, 26 M parameters; official k-NN 76.0 %, linear 77.8 %)",
    ),
    "dino_xcit_small_12_p8": Official(
        "xcit_small_12_p8",
        {},
        _DINO.format("dino_xcit_small_12_p8_pretrain"),
        "XCiT-S12/8 (D = 384, 26 M parameters; official k-NN 77.1 %, linear 79.2 %)",
    ),
    "dino_xcit_medium_24_p16": Official(
        "xcit_medium_24_p16",
        {},
        _DINO.format("dino_xcit_medium_24_p16_pretrain"),
        "XCiT-M24/16 (D = 512, 84 M parameters; official k-NN 76.4 %, linear 78.8 %)",
    ),
    "dino_xcit_medium_24_p8": Official(
        "xcit_medium_24_p8",
        {},
        _DINO.format("dino_xcit_medium_24_p8_pretrain"),
        "XCiT-M24/8 (D = 512, 84 M parameters; official k-NN 77.9 %, linear 80.3 %)",
    ),
}


def _dinov2(letter: str, size: str, what: str, figures: list[tuple[float, float]]) -> dict[str, Official]:
    """Without and with registers; figures: k-NN and linear of the two."""
    name = f"dinov2_vit{letter.lower()}14"
    models = {}
    for registers, (knn, linear) in zip((0, 4), figures):
        suffix, title = ("_reg", " with registers") if registers else ("", "")
        models[name + suffix] = Official(
            f"dinov2_vit_{size}",
            {"num_register_tokens": registers} if registers else {},
            _DINOV2.format(name, "_reg4" if registers else ""),
            f"DINOv2 ViT-{letter}/14{title} ({what} M parameters; official k-NN {knn} %, linear {linear} %)",
        )
    return models


OFFICIAL.update(
    **_dinov2("S", "small", "D = 384, 22", [(79.0, 81.1), (79.1, 80.9)]),
    **_dinov2("B", "base", "D = 768, 87", [(82.1, 84.5), (82.0, 84.6)]),
    **_dinov2("L", "large", "D = 1024, 304", [(83.5, 86.3), (83.8, 86.7)]),
    **_dinov2("g", "giant", "D = 1536, 1136", [(83.5, 86.5), (83.7, 87.1)]),
)


def _load(name: str, pretrained: Union[bool, PathLike], checkpoint_key: str, cache_dir: Optional[PathLike]) -> nn.Layer:
    if not isinstance(pretrained, (bool, str, Path)):
        raise TypeError(f"pretrained ({pretrained!r}) must be True, False, or the path of a file")
    build, arguments = BACKBONES.get(OFFICIAL[name].backbone), OFFICIAL[name].arguments
    if pretrained is False:
        return build(**arguments)
    # First the weights: a file that does not fit is found before anything is built.
    source = _fetch(name, cache_dir) if pretrained is True else Path(pretrained).expanduser()
    weights = convert.read_backbone(source, checkpoint_key)
    _check_architecture(name, weights.name, weights.arguments, source)
    model = build(**arguments)
    checkpoint.load_weights(model, weights.state, source)
    return model


def _fetch(name: str, cache_dir: Optional[PathLike]) -> Path:
    address = OFFICIAL[name].address
    try:
        return download.fetch(address, Path(cache_dir or _CACHE).expanduser(), check=convert.load_torch)
    except download.DownloadError as error:
        raise download.DownloadError(f"{error}; or name your copy of it: {name}(pretrained='/path/to/file')") from None


def _check_architecture(name: str, backbone: str, arguments: Mapping[str, Any], source: Path) -> None:
    found = _architecture(backbone, arguments)
    official = {key: _architecture(model.backbone, model.arguments) for key, model in OFFICIAL.items()}
    if found == official[name]:
        return
    wanted = official[name][1]
    # Of the arguments at their defaults, those that make the difference.
    telling = {key: value for key, value in found[1].items() if key in arguments or value != wanted.get(key, value)}
    shown = f"{backbone}({', '.join(f'{key}={value!r}' for key, value in telling.items())})"
    fitting = [key for key, architecture in official.items() if architecture == found]
    advice = (
        f"use {' or '.join(fitting)}"
        if fitting
        else "no official model is one; name that backbone in a configuration, and the file as Global.pretrained_model"
    )
    raise ValueError(f"{source} holds {shown}, which does not fit {name}: {advice}")


def _architecture(backbone: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A backbone with all of its arguments, so that one left at its default equals one that was given."""
    call = inspect.signature(BACKBONES.get(backbone)).bind(**arguments)
    call.apply_defaults()
    return backbone, call.arguments


_DOCSTRING = """{summary}: [B, 3, H, W] -> [B, D], without a head.

    pretrained: False gives fresh weights, True the official ones, downloaded once into cache_dir (by default
    `~/.cache/passl/hub`) and taken from there afterwards; a path gives those of that file, in any format and of any
    kind that `passl-convert` reads.
    checkpoint_key: of a file with both networks, whose backbone: "teacher" or "student".

    Raises:
        DownloadError: the official file cannot be had; the text says which file to put where.
        ValueError: the file is damaged, hostile, or holds another architecture.
    """


def _model(name: str) -> Callable[..., nn.Layer]:
    def build(
        pretrained: Union[bool, PathLike] = False,
        checkpoint_key: str = "teacher",
        cache_dir: Optional[PathLike] = None,
    ) -> nn.Layer:
        return _load(name, pretrained, checkpoint_key, cache_dir)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _DOCSTRING.format(summary=OFFICIAL[name].summary)
    return build


dino_vits16 = dino_deits16 = _model("dino_vits16")
dino_vits8 = dino_deits8 = _model("dino_vits8")
dino_vitb16 = _model("dino_vitb16")
dino_vitb8 = _model("dino_vitb8")
dino_resnet50 = _model("dino_resnet50")
dino_xcit_small_12_p16 = _model("dino_xcit_small_12_p16")
dino_xcit_small_12_p8 = _model("dino_xcit_small_12_p8")
dino_xcit_medium_24_p16 = _model("dino_xcit_medium_24_p16")
dino_xcit_medium_24_p8 = _model("dino_xcit_medium_24_p8")
dinov2_vits14 = _model("dinov2_vits14")
dinov2_vitb14 = _model("dinov2_vitb14")
dinov2_vitl14 = _model("dinov2_vitl14")
dinov2_vitg14 = _model("dinov2_vitg14")
dinov2_vits14_reg = _model("dinov2_vits14_reg")
dinov2_vitb14_reg = _model("dinov2_vitb14_reg")
dinov2_vitl14_reg = _model("dinov2_vitl14_reg")
dinov2_vitg14_reg = _model("dinov2_vitg14_reg")
