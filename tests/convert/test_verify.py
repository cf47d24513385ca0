"""--verify: agreement passes, every kind of disagreement is an error; with PyTorch only where that is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import paddle
import pytest
from paddle import nn

from passl.cli.convert import convert_main
from passl.convert import BFLOAT16, ConversionError, convert, load_torch, save_pdparams, save_safetensors, save_torch
from passl.convert.layout import slots
from passl.convert.verify import verify
from passl.models import DINOHead, LinearProbe, RegionTransformer, ResNet, VisionTransformer, XCiT
from passl.models.probe import LinearClassifier
from passl.registry import BACKBONES

RANDOM = np.random.default_rng(5)


def checked(path: Path, recorded: Optional[Path] = None, backbone: Optional[Path] = None, **options: Any) -> str:
    """The lines of a verification of a file that is converted for it."""
    conversion = convert(path, None, backbone=backbone, **options).conversion
    return "\n".join(verify(path, conversion, recorded, backbone))


def official(layer: nn.Layer, prefix: str = "") -> dict[str, np.ndarray]:
    """The state of a Layer as PyTorch has it, with random values that are nowhere 0 or 1."""
    values = {
        slot.name: RANDOM.uniform(0.5, 1.5, slot.shape) if slot.torch_name.endswith("running_var")
        else RANDOM.standard_normal(slot.shape) * 0.3
        for slot in slots(layer)
    }  # fmt: skip
    return {prefix + slot.torch_name: slot.to_torch(values[slot.name].astype(np.float32)) for slot in slots(layer)}


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3, **options}
    )


# --- recordings ---


def recording_of(reference: Path, patch_size: int) -> tuple[Path, Path, dict[str, Any]]:
    """The recorded weights, the recorded outputs, and the arguments that no name shows."""
    recorded = reference / f"vit_p{patch_size}_io.npz"
    arrays = np.load(recorded)
    config = dict(zip(arrays["cfg_names"].tolist(), arrays["cfg_values"].tolist()))
    return reference / f"vit_p{patch_size}_backbone.pth", recorded, {"num_heads": int(config["num_heads"])}


@pytest.mark.smoke
@pytest.mark.parametrize("patch_size", [16, 8])
def test_agrees_with_the_recordings(reference, patch_size):
    weights, recorded, arguments = recording_of(reference, patch_size)
    lines = checked(weights, recorded, arguments=arguments).splitlines()
    inputs = [name for name in np.load(recorded).files if name.endswith("input_u8")]
    assert len(lines) == len(inputs) + 1
    assert all(recorded.name in line for line in lines[:-1])
    assert f"num_heads={arguments['num_heads']}" in lines[-1]


def test_one_wrong_value_is_caught(reference, tmp_path):
    weights, recorded, arguments = recording_of(reference, 8)
    state = {name: value.copy() for name, value in load_torch(weights).items()}
    state["blocks.1.mlp.fc2.weight"][3, 5] += 2.0
    save_torch(state, tmp_path / "changed.pth")
    with pytest.raises(ConversionError, match="do not compute what the original does(?s:.*)too much: tolerance"):
        checked(tmp_path / "changed.pth", recorded, arguments=arguments)


def test_a_wrong_number_of_heads_is_caught(reference):
    weights, recorded, arguments = recording_of(reference, 16)
    width = load_torch(weights)["cls_token"].shape[-1]
    other = next(heads for heads in (1, 2, 3) if width % heads == 0 and heads != arguments["num_heads"])
    with pytest.raises(ConversionError, match=f"with num_heads={other}.*--set changes them"):
        checked(weights, recorded, arguments={"num_heads": other})


def test_heads_that_nobody_knows(tmp_path):
    save_torch(official(vit()), tmp_path / "vit.pth")
    with pytest.raises(ConversionError, match="give --set num_heads=N"):
        checked(tmp_path / "vit.pth")


def test_nan_is_no_agreement(tmp_path):
    save_torch(official(LinearClassifier(4, 2), "linear."), tmp_path / "linear.pth")
    arrays = {"input": np.ones([1, 4], np.float32), "output": np.full([1, 2], np.nan, np.float32)}
    np.savez(tmp_path / "recorded.npz", **arrays)
    with pytest.raises(ConversionError, match="too much"):
        checked(tmp_path / "linear.pth", tmp_path / "recorded.npz")


def test_plain_recording_of_a_bfloat16_run(tmp_path):
    """Compared is the teacher's backbone."""
    state = {}
    for network in ("student", "teacher"):
        state[network] = {
            **official(vit(), "backbone."),
            **official(DINOHead(12, 6, hidden_dim=8, bottleneck_dim=4), "head."),
        }
    bits = {
        k: {n: (v.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16) for n, v in s.items()}
        for k, s in state.items()
    }
    bits["student"] = {f"module.{name}": value for name, value in bits["student"].items()}
    save_torch({**bits, "dino_loss": {"center": np.zeros([1, 6], np.float32)}}, tmp_path / "run.pth")

    layer = vit()
    teacher = {name: (value.view(np.uint32) >> 16 << 16).view(np.float32) for name, value in state["teacher"].items()}
    layer.set_state_dict({slot.name: slot.from_torch(teacher[f"backbone.{slot.torch_name}"]) for slot in slots(layer)})
    layer.eval()
    images = RANDOM.standard_normal((2, 3, 16, 24)).astype(np.float32)
    with paddle.no_grad():
        np.savez(tmp_path / "recorded.npz", input=images, output=layer(paddle.to_tensor(images)).numpy())
    text = checked(tmp_path / "run.pth", tmp_path / "recorded.npz", arguments={"num_heads": 3})
    assert text.startswith("verify: teacher.backbone, input 2 x 3 x 16 x 24: largest difference to recorded.npz ")


def test_features_of_dinov2_keep_their_order(tmp_path):
    weight, bias = RANDOM.standard_normal((3, 20)).astype(np.float32), np.ones(3, np.float32)
    save_torch({"weight": weight, "bias": bias}, tmp_path / "linear4_head.pth")
    features = RANDOM.standard_normal((2, 20)).astype(np.float32)
    np.savez(tmp_path / "recorded.npz", **{"a/input": features, "a/output": features @ weight.T + bias})
    assert "linear, input 2 x 20" in checked(tmp_path / "linear4_head.pth", tmp_path / "recorded.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.ones(2)}, "has no array 'input' or 'NAME/input', only image"),
        ({"a/input": np.ones([1, 4])}, "has a/input without a/output or a/forward"),
        ({"input": np.ones([1, 4]), "output": np.ones([1, 3])}, r"makes \[1, 2\].* has \[1, 3\]"),
        ({"input": np.ones([1, 5]), "output": np.ones([1, 2])}, "refuses an input of 1 x 5"),
        ({"input": np.array(["text"]), "output": np.ones([1, 2])}, "no readable recording"),
        ({"input": np.array([None]), "output": np.ones([1, 2])}, "no readable recording"),
    ],
)
def test_recordings_that_do_not_fit(tmp_path, arrays, message):
    save_torch(official(LinearClassifier(4, 2), "linear."), tmp_path / "linear.pth")
    np.savez(tmp_path / "recorded.npz", **arrays)
    with pytest.raises(ConversionError, match=message):
        checked(tmp_path / "linear.pth", tmp_path / "recorded.npz")


@pytest.mark.parametrize(
    ("name", "message"), [("none.npz", "No such file"), ("bad.npz", "no readable"), ("x.pth", ".npz")]
)
def test_files_that_are_no_recordings(tmp_path, name, message):
    save_torch(official(LinearClassifier(4, 2), "linear."), tmp_path / "linear.pth")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ConversionError, match=message):
        checked(tmp_path / "linear.pth", tmp_path / name)


@pytest.mark.smoke
def test_command_without_pytorch(reference, tmp_path, monkeypatch, capsys):
    weights, recorded, arguments = recording_of(reference, 8)
    heads = f"--set=num_heads={arguments['num_heads']}"
    convert_main([str(weights), heads, "--verify", str(recorded)])
    assert "verify: backbone, input " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit):
        convert_main([str(weights), heads, "--verify"])
    assert "pip install torch, or give --verify RECORDED.npz" in capsys.readouterr().err


# --- PyTorch ---


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize(
    "layer",
    [
        vit(qkv_bias=False),
        vit(num_register_tokens=2, pos_embed_mode="antialias", layer_scale=0.5),
        vit(pos_embed_mode="size", ffn="swiglu", layer_scale=0.5, mask_token=True),
        RegionTransformer(5, 3, 12, 2, 3),
        ResNet((1, 2, 1, 1), bottleneck=False, width=4),
        ResNet((1, 1, 2, 1), width=4, in_chans=1),
        XCiT(16, 3, 24, 2, 3, mlp_ratio=2.0),
        XCiT(8, 3, 24, 2, 3, tokens_norm=False, cls_attn_depth=1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_backbones_agree_with_pytorch(torch, tmp_path, layer):
    save_torch(official(layer), tmp_path / "backbone.pth")
    wanted = {"num_heads": 3} if hasattr(layer, "pos_embed") else {}
    wanted.update({name: getattr(layer, name) for name in ("pos_embed_mode",) if hasattr(layer, name)})
    if isinstance(layer, XCiT):
        wanted["tokens_norm"] = layer.cls_attn_blocks[0].tokens_norm
    lines = checked(tmp_path / "backbone.pth", arguments=wanted).splitlines()
    assert len(lines) == 3
    assert all("backbone, input 2 x " in line and "PyTorch" in line for line in lines[:-1])


@pytest.mark.parametrize("write", [save_torch, save_safetensors])
def test_a_conversion_that_goes_wrong_is_caught(torch, tmp_path, write):
    if write is save_safetensors:
        pytest.importorskip("safetensors")
    path = tmp_path / ("vit.pth" if write is save_torch else "vit.safetensors")
    write(official(vit()), path)
    conversion = convert(path, None, arguments={"num_heads": 3}).conversion
    assert "PyTorch" in verify(path, conversion)[0]
    # A square weight that is not transposed has the right shape, and only outputs tell.
    name = "blocks.1.attn.proj.weight"
    conversion.state[name] = conversion.state[name].T
    with pytest.raises(ConversionError, match=r"verify: backbone, input 2 x 3 x 32 x 32.*too much"):
        verify(path, conversion)


def test_recorded_checkpoints_agree_with_pytorch(torch, reference):
    for name in ("full_checkpoint.pth", "full_checkpoint_legacy_asgpu.pth", "full_bnhead_checkpoint.pth"):
        text = checked(reference / name, arguments={"num_heads": 1})  # divides every width
        for part in ("student.backbone", "student.head", "teacher.backbone", "teacher.head"):
            assert f"verify: {part}, input " in text


def test_names_of_other_projects_agree_with_pytorch(torch, tmp_path):
    """DINOv2's blocks in chunks, timm's registers without a position for [CLS] and its split attention, Lightning's."""
    state = official(vit(depth=2, layer_scale=0.5))
    chunked = {
        name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): v for name, v in state.items()
    }
    save_torch(chunked, tmp_path / "chunked.pth")
    assert "PyTorch" in checked(tmp_path / "chunked.pth", arguments={"num_heads": 3, "layer_scale": 0.5})

    timm = official(vit(num_register_tokens=2))
    timm["reg_token"], timm["pos_embed"] = timm.pop("register_tokens"), timm["pos_embed"][:, 1:]
    save_torch(timm, tmp_path / "timm.pth")
    assert "PyTorch" in checked(tmp_path / "timm.pth", arguments={"num_heads": 3})

    xcit = official(XCiT(16, 3, 24, 2, 3))
    for name in [name for name in xcit if name.startswith("cls_attn_blocks") and ".qkv." in name]:
        for part, value in zip("qkv", np.split(xcit.pop(name), 3)):
            xcit[name.replace(".qkv.", f".{part}.")] = value
    save_torch(xcit, tmp_path / "xcit.pth")
    assert "PyTorch" in checked(tmp_path / "xcit.pth")

    networks = {**official(vit(), "student.encoder."), **official(vit(), "teacher.encoder.")}
    save_torch({"epoch": 1, "state_dict": networks}, tmp_path / "last.ckpt")
    for key in ("student", "teacher"):
        assert "backbone" in checked(tmp_path / "last.ckpt", checkpoint_key=key, arguments={"num_heads": 3})


@pytest.mark.parametrize(("blocks", "avgpool"), [(2, False), (1, True)])
def test_official_probes_agree_with_pytorch(torch, tmp_path, blocks, avgpool):
    save_torch(official(vit()), tmp_path / "backbone.pth")
    linear = official(LinearClassifier(12 * (blocks + avgpool), 5), "module.")
    save_torch({"state_dict": linear}, tmp_path / "linear.pth")
    arguments = {"num_heads": 3, "n_last_blocks": blocks, "avgpool": avgpool}
    assert "verify: probe" in checked(tmp_path / "linear.pth", backbone=tmp_path / "backbone.pth", arguments=arguments)
    assert "verify: linear" in checked(tmp_path / "linear.pth")


def test_other_classifiers_agree_with_pytorch(torch, tmp_path):
    """DINOv2's, whose features are in another order, and timm's at the end of the network."""
    save_torch(official(vit(layer_scale=0.5, mask_token=True)), tmp_path / "backbone.pth")
    save_torch(official(nn.Linear(36, 5)), tmp_path / "head.pth")
    arguments = {"num_heads": 3, "n_last_blocks": 2}
    assert "verify: probe" in checked(tmp_path / "head.pth", backbone=tmp_path / "backbone.pth", arguments=arguments)
    save_torch({**official(vit()), **official(nn.Linear(12, 5), "head.")}, tmp_path / "timm.pth")
    assert "verify: probe" in checked(tmp_path / "timm.pth", arguments={"num_heads": 3})


def test_paddle_source_is_verified_as_written_for_pytorch(torch, tmp_path):
    probe = LinearProbe(vit, 5, n_last_blocks=2)
    save_pdparams({name: value.numpy() for name, value in probe.state_dict().items()}, tmp_path / "probe.pdparams")
    arguments = {"num_heads": 3, "n_last_blocks": 2, "avgpool": False}
    assert "verify: probe" in checked(tmp_path / "probe.pdparams", arguments=arguments)


def test_tensors_that_pytorch_does_not_find(torch, tmp_path):
    save_torch(official(LinearClassifier(4, 2), "linear."), tmp_path / "linear.pth")
    conversion = convert(tmp_path / "linear.pth", None).conversion
    conversion.report.matched.append("other")
    with pytest.raises(ConversionError, match="PyTorch finds no other in"):
        verify(tmp_path / "linear.pth", conversion)


def test_networks_that_only_paddle_knows(torch, tmp_path, monkeypatch):
    save_torch(official(nn.Conv2D(3, 4, 16), "conv."), tmp_path / "mine.pth")
    monkeypatch.setitem(BACKBONES._builders, "mine", lambda: nn.Sequential(("conv", nn.Conv2D(3, 4, 16))))
    with pytest.raises(
        ConversionError, match="no PyTorch original of mine.* is known here: give --verify RECORDED.npz"
    ):
        checked(tmp_path / "mine.pth", arch="mine")
