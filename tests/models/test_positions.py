"""Resizing position embeddings by operations of a program, as exported ones do."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from passl.models.positions import MODES, resize_matrix, symbolic_resize_matrices

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 30])
def test_the_matrices_of_a_program_are_those_of_numpy(mode, rows):
    for columns in (4, 7):
        made = symbolic_resize_matrices(mode, 4, paddle.to_tensor(rows), paddle.to_tensor(columns))
        for matrix, size in zip(made, (rows, columns)):
            exact = np.eye(4) if rows == columns == 4 else resize_matrix(mode, 4, size, np.float32)
            np.testing.assert_allclose(matrix.numpy(), exact, rtol=0, atol=1e-7)
