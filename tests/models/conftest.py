"""What the tests of models share."""

import paddle
import pytest


@pytest.fixture
def float64():
    """Layers and tensors of the test are float64."""
    default = paddle.get_default_dtype()
    paddle.set_default_dtype("float64")
    yield
    paddle.set_default_dtype(default)
