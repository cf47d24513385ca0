from __future__ import annotations

import subprocess
import sys

import pytest

from passl.registry import Registry, did_you_mean

pytestmark = pytest.mark.smoke


@pytest.fixture
def shapes() -> Registry:
    registry = Registry("shape")

    @registry.register()
    class Circle:
        pass

    @registry.register("square", "box")
    def make_square():
        return "square"

    return registry


def test_a_builder_is_found_under_its_own_name_or_the_given_names(shapes):
    assert shapes.names() == ["Circle", "box", "square"]
    assert shapes.get("Circle").__name__ == "Circle"
    assert shapes.get("box") is shapes.get("square")
    assert "box" in shapes
    assert "make_square" not in shapes


def test_an_unknown_name_is_answered_with_the_nearest(shapes):
    with pytest.raises(ValueError, match="^unknown shape 'circel'. Did you mean 'Circle'?"):
        shapes.get("circel")


def test_a_hopeless_name_is_answered_with_all(shapes):
    with pytest.raises(ValueError, match="^unknown shape 'xyz'. Choose from: Circle, box, square.$"):
        shapes.get("xyz")


def test_a_name_is_given_once(shapes):
    with pytest.raises(ValueError, match="shape 'box' is registered already, by .*make_square"):
        shapes.register("box")(lambda: None)


def test_forgotten_parentheses_are_an_error(shapes):
    with pytest.raises(TypeError, match="write @register"):

        @shapes.register
        class Triangle:
            pass


def test_without_choices_there_is_nothing_to_suggest():
    assert did_you_mean("x", []) == "There are none to choose from."


def test_importing_the_light_modules_imports_no_heavy_one():
    program = "import sys, passl.config; print(sorted({'numpy', 'paddle', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
