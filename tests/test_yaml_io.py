from __future__ import annotations

import math
import random
import string

import pytest

from passl.yaml_io import ConfigError, dump, parse

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("5e-4", 5e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1E5", -1e5),
        ("+1.5e+3", 1500.0),
        ("-.inf", -math.inf),
        ("8", 8),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, 2.0, a]", [1, 2.0, "a"]),
        ("{a: {b: [1]}}", {"a": {"b": [1]}}),
        # text, although older YAML reads something else
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("n", "n"),
        ("1_000", "1_000"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
        ("'1e-6'", "1e-6"),
        ('"true"', "true"),
        ("./a=b", "./a=b"),
    ],
)
def test_a_value_is_typed_by_its_spelling(text, value):
    parsed = parse(text, "x.yaml")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml: line 3, column 1: duplicate key 'a' (first on line 1)"),
        ("a:\n  b: 1\n  b: 1", "x.yaml: line 3, column 3: duplicate key 'b' (first on line 2)"),
        ("a: [{b: 1, b: 2}]", "x.yaml: line 1, column 12: duplicate key 'b' (first on line 1)"),
        ("a: [1, 2", "x.yaml: line 1, column 9: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "x.yaml: line 1, column 5: mapping values are not allowed here"),
        ("a: *b", "x.yaml: line 1, column 4: found undefined alias 'b'"),
        ("0: a", "x.yaml: line 1, column 1: a key must be text: quote it"),
        ("[a]: b", "x.yaml: line 1, column 1: a key must be text: quote it"),
        (
            "a: !!python/object:os.system {}",
            "x.yaml: line 1, column 4: tag 'tag:yaml.org,2002:python/object:os.system' is not allowed",
        ),
        ("a: !b c", "x.yaml: line 1, column 4: tag '!b' is not allowed"),
        ("a: 1\n---\nb: 2", "x.yaml: line 2, column 1: but found another document"),
        ("a: &x [*x]", "x.yaml: an alias contains itself"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, message):
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.yaml")
    assert caught.value.problems == [message]


def test_an_alias_is_a_copy_of_its_own():
    values = parse("a: &x {size: [1, 2]}\nb: *x\nc: {<<: *x, more: 1}", "x.yaml")
    values["a"]["size"].append(3)
    assert values["b"] == {"size": [1, 2]}
    assert values["c"] == {"size": [1, 2], "more": 1}


def test_a_key_beside_a_merged_mapping_wins_and_is_no_duplicate():
    text = "base: &x {<<: {lr: 1}, lr: 2}\nb: {<<: *x, lr: 3}\nc: {deep: {<<: *x}}"
    assert parse(text, "x.yaml") == {"base": {"lr": 2}, "b": {"lr": 3}, "c": {"deep": {"lr": 2}}}


def test_text_that_another_reader_would_take_for_something_else_is_written_quoted():
    for text in ("no", "1e-6", "1_000", "2026-01-31", "null", "true", "010", "<<", "="):
        assert dump({"a": text}) == f"a: '{text}'\n"


def test_lists_of_scalars_are_written_on_one_line():
    assert dump({"mean": [0.5, 1e-6], "t": [{"R": None}]}) == "mean: [0.5, 1.0e-06]\nt:\n- R: null\n"


def _random_value(rng: random.Random, depth: int):
    scalars = [
        lambda: rng.choice([None, True, False]),
        lambda: rng.randint(-(10**12), 10**12),
        lambda: rng.choice([rng.uniform(-1, 1) * 10 ** rng.randint(-20, 20), math.inf, 0.0, 1e16]),
        lambda: "".join(rng.choices(string.printable + "éü中文", k=rng.randint(0, 12))),
        lambda: rng.choice(["yes", "no", "on", "1e5", "5e-4", "1.", "~", "#", "a: b", "- x", "a\nb", " x ", "*x"]),
    ]
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(scalars)()
    if rng.random() < 0.5:
        return [_random_value(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    keys = ["".join(rng.choices(string.ascii_letters + ". -:1", k=5)) for _ in range(rng.randint(0, 4))]
    return {key: _random_value(rng, depth - 1) for key in keys}


def test_whatever_is_written_is_read_back_equal():
    rng = random.Random(0)
    for _ in range(500):
        value = _random_value(rng, depth=4)
        assert repr(parse(dump(value), "x.yaml")) == repr(value)
