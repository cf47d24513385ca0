"""What is left over, missing or damaged is an error that says what to do, and the report names all of it."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import paddle
import pytest

from passl.convert import ConversionError, convert
from passl.registry import BACKBONES
from tests.convert import sources
from tests.convert.sources import (
    assert_holds,
    classifier,
    converted,
    prefixed,
    run_state,
    save,
    state,
)

# --- strictness and report -------------------------------------------------------------------------------------------


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


@pytest.mark.smoke
def test_what_does_not_fit_is_an_error_that_says_what_to_type(tmp_path):
    vit, run = state(sources.vit()), run_state()
    network = prefixed("backbone.", vit)
    wide = {**vit, "norm.weight": np.ones(65, np.float32)}
    counted = {**vit, "norm.weight": np.ones(64, np.int64)}
    half_head = {**network, "head.mlp.0.weight": np.ones((12, 64), np.float32), "head.mlp.0.bias": np.ones(12)}
    cases = [
        ({**vit, "extra.a": vit["norm.bias"], "extra.b": vit["norm.bias"]}, {}, r"2 left over .*--allow 'extra\.\*'"),
        ({**vit, "extra": vit["norm.bias"]}, {}, r"1 left over .*--allow 'extra'"),
        (without(vit, "blocks.1.mlp.fc1.bias"), {}, r"1 missing for .*: blocks\.\*\.mlp\.fc1\.bias"),
        (wide, {}, r"norm\.weight \(file \[65\], architecture \[64\]\)"),
        (counted, {}, r"norm\.weight \(file int64, architecture floating-point"),
        ({"a": vit["norm.bias"]}, {}, r"no known family .*--arch NAME"),
        ({"a": vit["norm.bias"]}, {"arch": "vit_small"}, "no tensor of the file belongs to vit_small"),
        (half_head, {}, r"head\.mlp\..* left|left over .*head\.mlp.*--kind backbone"),
        (
            {**half_head, "head.last_layer.weight_v": np.ones((10, 8))},
            {},
            r"it has no last_layer\.weight_g.*--kind backbone",
        ),
        ({"model": vit, "model_ema": vit}, {}, r"twice.*--allow 'model_ema\.\*' or --allow 'model\.\*'"),
        ({"student": run["student"], "teacher": run["teacher"]}, {}, r"1 missing .*dino_loss\.center"),
        ({"student": network, "teacher": network}, {}, "no projection head.*--checkpoint-key teacher"),
        ({"teacher": network}, {"checkpoint_key": "student"}, "has no student: --checkpoint-key teacher"),
        (vit, {"kind": "run"}, "has no student"),
        (vit, {"kind": "linear"}, "holds no linear classifier"),
        (vit, {"kind": "zoo"}, r"--kind \(zoo\) must be one of run, network"),
        (vit, {"kind": "linear", "checkpoint_key": "teacher"}, "--checkpoint-key is for a backbone"),
        (vit, {"arch": "vit_smal"}, "vit_small"),
        (vit, {"arch": "vit_small"}, "of another shape than in vit_small"),
        (vit, {"arguments": {"num_heads": 5}}, "must be a multiple of num_heads"),
        (vit, {"arguments": {"num_haeds": 4}}, "num_haeds"),
        (vit, {"arguments": {"depth": "x"}}, "architecture"),
        (classifier(64), {"arguments": {"n_last_blocks": "x"}}, "n_last_blocks"),
        ({"a": "text", "b": [1, 2]}, {}, "holds no tensors, only a, b"),
        ({}, {}, "holds no tensors"),
        ([vit["norm.bias"]], {}, "holds a list, where a state dict"),
        ({"vit": [vit]}, {}, "no known family"),
        ({**vit, "list": [vit["norm.bias"]]}, {}, r"left over .*list\.0"),
    ]
    for tensors, options, message in cases:
        path = save(tensors, tmp_path)
        with pytest.raises(ConversionError, match=message) as caught:
            convert(path, tmp_path / "out/new", **options)
        assert str(caught.value).startswith(str(path)), caught.value
        assert not (tmp_path / "out").exists()


def test_allowed_keys_are_left_out(tmp_path):
    vit = state(sources.vit())
    path = save({"model": {**vit, "extra.a": vit["norm.bias"]}, "model_ema": prefixed("module.", vit)}, tmp_path)
    conversion = converted(path, allow=["model_ema.*", "*.extra.*"])
    assert_holds(conversion, vit)
    assert conversion.report.left_over == []
    assert sorted(conversion.report.allowed) == sorted(["model.extra.a", *prefixed("model_ema.module.", vit)])


def test_the_report_names_every_tensor_once(tmp_path):
    resnet = state(sources.resnet())
    file = {"state_dict": {**prefixed("module.", resnet), **prefixed("module.fc.", classifier(32))}}
    report = converted(save(file, tmp_path)).report
    assert sorted(report.matched + report.counters) == sorted(prefixed("state_dict.", file["state_dict"]))
    assert report.transposed == ["state_dict.module.fc.weight"]
    assert ("state_dict.module.bn1.running_mean", "backbone.bn1._mean") in report.renamed
    assert ("state_dict.module.fc.weight", "linear.linear.weight") in report.renamed
    text = "\n".join(report.lines())
    assert f"{len(report.matched)} matched" in text
    assert "1 transposed" in text
    assert "0 left over" in text


def test_a_backbone_of_ones_own(tmp_path):
    """Any registered Layer can be named: its own names count, also where they look like wrappings."""
    sequential = state(sources.vit())

    @BACKBONES.register("Wrapped")
    class Wrapped(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = sources.vit()
            self.fc = paddle.nn.Linear(64, 2)
            self.embed_dim = 2

    try:
        tensors = {**prefixed("encoder.", sequential), **prefixed("fc.", classifier(64, 2))}
        path = save({"model": prefixed("module.", tensors)}, tmp_path)
        conversion = converted(path, arch="Wrapped", kind="backbone")
        assert conversion.report.left_over == conversion.report.not_asked == []
        assert_holds(conversion, tensors)
    finally:
        del BACKBONES._builders["Wrapped"]


# --- damaged states --------------------------------------------------------------------------------------------------


def mutated(tensors, generator):
    """One to three keys dropped, renamed, doubled or in another shape or type."""
    tensors = dict(tensors)
    for _ in range(generator.integers(1, 4)):
        arrays = [key for key, value in tensors.items() if isinstance(value, np.ndarray)]
        if not arrays:
            break
        key = arrays[generator.integers(len(arrays))]
        value = tensors[key]
        words = str(key).split(".")
        place = generator.integers(len(words))
        numbers = [*words[:place], str(generator.choice([0, 1, 7, 10**9, -1])), *words[place + 1 :]]
        action = generator.integers(9)
        if action == 0:
            del tensors[key]
        elif action == 1:
            tensors[".".join(numbers)] = tensors.pop(key)
        elif action == 2:
            tensors[".".join(words[place:])] = tensors.pop(key)
        elif action == 3:
            tensors[f"{generator.choice(['module', 'teacher', 'head', 'model.linear', 'x'])}.{key}"] = value
        elif action == 4:
            tensors[key] = value.reshape(-1)
        elif action == 5:
            tensors[key] = value[..., None]
        elif action == 6:
            tensors[key] = np.zeros((0, *value.shape[1:]), value.dtype)
        elif action == 7:
            tensors[key] = generator.choice(
                np.array(["text", 3, None, [value], {}, value.astype("int8")], dtype=object)
            )
        else:
            tensors.setdefault(3, value)
    return tensors


@pytest.mark.parametrize("name", [*sources.BACKBONES, "run", "linear"])
def test_damaged_states_end_in_an_error_or_in_what_is_there(tmp_path, name):
    if name == "run":
        parts = run_state("resnet", use_bn=True)
        tensors = {f"{part}.{key}": value for part in parts for key, value in parts[part].items()}
    else:
        tensors = prefixed("linear.", classifier(64)) if name == "linear" else state(sources.BACKBONES[name]())
    original = {value.tobytes() for value in tensors.values()}
    fine = 0
    for seed in range(45):
        path = save(OrderedDict(mutated(tensors, np.random.default_rng(seed))), tmp_path)
        try:
            conversion = converted(path)
        except ConversionError:
            continue
        fine += 1
        for slot in conversion.layout:
            found = slot.to_torch(conversion.state[slot.name])
            assert found.shape == slot.torch_shape
            assert found.tobytes() in original, (seed, slot.name)
    assert fine < 45
