"""Every known family of files becomes the right weights, and nothing else becomes any."""

from __future__ import annotations

import argparse
import functools
import json

import numpy as np
import paddle
import pytest

from passl.convert import ConversionError, convert, read_weights, save_pdparams, save_safetensors
from passl.models import DINO, LinearProbe
from tests.convert import sources
from tests.convert.sources import (
    assert_holds,
    assert_same_tensors,
    classifier,
    converted,
    loaded,
    prefixed,
    run_state,
    save,
    state,
)
from tests.models.test_probe import images
from tests.models.weights import assert_close

# --- recorded files --------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("patch_size", [16, 8])
def test_recorded_vit(reference, patch_size):
    meta = json.loads((reference / "vit_meta.json").read_text())[f"vit_p{patch_size}"]
    path = reference / f"vit_p{patch_size}_backbone.pth"
    model = loaded(converted(path, arguments={"num_heads": meta["num_heads"]}))
    recorded = np.load(reference / f"vit_p{patch_size}_io.npz")
    for key in [key for key in recorded.files if key.endswith("/input_u8")]:
        size, x = key.split("/")[0], images(recorded[key])
        with paddle.no_grad():
            assert_close(model(x), recorded[f"{size}/forward"], 2e-5, key)
            rows = model.get_last_selfattention(x).numpy()[:, :, 0]
        assert_close(rows, recorded[f"{size}/last_attention_cls_row"], 1e-6, key)


def heads_of(path, x, expected) -> int:
    """Attention heads of a recorded run, which neither names nor shapes show: those that come nearest."""
    width = converted(path).state["teacher.backbone.cls_token"].shape[-1]
    errors = {}
    for heads in (n for n in range(1, width + 1) if width % n == 0):
        backbone = loaded(converted(path, arguments={"num_heads": heads})).teacher.backbone
        with paddle.no_grad():
            errors[heads] = np.abs(backbone(x).numpy() - expected).max()
    return min(errors, key=errors.get)


@pytest.mark.smoke
def test_recorded_runs(reference):
    if not (reference / "full_checkpoint_io.npz").exists():
        pytest.skip("this recording has no full_checkpoint_io.npz")
    recorded = np.load(reference / "full_checkpoint_io.npz")
    crops = [images(recorded["input224_u8"]), images(recorded["input96_u8"])]
    files = {f"full_checkpoint{kind}": "full" for kind in ("", "_legacy", "_asgpu", "_legacy_asgpu")}
    heads: dict = {}
    for stem, case in {**files, "full_bnhead_checkpoint": "full_bnhead"}.items():
        path = reference / f"{stem}.pth"
        if case not in heads:
            heads[case] = heads_of(path, crops[1], recorded[f"{case}/teacher/out96"])
        arguments = {"num_heads": heads[case]}
        method = loaded(converted(path, arguments=arguments))
        for key in ("student", "teacher"):
            network = getattr(method, key)
            with paddle.no_grad():
                for crop, size in zip(crops, ("224", "96")):
                    assert_close(network.backbone(crop), recorded[f"{case}/{key}/out{size}"], 2e-5, f"{stem} {size}")
                assert_close(network(crops), recorded[f"{case}/{key}/multicrop_head_eval"], 2e-5, stem)
                network.train()
                assert_close(network(crops), recorded[f"{case}/{key}/multicrop_head_train"], 2e-5, stem)
            alone = converted(path, arguments=arguments, checkpoint_key=key)
            assert alone.kind == "backbone"
            expected = {name: tensor.numpy() for name, tensor in network.backbone.state_dict().items()}
            assert_same_tensors(alone.state, expected)


def test_recorded_xcit(reference):
    if not (reference / "xcit.npz").exists():
        pytest.skip("this recording has no xcit.npz")
    recorded = np.load(reference / "xcit.npz")
    for key in [key for key in recorded.files if key.endswith("/input_u8")]:
        tag, size, _ = key.split("/")
        conversion = converted(reference / f"xcit_{tag}.pth", arguments={"tokens_norm": "tokens_norm" in tag})
        assert conversion.architecture.unknown == ()
        with paddle.no_grad():
            assert_close(loaded(conversion)(images(recorded[key])), recorded[f"{tag}/{size}"], 5e-5, key)


@pytest.mark.parametrize("part", ["patch", "region"])
def test_recorded_clemsgrs(reference, part):
    if not (reference / "hipt_meta.json").exists():
        pytest.skip("this recording has no hipt_*")
    meta = json.loads((reference / "hipt_meta.json").read_text())[part]
    recorded = np.load(reference / "hipt_models.npz")
    # A patch model's file does not show whose it is; a region model's does.
    mode = {"pos_embed_mode": "size"} if part == "patch" else {}
    arguments = {"num_heads": meta["num_heads"], **mode}
    model = loaded(converted(reference / f"hipt_{part}_backbone.pth", arguments=arguments))
    keys = [key for key in recorded.files if key.startswith(f"{part}/") and "/input" in key]
    assert keys
    for key in keys:
        size = key.rpartition("/")[0]
        x = images(recorded[key]) if key.endswith("u8") else paddle.to_tensor(recorded[key].astype("float32"))
        with paddle.no_grad():
            assert_close(model(x), recorded[f"{size}/forward"], 2e-5, key)
            if f"{size}/mask" in recorded:
                masked = model(x, paddle.to_tensor(recorded[f"{size}/mask"]))
                assert_close(masked, recorded[f"{size}/forward_masked"], 2e-5, key)


@pytest.mark.smoke
def test_recorded_linear_probes(reference):
    recorded, found = np.load(reference / "linear.npz"), 0
    for path in sorted(reference.glob("linear_*_checkpoint.pth.tar")):
        case = path.name.split("_")[1]
        meta = json.loads((reference / "eval_meta.json").read_text())[f"linear_{case}"]
        options = {"num_heads": meta["arch"]["num_heads"]}
        conversion = converted(path, backbone=reference / "linear_backbone_fullstyle.pth", arguments=options)
        assert conversion.kind == "probe"
        assert conversion.model["n_last_blocks"] == meta["args"]["n_last_blocks"]
        assert conversion.model["avgpool"] == meta["args"]["avgpool_patchtokens"]
        probe = loaded(conversion)
        with paddle.no_grad():
            logits = probe.predict(images(recorded["val_images_u8"])).numpy()
        weight, bias = (recorded[f"{case}/final_{name}"] for name in ("weight", "bias"))
        assert_close(logits, recorded[f"{case}/val_features"] @ weight.T + bias, 1e-4, case)
        accuracy = 100 * (logits.argmax(1) == recorded["val_labels"]).mean()
        assert accuracy == pytest.approx(recorded[f"{case}/val_loss_acc1_acc5_per_epoch"][-1, 1], abs=1e-4)
        found += 1
    if not found:
        pytest.skip("this recording has no linear_*_checkpoint.pth.tar")


# --- families of files -----------------------------------------------------------------------------------------------


def assert_is_run(conversion, expected):
    assert conversion.kind == "run"
    for network in ("student", "teacher"):
        assert_holds(conversion, expected[network], f"{network}.")
    assert conversion.state["dino_loss.center"].tolist() == [[0.5] * 10]
    assert conversion.report.left_over == conversion.report.missing == []


@pytest.mark.smoke
@pytest.mark.parametrize("use_bn", [False, True])
def test_runs_of_all_times(tmp_path, use_bn):
    expected = run_state(use_bn=use_bn)

    def variant(rename):
        networks = {key: {rename(k): v for k, v in expected[key].items()} for key in ("student", "teacher")}
        return converted(save({**networks, "dino_loss": expected["dino_loss"]}, tmp_path))

    old_head = {"head.mlp.": "backbone.head.layers.", "head.last_layer.": "backbone.projection_head.last_layer."}
    for rename in (
        lambda key: f"module.{key}",
        lambda key: f"module.module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("backbone.", "module.backbone.module."),
        lambda key: key.replace("head.", "module.backbone.head."),
        lambda key: key.replace("head.", "projection_head."),
        lambda key: functools.reduce(lambda k, old: k.replace(old, old_head[old]), old_head, key),
        lambda key: key.replace("backbone.", "module."),
        lambda key: (
            key.replace("last_layer.weight_", "last_layer.parametrizations.weight.original")
            .replace("originalg", "original0")
            .replace("originalv", "original1")
        ),
    ):
        assert_is_run(variant(rename), expected)


def test_lightning(tmp_path):
    expected = run_state()
    tensors = {}
    for network in ("student", "teacher"):
        for name, value in expected[network].items():
            tensors[f"{network}.{name.replace('backbone.', 'encoder.')}"] = value
    tensors["loss.center"] = expected["dino_loss"]["center"]
    moments = {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}, "param_groups": []}
    file = {"state_dict": tensors, "epoch": 3, "optimizer_states": [moments], "hyper_parameters": {"lr": 1e-4}}
    path = save(file, tmp_path, "epoch=3.ckpt")
    assert_is_run(converted(path), expected)
    teacher = {name[9:]: value for name, value in expected["teacher"].items() if name.startswith("backbone.")}
    assert_holds(converted(path, checkpoint_key="teacher"), teacher)
    del tensors["loss.center"]
    with pytest.raises(ConversionError, match=r"1 missing for .*dino_loss\.center"):
        converted(save(file, tmp_path))


@pytest.mark.smoke
@pytest.mark.parametrize("name", sources.BACKBONES)
def test_backbones_in_any_wrapping(tmp_path, name):
    expected = state(sources.BACKBONES[name]())
    prefixes = ("", "module.", "module.encoder.", "_orig_mod.", "backbone.", "model.", "network._orig_mod.module.vit.")
    for prefix in prefixes:
        assert_holds(converted(save(prefixed(prefix, expected), tmp_path)), expected)
    for container in ("model", "state_dict", "teacher", "student", "model_ema"):
        file = {container: expected, "epoch": 3, "best_acc1": np.array(7.5), "optimizer": {"state": {}}, "arch": "x"}
        assert_holds(converted(save(file, tmp_path)), expected)
    save_safetensors(expected, tmp_path / "weights.safetensors")
    assert_holds(converted(tmp_path / "weights"), expected)


def test_a_paddle_file_is_taken_as_it_is(tmp_path):
    """PASSL's and passl's own: Linear weights [in, out], the names of Paddle's batch norms, a gain [K]."""
    for name, build_one in sources.BACKBONES.items():
        layer = build_one()
        values = {key: tensor.numpy() for key, tensor in layer.state_dict().items()}
        save_pdparams(values, tmp_path / f"{name}.pdparams")
        conversion = converted(tmp_path / name)
        assert_same_tensors(conversion.state, values)
        assert conversion.report.transposed == []
    probe = LinearProbe(sources.vit, num_classes=3, n_last_blocks=2)
    values = {key: tensor.numpy() for key, tensor in probe.state_dict().items()}
    save_pdparams(values, tmp_path / "probe.pdparams")
    conversion = converted(tmp_path / "probe.pdparams", arguments={"n_last_blocks": 2, "avgpool": False})
    assert conversion.kind == "probe"
    assert_same_tensors(conversion.state, values)
    method = DINO(sources.resnet, functools.partial(sources.head.func, out_dim=10, use_bn=True))
    values = {key: tensor.numpy() for key, tensor in method.state_dict().items()}
    save_pdparams(values, tmp_path / "run.pdparams")
    conversion = converted(tmp_path / "run")
    assert conversion.kind == "run"
    assert_same_tensors(conversion.state, values, in_order=False)


def test_dinov2_backbones(tmp_path):
    for options in ({}, {"num_register_tokens": 4}, {"ffn": "swiglu"}):
        expected = state(sources.dinov2(depth=3, **options))
        conversion = converted(save(expected, tmp_path))
        assert_holds(conversion, expected)
        loaded(conversion)
        assert conversion.model.get("pos_embed_mode") == ("antialias" if "num_register_tokens" in options else None)
        chunks = {f"blocks.{int(name.split('.')[1]) // 2}.{name[7:]}" if name.startswith("blocks.") else name: value
                  for name, value in expected.items()}  # fmt: skip
        assert "blocks.1.2.norm1.weight" in chunks
        assert_holds(converted(save(chunks, tmp_path)), expected)


def test_dinov2_teacher_with_two_heads(tmp_path):
    parts = {"backbone.": state(sources.dinov2())}
    parts.update((f"{name}_head.", state(sources.head(num_layers=2), name)) for name in ("dino", "ibot"))
    tensors = {name: value for prefix, part in parts.items() for name, value in prefixed(prefix, part).items()}
    conversion = converted(save({"teacher": tensors}, tmp_path))
    assert conversion.kind == "network"
    for prefix, part in parts.items():
        assert_holds(conversion, part, f"teacher.{prefix}")
    assert_holds(converted(save({"teacher": tensors}, tmp_path), kind="backbone"), parts["backbone."])


@pytest.mark.parametrize(("blocks", "prefix"), [(4, ""), (1, ""), (4, "linear_head."), (1, "module.linear_head.")])
def test_dinov2_linear_heads(tmp_path, blocks, prefix):
    """Their columns are [cls_1 .. cls_n, mean]; the classes must come out as those columns say."""
    model = sources.dinov2(depth=5)
    backbone = save(state(model), tmp_path, "backbone.pth")
    weights = classifier(64 * (blocks + 1))
    path = save(prefixed(prefix, weights), tmp_path, "head.pth")
    conversion = converted(path, backbone=backbone)
    assert (conversion.model["n_last_blocks"], conversion.model["avgpool"]) == (blocks, True)
    probe = loaded(conversion)
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype("float32"))
    with paddle.no_grad():
        layers = [layer.numpy() for layer in probe.backbone.get_intermediate_layers(x, blocks)]
        features = np.concatenate([*(layer[:, 0] for layer in layers), layers[-1][:, 1:].mean(1)], axis=1)
        assert_close(probe.predict(x), features @ weights["weight"].T + weights["bias"], 1e-4)
    alone = converted(path)
    assert alone.kind == "linear"
    assert_same_tensors(alone.state, {name: conversion.state[name] for name in alone.state})


def test_timm_names(tmp_path):
    expected = state(sources.dinov2(num_register_tokens=4, ffn="swiglu", mask_token=False))
    names = {"register_tokens": "reg_token", "mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}
    timm = {functools.reduce(lambda k, old: k.replace(old, names[old]), names, k): v for k, v in expected.items()}
    timm["pos_embed"] = expected["pos_embed"][:, 1:]
    expected["pos_embed"] = np.concatenate([np.zeros_like(timm["pos_embed"][:, :1]), timm["pos_embed"]], 1)
    assert_holds(converted(save(timm, tmp_path)), expected)
    expected = state(sources.xcit())
    timm = {}
    for name, value in expected.items():
        if name.startswith("cls_attn_blocks.") and ".qkv." in name:
            timm.update((name.replace("qkv", part), third) for part, third in zip("qkv", np.split(value, 3)))
        else:
            timm[name.replace("pos_embeder.", "pos_embed.")] = value
    conversion = converted(save(timm, tmp_path))
    assert_holds(conversion, expected)
    assert len(conversion.report.matched) + len(conversion.counters) == len(timm)


@pytest.mark.parametrize(("name", "classifier_name"), [("vit", "head"), ("resnet", "fc"), ("resnet", "head.fc")])
def test_networks_with_a_classifier_become_probes(tmp_path, name, classifier_name):
    backbone = sources.BACKBONES[name]()
    weights = classifier(backbone.embed_dim)
    path = save({**state(backbone), **prefixed(f"{classifier_name}.", weights)}, tmp_path)
    conversion = converted(path)
    assert conversion.kind == "probe"
    assert_holds(conversion, state(backbone), "backbone.")
    probe = loaded(conversion)
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype("float32"))
    with paddle.no_grad():
        expected = probe.backbone(x).numpy() @ weights["weight"].T + weights["bias"]
        assert_close(probe.predict(x), expected, 1e-4 * np.abs(expected).max())
    alone = converted(path, kind="backbone")
    assert_holds(alone, state(backbone))
    assert sorted(alone.report.not_asked) == sorted(prefixed(f"{classifier_name}.", weights))


def test_a_run_of_clemsgrs_resizes_positions_their_way(tmp_path):
    """On one process their snapshots have no arguments and no `module.`; the official ones always have both."""
    for prefix, mode in (("", "size"), ("module.", None)):
        tensors = run_state()
        tensors["student"] = prefixed(prefix, tensors["student"])
        conversion = converted(save({"epoch": 1, "optimizer": {"state": {}}, **tensors}, tmp_path))
        assert conversion.model["backbone"].get("pos_embed_mode") == mode


@pytest.mark.smoke
def test_a_run_of_passl_resizes_positions_the_official_way(tmp_path):
    """It has neither arguments nor `module.`, as clemsgrs' snapshots, and comes from Paddle."""
    run = {"epoch": 1, "args": argparse.Namespace(), **run_state()}
    convert(save(run, tmp_path), tmp_path / "run")
    assert converted(tmp_path / "run").model["backbone"] == converted(save(run, tmp_path)).model["backbone"]


def test_weights_of_another_network_are_named(tmp_path):
    """As Global.pretrained_model would have them."""
    vit = sources.vit()
    resnet = save(state(sources.resnet()), tmp_path)
    with pytest.raises(
        ConversionError, match=r"belongs to VisionTransformer.* The file holds ResNet\(.*Model\.backbone"
    ):
        read_weights(resnet, vit, vit, "teacher")
    linear = save({"state_dict": prefixed("module.linear.", classifier(64))}, tmp_path, "linear.pth")
    with pytest.raises(ConversionError, match=r"it holds state_dict\.module\.linear\.weight, .*linear\.bias$"):
        read_weights(linear, vit, vit, "teacher")
    with pytest.raises(ConversionError, match=r"a folder, .*; the folder has linear\.pth, weights\.pth"):
        read_weights(tmp_path, vit, vit, "teacher")
