"""What `test_sharding.py` starts on two processes: sharded optimizers beside whole ones, and gradients that wait.

Each process writes what it found to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import paddle

from passl import checkpoint, distributed
from passl.engine.optim import LARS, AdamW, Momentum, Optimizer
from passl.engine.sharding import ShardedOptimizer

# Parameters of several sizes; the second does not move in the first steps, as a frozen last layer.
SHAPES = {"blocks.weight": [30, 40], "last.weight": [25, 50], "norm.weight": [40], "norm.bias": [40], "gain": [1]}
LATE, LATE_STEPS = "last.weight", 2
KINDS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda groups: AdamW(groups, clip_norm=0.3),
    "Momentum": lambda groups: Momentum(groups, clip_norm=0.5, clip_mode="global", use_nesterov=True),
    "LARS": lambda groups: LARS(groups, weight_decay=1e-3),
}


def make(kind: str, sharded: bool) -> Optimizer:
    rng = np.random.default_rng(1)
    parameters = []
    for name, shape in SHAPES.items():
        parameter = paddle.create_parameter(shape, "float32")
        parameter.set_value(rng.normal(size=shape).astype(np.float32))
        parameter.name = name
        parameters.append(parameter)
    groups = [
        {"params": parameters[:2], "weight_decay": 1.0, "learning_rate": 0.5},
        {"params": parameters[2:], "weight_decay": 0.0},
    ]
    return ShardedOptimizer(KINDS[kind], groups) if sharded else KINDS[kind](groups)


def steps(optimizer: Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        rng = np.random.default_rng(step)
        loss = paddle.zeros([1])
        for parameter in optimizer.parameters:
            gradient = paddle.to_tensor(rng.normal(size=parameter.shape).astype(np.float32))
            if parameter.name != LATE or step >= LATE_STEPS:
                loss = loss + (parameter * gradient).sum()
        loss.backward()
        optimizer.set(0.1 / (1 + step), 0.04 * (1 + step))
        optimizer.clip_gradients()
        optimizer.step()
        optimizer.clear_grad()


def weights(optimizer: Optimizer) -> list[bytes]:
    return [parameter.numpy().tobytes() for parameter in optimizer.parameters]


def state_bytes(state: dict[str, Any]) -> int:
    return sum(value.numpy().nbytes for value in state.values() if isinstance(value, paddle.Tensor))


def saved(optimizer: Optimizer, path: Path) -> Optional[bytes]:
    """The file that the first process writes; all call this, as the state of a sharded optimizer is gathered."""
    state = optimizer.state_dict()
    if distributed.is_main():
        for key, value in state.items():
            if isinstance(value, paddle.Tensor):
                value.name = key
        checkpoint.write(dict(sorted(state.items())), path)
    distributed.barrier()
    return path.read_bytes() if distributed.is_main() else None


def compare(kind: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    whole, sharded = make(kind, False), make(kind, True)
    files = {}
    for name, optimizer in (("whole", whole), ("sharded", sharded)):
        steps(optimizer, 0, 1)
        files[f"{name} early"] = saved(optimizer, folder / f"{kind}-{name}-early.pdopt")
        steps(optimizer, 1, 4)
        files[name] = saved(optimizer, folder / f"{kind}-{name}.pdopt")
    found["weights"] = weights(whole) == weights(sharded)
    found["file"] = files["whole"] == files["sharded"]
    found["early file"] = files["whole early"] == files["sharded early"]
    found["share"] = state_bytes(sharded.inner.state_dict()) / state_bytes(whole.state_dict())
    steps(whole, 4, 6)
    steps(sharded, 4, 6)
    found["more steps after saving"] = weights(whole) == weights(sharded)
    for stage, done in (("-early", 1), ("", 4)):
        expected = make(kind, False)
        steps(expected, 0, 6)
        for is_sharded in (False, True):
            resumed, source = make(kind, is_sharded), make(kind, False)
            steps(source, 0, done)
            for target, parameter in zip(resumed.parameters, source.parameters):
                target.set_value(parameter.numpy())
            resumed.load_state_dict(checkpoint.read(folder / f"{kind}-sharded{stage}.pdopt"))
            again = saved(resumed, folder / f"{kind}-again.pdopt")
            found[f"saved again{stage}, sharded {is_sharded}"] = again == files[f"sharded{stage.replace('-', ' ')}"]
            steps(resumed, done, 6)
            found[f"resumed{stage}, sharded {is_sharded}"] = weights(resumed) == weights(expected)
    return found


def half_precision_state() -> bool:
    """A state with master weights goes through a sharded optimizer as it is; one layer has not stepped."""
    values = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items() if name != LATE}
    entries: dict[str, Any] = {"optimizer": "AdamW", "master_weights": values}
    for name, value in values.items():
        entries.update({f"{name}_fp32_master_0_moment{n}_0": value * n for n in (1, 2)})
        entries.update({f"{name}_fp32_master_0_beta{n}_pow_acc_0": np.full([1], 0.9, np.float32) for n in (1, 2)})
    optimizer = make("AdamW", True)
    optimizer.load_state_dict(entries)
    state = optimizer.state_dict()
    if not distributed.is_main():
        return True
    masters = state.pop("master_weights")
    same = all((np.asarray(state[key]) == entries[key]).all() for key in state if key != "optimizer")
    return (
        same
        and all((masters[n].numpy() == values[n]).all() for n in values)
        and ({*state, "master_weights"} == set(entries) and set(masters) == set(values))
    )


def waiting_gradients(recomputes: bool) -> list[float]:
    """A gradient after the backward of each of two micro-batches; the data are 1 and 10, plus the rank."""
    layer = paddle.nn.Linear(1, 1)
    if recomputes:
        distributed.expect_recompute(layer)
    model = distributed.data_parallel(layer)
    gradients = []
    for number, value in enumerate((1.0, 10.0)):
        with distributed.synchronised(model, now=number == 1):
            model(paddle.full([1, 1], value + distributed.rank())).sum().backward()
        gradients.append(layer.weight.grad.item())
    return gradients


def main() -> None:
    paddle.set_device("cpu")
    distributed.init()
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {kind: compare(kind, folder) for kind in KINDS}
    found["half"] = half_precision_state()
    found["gradients"] = [waiting_gradients(recomputes) for recomputes in (False, True)]
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
