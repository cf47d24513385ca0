from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path

import pytest

from passl.config import Config, ConfigError, load, to_yaml

pytestmark = pytest.mark.smoke


@pytest.fixture(autouse=True)
def _inside_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(**files: str) -> None:
    """Writes `name.yaml` for each argument."""
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")


def problems(path: str = "main.yaml", *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# --- files ---


def test_a_file_is_a_mapping_of_sections():
    write(main="Global: {epochs: 3}\nOptimizer: {name: AdamW, epsilon: 1e-8}\n")
    assert load("main.yaml") == {"Global": {"epochs": 3}, "Optimizer": {"name": "AdamW", "epsilon": 1e-8}}
    assert load(Path("main.yaml")) == load("main.yaml")


def test_what_cannot_be_read_is_named():
    Path("folder").mkdir()
    Path("latin.yaml").write_bytes(b"a: caf\xe9\n")
    write(empty="# nothing\n", items="- a\n", broken="a: [1\nb: 2\n")
    assert problems("missing.yaml") == ["missing.yaml: No such file or directory"]
    assert problems("folder") == ["folder: Is a directory"]
    assert problems("latin.yaml") == ["latin.yaml: not UTF-8 text (invalid continuation byte at byte 6)"]
    assert problems("empty.yaml") == ["empty.yaml: expected a mapping of sections, got null"]
    assert problems("items.yaml") == ["items.yaml: expected a mapping of sections, got ['a']"]
    assert problems("broken.yaml") == ["broken.yaml: line 2, column 2: expected ',' or ']', but got ':'"]


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    Path("main.yaml").write_bytes(b"\xef\xbb\xbfa: {b: 1}\n")
    assert load("main.yaml") == {"a": {"b": 1}}


# --- inheritance ---


def test_mappings_merge_and_everything_else_replaces():
    write(
        base="a: {x: 1, y: {z: 2, w: [1, 2]}}\nb: {k: 1}\nc: 3\nd: {k: 1}\n",
        main="_base_: base.yaml\na: {y: {w: [3]}, new: 4}\nb: null\nc: {k: 1}\n",
    )
    assert load("main.yaml") == {
        "a": {"x": 1, "y": {"z": 2, "w": [3]}, "new": 4},
        "b": None,
        "c": {"k": 1},
        "d": {"k": 1},
    }


def test_bases_are_relative_to_the_file_and_later_ones_win():
    Path("base").mkdir()
    Path("run").mkdir()
    write(**{"base/a": "s: {x: a, y: a, z: a}", "base/b": "_base_: c.yaml\ns: {y: b}", "base/c": "s: {w: c}"})
    write(**{"run/main": "_base_: [../base/a.yaml, ../base/b.yaml]\ns: {z: main}"})
    config = load("run/main.yaml")
    assert config == {"s": {"x": "a", "y": "b", "z": "main", "w": "c"}}
    sources = [config.source(("s", key)) for key in "xyzw"]
    assert sources == ["base/a.yaml", "base/b.yaml", "run/main.yaml", "base/c.yaml"]


def test_a_changed_name_drops_the_arguments_of_the_base():
    write(
        base="Optimizer: {name: AdamW, beta1: 0.9}\nModel: {backbone: {name: vit, depth: 3}, k: 1}\n",
        main="_base_: base.yaml\nOptimizer: {mu: 0.9, name: Momentum}\nModel: {backbone: {name: xcit}}\n",
        same="_base_: base.yaml\nOptimizer: {beta2: 0.99, name: AdamW}\nModel: {name: DINO}\n",
    )
    assert load("main.yaml") == {
        "Optimizer": {"mu": 0.9, "name": "Momentum"},
        "Model": {"backbone": {"name": "xcit"}, "k": 1},
    }
    assert load("same.yaml") == {
        "Optimizer": {"name": "AdamW", "beta1": 0.9, "beta2": 0.99},
        "Model": {"backbone": {"name": "vit", "depth": 3}, "k": 1, "name": "DINO"},
    }


def test_a_base_that_is_missing_or_no_path_is_named_with_who_asks():
    write(main="_base_: other.yaml", number="_base_: 3", bad="_base_: broken.yaml", broken="a: 1\na: 2")
    assert problems() == ["main.yaml: _base_: other.yaml: No such file or directory"]
    assert problems("number.yaml") == ["number.yaml: _base_: expected a path or a list of paths, got 3"]
    assert problems("bad.yaml") == ["broken.yaml: line 2, column 1: duplicate key 'a' (first on line 1)"]


def test_a_cycle_is_shown():
    write(a="_base_: b.yaml", b="_base_: [c.yaml, a.yaml]", c="x: 1", alone="_base_: ./alone.yaml")
    assert problems("a.yaml") == ["b.yaml: _base_: a cycle: a.yaml -> b.yaml -> a.yaml"]
    assert problems("alone.yaml") == ["alone.yaml: _base_: a cycle: alone.yaml -> alone.yaml"]


def test_one_base_on_two_ways_is_no_cycle():
    write(
        root="s: {k: [1]}",
        a="_base_: root.yaml",
        b="_base_: root.yaml",
        main="_base_: [a.yaml, b.yaml]",
    )
    assert load("main.yaml") == {"s": {"k": [1]}}


# --- overrides ---

MAIN = """
Global: {epochs: 100, pretrained_model: null, seed: 1}
Model: {name: DINO, backbone: {name: vit_small, patch_size: 16, layers: [1, 2]}, head: {name: DINOHead}}
Data:
  transform:
  - name: Resize
    size: 256
  - CenterCrop: {size: 224}
  - Flip:
"""


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("Global.epochs=3", ["Global", "epochs"], 3),
        ("Global.lr=5e-4", ["Global", "lr"], 5e-4),
        ("Global.pretrained_model=./a=b/c", ["Global", "pretrained_model"], "./a=b/c"),
        ("Global.seed=", ["Global", "seed"], None),
        ("Global.seed=null", ["Global", "seed"], None),
        (" Global.seed = true ", ["Global", "seed"], True),
        ("Global.seed=yes", ["Global", "seed"], "yes"),
        ("Global.flags.FLAGS_x=1", ["Global", "flags", "FLAGS_x"], 1),
        ("Global.pretrained_model.path=x", ["Global", "pretrained_model", "path"], "x"),
        ("Global={}", ["Global"], {}),
        ("New.a.b=[1, {c: 2}]", ["New", "a", "b"], [1, {"c": 2}]),
        ("Model.backbone.layers=[3]", ["Model", "backbone", "layers"], [3]),
        ("Model.backbone.layers.1=5", ["Model", "backbone", "layers"], [1, 5]),
        ("Data.transform.0.size=[8, 9]", ["Data", "transform", 0], {"name": "Resize", "size": [8, 9]}),
        ("Data.transform.0.name=Crop", ["Data", "transform", 0], {"name": "Crop"}),
        ("Data.transform.1.CenterCrop.size=8", ["Data", "transform", 1], {"CenterCrop": {"size": 8}}),
        ("Data.transform.1.size=8", ["Data", "transform", 1], {"name": "CenterCrop", "size": 8}),
        ("Data.transform.1.name=Resize", ["Data", "transform", 1], {"name": "Resize"}),
        ("Data.transform.2.p=0.1", ["Data", "transform", 2], {"name": "Flip", "p": 0.1}),
        ("Data.transform.2.Flip.p=0.1", ["Data", "transform", 2], {"Flip": {"p": 0.1}}),
        ("Data.transform.1={name: Flip}", ["Data", "transform", 1], {"name": "Flip"}),
        ("Model.backbone.name=vit_base", ["Model", "backbone"], {"name": "vit_base"}),
        ("Model.backbone.name=vit_small", ["Model", "backbone", "patch_size"], 16),
        ("Model.name=Probe", ["Model"], {"name": "Probe"}),
    ],
)
def test_an_override_sets_one_value(override, path, value):
    write(main=MAIN)
    config, before = load("main.yaml", [override]), load("main.yaml")
    found = config
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)
    untouched = [key for key in before if key != path[0]]
    assert {key: config[key] for key in untouched} == {key: before[key] for key in untouched}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("Global.epochs", "-o: Global.epochs: expected key=value"),
        ("", "-o: : expected key=value"),
        ("=3", "-o: =3: expected key=value with a dotted key such as Global.epochs"),
        (
            "a..b=3",
            "-o: a..b=3: expected key=value with a dotted key such as Global.epochs",
        ),
        ("Global.epochs.x=3", "-o: Global.epochs.x: Global.epochs is 100, not a section or a list"),
        ("Data.transform.3.size=3", "-o: Data.transform.3: Data.transform has only 3 items (the first is 0)"),
        ("Data.transform.3=3", "-o: Data.transform.3: Data.transform has only 3 items (the first is 0)"),
        (
            "Data.transform.Resize.size=3",
            "-o: Data.transform.Resize: Data.transform is a list: write an index",
        ),
        (
            "Data.transform.-1=3",
            "-o: Data.transform.-1: Data.transform is a list: write an index",
        ),
        ("Global.seed=[1", "-o: Global.seed: line 1, column 3: expected ',' or ']', but got '<stream end>'"),
        ("Global.seed=!!python/name:os.system", "-o: Global.seed: line 1, column 1: tag"),
    ],
)
def test_an_override_that_cannot_be_applied_is_explained(override, message):
    write(main=MAIN)
    (problem,) = problems("main.yaml", override)
    assert problem.startswith(message)


def test_all_bad_overrides_are_named_together():
    write(main=MAIN)
    assert len(problems("main.yaml", "a", "Global.epochs=1", "Global.epochs.x=3")) == 2


def test_later_overrides_win():
    write(main=MAIN)
    assert load("main.yaml", ["Global.epochs=1", "Global.epochs=2"])["Global"]["epochs"] == 2


def test_the_order_of_a_new_name_and_its_arguments_does_not_matter():
    write(main=MAIN)
    overrides = ["Model.backbone.name=vit_base", "Model.backbone.depth=3", "Model.backbone.new.k=1"]
    expected = {"name": "vit_base", "depth": 3, "new": {"k": 1}}
    for order in (overrides, overrides[::-1], overrides[1:] + overrides[:1]):
        assert load("main.yaml", order)["Model"]["backbone"] == expected


# --- where a value comes from ---


def test_every_value_knows_who_set_it():
    write(
        base="Optimizer: {name: AdamW, lr: 1}\nModel: {name: A, k: {x: 1}}\nList: [{a: 1}]",
        main="_base_: base.yaml\nOptimizer: {lr: 2, nested: {k: 1}}\nModel: {name: B, k: {x: 2}}",
    )
    config = load("main.yaml", ["Optimizer.epsilon=1", "List.0.b=2", "New.x=1"])
    expected = {
        "base.yaml": [("Optimizer",), ("Optimizer", "name"), ("List",), ("List", 0, "a")],
        "main.yaml": [
            (),
            ("Gone",),
            ("Optimizer", "lr"),
            ("Optimizer", "nested", "k"),
            ("Model", "k", "x"),
        ],
        "-o": [("Optimizer", "epsilon"), ("List", 0, "b"), ("New",), ("New", "x")],
    }
    for source, paths in expected.items():
        assert {config.source(path) for path in paths} == {source}


def test_copies_keep_the_sources():
    write(main=MAIN)
    config = load("main.yaml", ["Global.epochs=1"])
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert isinstance(twin, Config)
        assert twin.source(("Global", "epochs")) == "-o"


def test_the_error_can_be_pickled():
    assert pickle.loads(pickle.dumps(ConfigError(["a", "b"]))).problems == ["a", "b"]


# --- writing ---


def test_the_resolved_configuration_is_runnable_again():
    write(base=MAIN, main="_base_: base.yaml\nGlobal: {note: 'no', lr: 1e-6, text: '1e-6'}\n")
    config = load("main.yaml", ["Data.transform.1.size=[3, 4]", "Global.name=中文"])
    write(again=to_yaml(config))
    assert load("again.yaml") == config


def test_overriding_every_leaf_with_itself_changes_nothing():
    write(main=MAIN)
    config = load("main.yaml")

    def leaves(value, path=()):
        if not isinstance(value, (dict, list)):
            yield ".".join(path), value
            return
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, str(key)))

    overrides = [f"{path}={'' if value is None else value}" for path, value in leaves(config)]
    assert len(overrides) == 13
    for seed in range(20):
        random.Random(seed).shuffle(overrides)
        assert load("main.yaml", overrides) == config


def test_another_name_of_the_run_changes_nothing_else():
    write(
        base=MAIN.replace("Global: {", "Global: {name: first, ", 1), main="_base_: base.yaml\nGlobal: {name: second}\n"
    )
    first = load("base.yaml")
    for renamed in (load("main.yaml"), load("base.yaml", ["Global.name=second"])):
        assert renamed["Global"].pop("name") == "second"
        assert renamed == {**first, "Global": {key: first["Global"][key] for key in first["Global"] if key != "name"}}
