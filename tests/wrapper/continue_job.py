"""The second half of a run, in a process of its own. Argument: the folder with the state that the first half left."""

from __future__ import annotations

import sys
from pathlib import Path

import paddle

from tests.wrapper.small import small_wrapper, train

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    wrapper = small_wrapper(version=sys.argv[2], return_layer=["stem", "body"], len_train_loader=2, epochs=3)
    for parameter in wrapper.parameters():  # nothing but what is loaded may count
        parameter.set_value(paddle.zeros_like(parameter))
    missing, unexpected = wrapper.set_state_dict(paddle.load(str(folder / "half.pdparams")))
    assert not missing
    assert not unexpected
    print(train(wrapper, 2, start=2))
