from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Literal, Optional, Union

import pytest

from passl import registry
from passl.config import Component, ConfigError, Required, check, component_parts, load
from passl.registry import Registry

if TYPE_CHECKING:
    from nowhere import Unknown

pytestmark = pytest.mark.smoke

OPTIMIZERS = Registry("optimizer")
LOSSES = Registry("loss")


@OPTIMIZERS.register()
class AdamW:
    def __init__(self, parameters, weight_decay: float = 0.04, betas: tuple[float, float] = (0.9, 0.999)):
        pass


@OPTIMIZERS.register()
def momentum(parameters, momentum: float, nesterov: bool = False):
    pass


@LOSSES.register()
class CELoss:
    def __init__(self, weight: float = 1.0, *args: Any, **more: Any):
        pass


@dataclass
class Settings:
    epochs: int
    device: Literal["cpu", "gpu"] = "cpu"
    output_dir: str = "./out"


SCHEMA = {
    "Global": Required(Settings),
    "Optimizer": Component(OPTIMIZERS, provided=("parameters",)),
    "Loss": {"Train": [LOSSES], "Eval": [LOSSES]},
    "Schedules": {"*": {"base": float}},
}


def problems(config: Mapping[str, Any], schema: Any = SCHEMA) -> list[str]:
    try:
        check(config, schema)
    except ConfigError as error:
        return error.problems
    return []


def test_a_good_configuration_passes():
    config = {
        "Global": {"epochs": 3, "device": "gpu"},
        "Optimizer": {"name": "AdamW", "weight_decay": 1, "betas": [0.9, 0.95]},
        "Loss": {"Train": [{"CELoss": {"weight": 1.0}}, {"CELoss": None}, {"name": "CELoss"}], "Eval": None},
        "Schedules": {"lr": {"base": 1e-3}, "wd": None},
    }
    assert problems(config) == []


def test_sections_may_be_absent_or_null_unless_required():
    assert problems({"Global": {"epochs": 1}, "Optimizer": None}) == []
    assert problems({}) == ["Global: is required"]
    assert problems({"Global": None}) == ["Global: is required"]


def test_all_errors_are_found_at_once_in_the_order_of_the_file():
    config = {
        "Global": {"device": "gpus", "epochs": "3"},
        "Optimzer": {"name": "AdamW"},
        "Optimizer": {"name": "AdamW", "weight_decy": 0.1, "parameters": [], "betas": [0.9]},
        "Loss": {"Train": [{"CELos": {}}, {"CELoss": {"wieght": 1}}, 3], "Eval": {"CELoss": {}}, "Test": []},
        "Schedules": {"lr": 3},
    }
    assert problems(config) == [
        "Global.device: expected one of 'cpu', 'gpu', got 'gpus'. Did you mean 'gpu'?",
        "Global.epochs: expected int, got '3'",
        "Optimzer: no such key. Did you mean 'Optimizer'?",
        "Optimizer.weight_decy: AdamW has no such argument. Did you mean 'weight_decay'?",
        "Optimizer.parameters: AdamW gets this argument from the program: remove it",
        "Optimizer.betas: expected [float, float], got [0.9]",
        "Loss.Train.0.CELos: unknown loss 'CELos'. Did you mean 'CELoss'?",
        "Loss.Train.1.CELoss.wieght: CELoss has no such argument. Did you mean 'weight'?",
        "Loss.Train.2: expected the loss as {name: ..., arguments}, got 3",
        "Loss.Eval: expected a list, got {'CELoss': {}}",
        "Loss.Test: no such key. Choose from: Eval, Train.",
        "Schedules.lr: expected a section with keys, got 3",
    ]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "AdamX"}, "Optimizer.name: unknown optimizer 'AdamX'. Did you mean 'AdamW'?"),
        ({"lr": 1}, "Optimizer: the optimizer needs a 'name'. Choose from: AdamW, momentum."),
        ({"name": 3}, "Optimizer: the optimizer needs a 'name'. Choose from: AdamW, momentum."),
        ("AdamW", "Optimizer: expected the optimizer as {name: ..., arguments}, got 'AdamW'"),
        ({"name": "momentum"}, "Optimizer.momentum: momentum needs this argument"),
        ({"name": "momentum", "momentum": None}, "Optimizer.momentum: expected float, got null"),
        (
            {"name": "momentum", "momentum": 1, "nestrov": 1},
            "Optimizer.nestrov: momentum has no such argument. Did you mean 'nesterov'?",
        ),
    ],
)
def test_a_wrong_component_is_explained(optimizer, message):
    assert problems({"Global": {"epochs": 1}, "Optimizer": optimizer}) == [message]


def test_extra_keyword_arguments_of_a_builder_swallow_no_typing_error():
    assert problems({"name": "CELoss", "more": 1, "args": 2}, LOSSES) == [
        "more: CELoss has no such argument. Choose from: weight.",
        "args: CELoss has no such argument. Choose from: weight.",
    ]


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "words"),
    [
        (int, [0, -3], [True, 1.0, "1"], "int"),
        (float, [0, 1.5], [True, "1e-6"], "float"),
        (bool, [True], [1, "yes"], "true or false"),
        (str, [""], [1, True], "text"),
        (Optional[int], [None, 1], ["a"], "int or null"),
        (Union[int, str], [1, "a"], [1.5, []], "int or text"),
        (Union[int, Sequence[int]], [1, [1, 2]], [[1.5], "ab"], "int or list of int"),
        (list[str], [[], ["a"]], [["a", 1], "a"], "list of text"),
        (list, [[], [1]], [{}, 1], "list"),
        (tuple[int, float], [[1, 2.5]], [[1], [1, 2, 3], [1.5, 2]], "[int, float]"),
        (tuple[int, ...], [[], [1, 2, 3]], [[1.5]], "list of int"),
        (Sequence, [[1, "a"]], ["ab"], "list"),
        (dict, [{}, {"a": 1}], [[], 1], "mapping"),
        (Mapping[str, float], [{"a": 1}], [{"a": "b"}], "mapping to float"),
        (Literal["a", 1], ["a", 1], ["b", True, 2], "one of 'a', 1"),
        (Optional[Literal["a"]], ["a", None], ["b"], "one of 'a' or null"),
        (Any, [1, [], {}], [], ""),
        (Callable[..., int], [1, "a"], [], ""),
    ],
)
def test_values_are_checked_against_annotations(annotation, good, bad, words):
    def build(value: annotation):
        pass

    build.__annotations__["value"] = annotation
    for value in good:
        assert problems({"value": value}, build) == []
    for value in bad:
        (problem,) = problems({"value": value}, build)
        assert problem.startswith(f"value: expected {words}, got ")


def test_an_annotation_for_the_type_checker_only_is_no_obstacle():
    def build(a: Unknown, b: int):
        pass

    assert problems({"a": "anything", "b": "x"}, build) == ["b: expected int, got 'x'"]


def test_arguments_in_slots_hold_components(monkeypatch):
    backbones, heads, transforms = Registry("backbone"), Registry("head"), Registry("transform")

    @backbones.register()
    def vit(patch_size: int = 16):
        pass

    @heads.register()
    def mlp(in_dim: int, out_dim: int):
        pass

    @transforms.register()
    class Resize:
        def __init__(self, size: int):
            pass

    def build(backbone: Callable, head: Optional[Callable] = None, transform: Optional[Callable] = None):
        pass

    slots = {"backbone": backbones, "head": heads, "transform": transforms}
    for name, table in slots.items():
        monkeypatch.setitem(registry.SLOTS, name, table)
    good = {"backbone": {"name": "vit"}, "head": {"name": "mlp", "out_dim": 3}, "transform": None}
    assert problems(good, build) == []
    assert problems({**good, "transform": [{"Resize": {"size": 3}}]}, build) == []
    assert problems({**good, "transform": {"name": "Resize", "size": 3}}, build) == []
    bad = {
        "backbone": {"name": "vit", "patch": 8},
        "head": {"name": "mlp", "in_dim": 3},
        "transform": [{"Resize": None}, {"name": "Resize", "size": "x"}],
    }
    assert problems(bad, build) == [
        "backbone.patch: vit has no such argument. Did you mean 'patch_size'?",
        "head.in_dim: mlp gets this argument from the program: remove it",
        "head.out_dim: mlp needs this argument",
        "transform.0.Resize.size: Resize needs this argument",
        "transform.1.size: expected int, got 'x'",
    ]
    assert problems({"backbone": None}, build) == ["backbone: is required"]
    assert problems({"backbone": []}, build) == ["backbone: expected the backbone as {name: ..., arguments}, got []"]


def test_a_dataclass_among_arguments_is_a_section():
    @dataclass
    class Outer:
        inner: Optional[Settings] = None
        width: int = 1

    assert problems({"inner": {"epochs": 3}, "width": 2}, Outer) == problems({"inner": None}, Outer) == []
    assert problems({"inner": {"epochs": "x", "divice": 1}}, Outer) == [
        "inner.epochs: expected int, got 'x'",
        "inner.divice: Settings has no such argument. Did you mean 'device'?",
    ]
    assert problems({"inner": {}}, Outer) == ["inner.epochs: Settings needs this argument"]
    assert problems({"inner": 3}, Outer) == ["inner: expected a mapping of arguments, got 3"]


def test_a_dataclass_may_have_a_plain_alternative():
    @dataclass
    class Outer:
        inner: Union[bool, Settings] = False

    assert problems({"inner": True}, Outer) == problems({"inner": {"epochs": 3}}, Outer) == []
    assert problems({"inner": {"epochs": "x"}}, Outer) == ["inner.epochs: expected int, got 'x'"]
    assert problems({"inner": 3}, Outer) == ["inner: expected true or false or a mapping of arguments, got 3"]


def test_messages_begin_with_the_file_that_set_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("Global: {epochs: a}\nOptimizer: {name: AdamW, lr: 1}\n")
    Path("main.yaml").write_text("_base_: base.yaml\nOptimizer: {name: momentum, weight_decay: 1}\n")
    config = load("main.yaml", ["Optimizer.nesterov=1", "Optimizers.x=1"])
    assert problems(config) == [
        "base.yaml: Global.epochs: expected int, got 'a'",
        "main.yaml: Optimizer.weight_decay: momentum has no such argument. Choose from: momentum, nesterov.",
        "-o: Optimizer.nesterov: expected true or false, got 1",
        "main.yaml: Optimizer.momentum: momentum needs this argument",
        "-o: Optimizers: no such key. Did you mean 'Optimizer'?",
    ]
    Path("base.yaml").write_text("Optimizer: null")
    assert problems(load("main.yaml"))[-1] == "main.yaml: Global: is required"


def test_a_component_is_taken_apart_in_both_forms():
    assert component_parts({"name": "Resize", "size": 3}) == ("Resize", {"size": 3})
    assert component_parts({"name": "Flip"}) == ("Flip", {})
    assert component_parts({"Resize": {"size": 3}}) == ("Resize", {"size": 3})
    assert component_parts({"Flip": None}) == ("Flip", {})
