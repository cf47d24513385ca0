"""Training, step by step, against recorded runs of the official trainer: the decisive test of method, engine and
optimizers.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from passl.engine.optim import LARS, AdamW, Momentum
from passl.engine.trainer import Trainer
from passl.schedules import Timeline, cosine
from tests.models.test_dino_method import recorded_batch, recorded_method, variants
from tests.models.weights import assert_close, to_torch, torch_name

TOLERANCES = {
    # loss and centre, weights, parameters whose true gradient is 0 (Adam amplifies rounding noise in them)
    "f64": {"loss": 1e-10, "center": 1e-10, "weight": 1e-10, "null": 1e-8, "norm": 1e-10},
    "f32": {"loss": 1e-5, "center": 2e-6, "weight": 1e-5, "null": None, "norm": 1e-4},
}


class RecordedLoader:
    """Feeds the crops of the recorded steps."""

    def __init__(self, reference, order, dtype):
        self.reference, self.order, self.dtype = reference, order, dtype

    def iterate(self, start, stop):
        for step in range(start, stop):
            batch = recorded_batch(self.reference, self.order[step], self.dtype)
            yield {**batch, "index": self.order[step]}


class Recorder:
    """A hook that keeps what the recordings hold."""

    def __init__(self, optimizer):
        self.rows = []
        self.norms = []
        clip = optimizer.clip_gradients

        def clip_and_keep():
            norms = clip()
            self.norms.append({p.name: np.nan if n is None else n.item() for p, n in zip(optimizer.parameters, norms)})
            return norms

        optimizer.clip_gradients = clip_and_keep

    def before_train(self, trainer):
        self.states = [fingerprints(trainer.method)]

    def after_step(self, trainer):
        self.rows.append(
            {
                "loss": trainer.outputs["loss"].item(),
                "center": trainer.method.dino_loss.center.numpy().ravel(),
                "lr": trainer.optimizer.learning_rate,
                "wd": [trainer.optimizer.weight_decay * g["weight_decay"] for g in trainer.optimizer.groups],
                "teacher_temp": trainer.values["teacher_temp"],
                "teacher_momentum": trainer.values["teacher_momentum"],
            }
        )
        self.states.append(fingerprints(trainer.method))

    def after_train(self, trainer):
        pass


def fingerprints(method):
    """The recordings' fingerprints of all parameters: {network: {name: (l2, <p, cos(0, 1, 2, ...)>)}}."""
    result = {}
    for network in ("student", "teacher"):
        result[network] = {}
        for name, parameter in getattr(method, network).named_parameters():
            flat = to_torch(name, parameter.numpy()).astype(np.float64).ravel()
            result[network][name] = (np.linalg.norm(flat), flat @ np.cos(np.arange(flat.size)))
    return result


def recorded_options(reference, variant):
    argv = json.loads((reference / "traj_meta.json").read_text())[variant]["argv"]
    return dict(zip(argv[::2], argv[1::2]))


def build_trainer(reference, variant, dtype):
    method, recorded = recorded_method(reference, variant, dtype)
    options = recorded_options(reference, variant)
    epochs, batch = int(options["--epochs"]), int(options["--batch_size_per_gpu"])
    steps = len(recorded["loss"])
    line = Timeline(steps, steps // epochs, batch)
    for name, parameter in method.named_parameters():
        parameter.name = name
    builder = {"adamw": AdamW, "sgd": Momentum, "lars": LARS}[options["--optimizer"]]
    optimizer = builder(method.param_groups(), clip_norm=float(options["--clip_grad"]))
    recorder = Recorder(optimizer)
    schedules = {
        "lr": cosine(
            line,
            float(options["--lr"]),
            float(options["--min_lr"]),
            warmup=int(options["--warmup_epochs"]),
            reference_batch_size=256,
        ),
        "weight_decay": cosine(line, float(options["--weight_decay"]), float(options["--weight_decay_end"])),
        "teacher_momentum": cosine(line, float(options["--momentum_teacher"]), 1.0),
        "teacher_temp": cosine(
            line,
            float(options["--teacher_temp"]),
            float(options["--teacher_temp"]),
            warmup=int(options["--warmup_teacher_temp_epochs"]),
            warmup_start=float(options["--warmup_teacher_temp"]),
            per_epoch=True,
        ),
    }
    method.freeze_last_layer = int(options["--freeze_last_layer"])
    loader = RecordedLoader(reference, recorded["order"], {"f64": "float64", "f32": "float32"}[dtype])
    return Trainer(method, optimizer, loader, schedules, line, hooks=[recorder]), recorder, recorded


def null_gradient_names(names):
    """Parameters whose true gradient is zero: with batch norms, the biases that feed one."""
    if any("head.mlp.1" in name for name in names):
        return {"head.mlp.0.bias", "head.mlp.3.bias", "backbone.norm.bias"}
    return set()


def split_null(name, value, names):
    """-> (values with a gradient, values whose true gradient is zero)."""
    value = np.asarray(value)
    if name.endswith("attn.qkv.bias"):  # a bias of the keys shifts all logits of a softmax row alike
        third = len(value) // 3
        return np.delete(value, np.s_[third : 2 * third]), value[third : 2 * third]
    if name in null_gradient_names(names) or "running_mean" in name:
        return value[:0], value
    return value, value[:0]


def run_and_compare(reference, variant, dtype):
    trainer, recorder, recorded = build_trainer(reference, variant, dtype)
    trainer.fit()
    tolerance = TOLERANCES[dtype]
    names = recorded["param_names"].tolist()
    rows = recorder.rows
    for key in ("lr", "teacher_temp"):
        np.testing.assert_allclose([r[key] for r in rows], recorded[key], rtol=1e-12, atol=1e-15, err_msg=key)
    np.testing.assert_allclose(
        [r["wd"] for r in rows], np.stack([recorded["wd"], recorded["wd_group1"]], 1), rtol=1e-12
    )
    np.testing.assert_allclose([r["teacher_momentum"] for r in rows], recorded["momentum_schedule"], rtol=1e-12)
    assert_close([r["loss"] for r in rows], recorded["loss"], tolerance["loss"], "loss")
    assert_close(np.stack([r["center"] for r in rows]), recorded["center_after"], tolerance["center"], "center")
    compare_norms(recorder, recorded, names, tolerance["norm"])
    compare_fingerprints(recorder, recorded, names, tolerance["weight"])
    compare_final(trainer, recorded, names, tolerance)


def compare_norms(recorder, recorded, names, tolerance):
    for step, norms in enumerate(recorder.norms):
        for name, expected in zip(names, recorded["grad_norms_before_clip"][step]):
            actual = norms.get(f"student.{name}", np.nan)
            assert np.isnan(actual) == np.isnan(expected), (step, name)
            if not np.isnan(expected):
                assert abs(actual - expected) <= tolerance * max(1, expected), (step, name, actual, expected)


def compare_fingerprints(recorder, recorded, names, tolerance):
    """Every parameter of both networks before each step; those with null gradients are left to their own tolerance."""
    for network in ("student", "teacher"):
        for column, name in enumerate(names):
            if name.endswith("attn.qkv.bias") or name in null_gradient_names(names):
                continue
            actual = np.array([state[network][name] for state in recorder.states])
            size = 1 + recorded[f"{network}_l2"][:, column].max()
            for kind, key in enumerate(("l2", "dot")):
                difference = np.abs(actual[:, kind] - recorded[f"{network}_{key}"][:, column]).max()
                assert difference <= tolerance * 10 * size, (network, name, key, difference)


def compare_final(trainer, recorded, names, tolerance):
    keys = [key for key in recorded.files if key.startswith("final/")]
    assert keys or tolerance["null"] is None
    for key in keys:
        _, network, name = key.split("/")
        if name.endswith("num_batches_tracked"):
            continue
        state = {torch_name(n): v for n, v in getattr(trainer.method, network).state_dict().items()}
        actual = split_null(name, to_torch(name, state[name].numpy()), names)
        expected = split_null(name, recorded[key], names)
        for a, e, limit in zip(actual, expected, (tolerance["weight"], tolerance["null"])):
            if limit is not None and e.size:
                assert_close(a, e, limit, key)


@pytest.mark.smoke
def test_float64_runs_agree_with_the_official_trainer(reference, float64):
    for variant in variants(reference):
        run_and_compare(reference, variant, "f64")


def test_float32_runs_agree_with_the_official_trainer(reference):
    for variant in variants(reference):
        run_and_compare(reference, variant, "f32")
