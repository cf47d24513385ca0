"""Rules over the doctor's visits. Each takes a run with at least one visit and returns a finding or None.

Entropies are judged as shares of ln(out_dim), so that one rule holds for 64 prototypes and for 65,536. `information` is
the entropy of the mean answer less the mean entropy of the answers: how much an answer tells about its image. It is 0
in every collapse.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Callable, Optional

from passl.doctor import advice
from passl.doctor.finding import DATA_BOUND, NOT_LEARNING, ONE_HOT, UNIFORM, UNSTABLE, Finding
from passl.doctor.runs import Row, Run, trailing, values

Rule = Callable[[Run], Optional[Finding]]

# Shares of ln(out_dim).
_NEAR_UNIFORM = 0.97
_NO_INFORMATION = 0.01
_LITTLE_INFORMATION = 0.12  # healthy runs have more
# Steps that a symptom has to last: where its cause is known, and where it is not.
_SHORT, _LONG = 80, 150
_LONGEST_WAIT = 2000
_ONE_HOT = 0.3  # nats of the mean answer: 1.35 prototypes
_NARROWED = 0.6  # share of the first mean answer's entropy
_GROWTH, _GROWTH_STEPS = 2.5, 300  # of the weights, in so many steps
_FAST = 0.015  # change of the weights in one step, as a share of them
_STILL = 1e-6
_WAITING = 0.5  # share of the time


def not_finite(run: Run) -> Optional[Finding]:
    if run.failure:
        return Finding(UNSTABLE, (run.failure,), tuple(advice.against_instability(run)))
    bad = [row for row in run.visits if not math.isfinite(row.get("loss", 0.0) or 0.0)]
    if bad:
        evidence = f"step {bad[0]['step']}: the loss is {bad[0]['loss']}"
        return Finding(UNSTABLE, (evidence,), tuple(advice.against_instability(run)))
    return None


def frozen_data(run: Run) -> Optional[Finding]:
    """Other images, or other crops, never come."""
    evidence = []
    distinct = values(run.visits, "distinct_images")
    if distinct and distinct[-1] <= 0.25:
        evidence.append(f"{distinct[-1]:.0%} of the images compared, from all over the data set, differ")
    equal = [row for row in run.visits if row.get("distinct_samples", 1.0) <= 0.25]
    if len(equal) > 1:
        evidence.append(
            f"step {equal[-1]['step']}: {equal[-1]['distinct_samples']:.0%} of the samples in a batch differ"
        )
    # With views drawn anew, none comes twice; without (a probe), each epoch repeats the one before.
    repeated = [row for row in run.visits if row.get("repeated_samples", 0.0) >= 0.9 and "teacher_entropy" in row]
    if len(repeated) > 1:
        evidence.append(
            f"step {repeated[-1]['step']}: {repeated[-1]['repeated_samples']:.0%} of the batch are pixels of an "
            f"earlier step (seen at {len(repeated)} of {len(run.visits)} visits)"
        )
    if not evidence:
        return None
    return Finding(NOT_LEARNING, ("the data are frozen", *evidence), tuple(advice.against_frozen_data(run)))


def idle(run: Run) -> Optional[Finding]:
    """The weights stay where they are."""
    visits = [row for row in run.visits if "update_ratio" in row and row["step"] > 1]
    if len(visits) < 2 or _length(visits) < _SHORT or max(row["update_ratio"] for row in visits) > _STILL:
        return None
    rates = values(visits, "lr")
    evidence = [f"no step changed the weights by more than {max(values(visits, 'update_ratio')):.1e} of them"]
    if rates:
        evidence.append(f"the learning rate was at most {max(rates):.3g} in steps {_steps(visits)}")
    return Finding(NOT_LEARNING, tuple(evidence), tuple(advice.against_rest(run)))


def out_of_control(run: Run) -> Optional[Finding]:
    """The weights leap, and the answers are worth little: nothing that they held is left."""
    evidence = _explosion(run)
    # The first step's centre is 0, and its answers differ all the same. A probe's weights may well leap.
    later = [row for row in run.visits if row["step"] > 1][-3:]
    if run.has_entropies and later and _mean_information(later) <= _LITTLE_INFORMATION * run.uniform:
        evidence += _leaps(run)
    if not evidence:
        return None
    if run.has_entropies:
        evidence.append(_entropies(run, run.visits[-1]))
    return Finding(UNSTABLE, tuple(evidence), tuple(advice.against_instability(run)))


def _leaps(run: Run) -> list[str]:
    evidence = []
    best: Optional[tuple[float, Row, Row]] = None
    rows = [row for row in run.visits if row.get("weight_rms", 0.0) > 0]
    for place, row in enumerate(rows):
        for other in rows[place + 1 :]:
            if other["step"] - row["step"] > _GROWTH_STEPS:
                break
            factor = other["weight_rms"] / row["weight_rms"]
            if factor >= _GROWTH and (best is None or factor > best[0]):
                best = factor, row, other
    if best is not None:
        factor, row, other = best
        evidence.append(
            f"between steps {row['step']} and {other['step']} the weights grew {factor:.1f} times as large "
            f"(root mean square {row['weight_rms']:.3g} to {other['weight_rms']:.3g})"
        )
    ratios = values([row for row in run.visits if row["step"] > 1], "update_ratio")
    fastest = max((statistics.median(ratios[place : place + 3]) for place in range(len(ratios) - 2)), default=0.0)
    if fastest >= _FAST:
        evidence.append(f"each step changed the weights by {fastest:.1%} of them, for three visits at least")
    return evidence


def _explosion(run: Run) -> list[str]:
    """A loss that no finite answer explains; that of a probe, at the rates that are usual for it, may rise and fall."""
    recent = values(run.visits[-3:], "loss_max")
    if not run.has_entropies or not recent or max(recent) <= 3 * run.uniform:
        return []
    return [f"the loss rose to {max(recent):.3g}, {3 * run.uniform:.3g} is 3 ln(out_dim)"]


def one_hot(run: Run) -> Optional[Finding]:
    if not run.has_entropies:
        return None
    # Without centring it only takes time: the answers need not have gone all the way. How many prototypes a batch can
    # use depends on its size, and so they are compared with those at the start.
    is_off = run.last_step >= _SHORT and run.visits[-1].get("center_norm") == 0
    first = run.visits[0]
    limit = max(_ONE_HOT, 0.2 * run.uniform, _NARROWED * first["teacher_mean_entropy"]) if is_off else _ONE_HOT
    rows = trailing(run.visits, lambda row: row["teacher_mean_entropy"] <= limit)
    if len(rows) < 2 or run.last_step < 20:
        return None
    last = rows[-1]
    is_done = last["teacher_mean_entropy"] <= max(_ONE_HOT, 0.2 * run.uniform)
    evidence = [
        f"since step {rows[0]['step']} all images {'get the same answer' if is_done else 'come to the same answers'}: "
        f"entropy of the mean answer {last['teacher_mean_entropy']:.4f}, at step {first['step']} "
        f"{first['teacher_mean_entropy']:.4f}, and ln(out_dim) is {run.uniform:.4f}",
        f"{last.get('prototypes_in_use', 'few')} of {run.out_dim} prototypes in use; loss {last['loss']:.4f}",
    ]
    if is_off:
        evidence.append(f"centring is off: the centre is still 0 at step {last['step']}")
    return Finding(ONE_HOT, tuple(evidence), tuple(advice.against_one_hot(run)))


def uniform(run: Run) -> Optional[Finding]:
    if not run.has_entropies:
        return None
    last = run.visits[-1]
    temps = last.get("teacher_temp"), last.get("student_temp")
    is_off = None not in temps and temps[0] >= temps[1]
    if is_off:
        rows = trailing(
            run.visits,
            lambda row: (
                row["teacher_entropy"] >= _NEAR_UNIFORM * run.uniform
                or (row["teacher_entropy"] >= 0.7 * run.uniform and row["loss"] >= 0.95 * run.uniform)
            ),
        )
        patience = _SHORT
    else:
        rows = trailing(
            run.visits,
            lambda row: (
                row["teacher_entropy"] >= _NEAR_UNIFORM * run.uniform
                and _information(row) <= _NO_INFORMATION * run.uniform
            ),
        )
        patience = _patience(run)
    if len(rows) < 2 or _length(rows) < patience or (not is_off and _awakes(rows)):
        return None
    evidence = [f"since step {rows[0]['step']} {_entropies(run, last)}", f"loss {last['loss']:.4f}"]
    if is_off:
        evidence.append(f"nothing sharpens: teacher_temp {temps[0]:g} is not below student_temp {temps[1]:g}")
    return Finding(UNIFORM, tuple(evidence), tuple(advice.against_uniform(run, last)))


def _patience(run: Run) -> float:
    """Steps that the uniform answer has to last. Every run starts with it; one that had left it should not be back."""
    had_left = [
        row
        for row in run.visits
        if row["step"] >= _LONG
        and _information(row) >= 0.05 * run.uniform
        and row["teacher_entropy"] < _NEAR_UNIFORM * run.uniform
    ]
    if len(had_left) > 1:
        return _LONG
    last = run.visits[-1]
    if last.get("lr_share", 1.0) < 0.9 and last.get("progress", 1.0) < 0.25:  # the warm-up
        return math.inf
    warmed_up = next((row["step"] for row in run.visits if row.get("lr_share", 1.0) >= 0.9), 0)
    if last["step"] < warmed_up + _LONG:
        return math.inf
    total = last["step"] / last["progress"] if last.get("progress") else last["step"]
    return min(max(_LONG, 0.03 * total), _LONGEST_WAIT)


def _awakes(rows: Sequence[Row]) -> bool:
    """Whether the answers tell more and more about their images."""
    half = len(rows) // 2
    return _mean_information(rows[half:]) > 1.3 * _mean_information(rows[:half])


def same_answer(run: Run) -> Optional[Finding]:
    """Neither uniform nor one-hot, and yet equal for all images."""
    if not run.has_entropies:
        return None
    rows = trailing(run.visits, lambda row: _information(row) <= 0.5 * _NO_INFORMATION * run.uniform)
    # Near the uniform answer the other rule knows how long to wait.
    if len(rows) < 3 or _length(rows) < 2 * _LONG or rows[-1]["teacher_entropy"] >= 0.9 * run.uniform:
        return None
    evidence = [f"since step {rows[0]['step']} all images get the same answer; {_entropies(run, rows[-1])}"]
    return Finding(NOT_LEARNING, tuple(evidence), tuple(advice.against_uniform(run, rows[-1])))


def data_bound(run: Run) -> Optional[Finding]:
    waits = values([row for row in run.visits if row["step"] > 1][-5:], "data_wait")
    if len(waits) < 3 or statistics.median(waits) < _WAITING:
        return None
    share = f"{statistics.median(waits):.0%}"
    evidence = f"{share} of the time passes waiting for data (median of the last {len(waits)} visits)"
    return Finding(DATA_BOUND, (evidence,), tuple(advice.against_waiting(run)))


RULES: tuple[Rule, ...] = (
    not_finite, frozen_data, idle, out_of_control, one_hot, uniform, same_answer, data_bound,
)  # fmt: skip


def _information(row: Row) -> float:
    return row["teacher_mean_entropy"] - row["teacher_entropy"]


def _mean_information(rows: Sequence[Row]) -> float:
    return statistics.mean(_information(row) for row in rows)


def _entropies(run: Run, row: Row) -> str:
    return (
        f"the teacher's answers have an entropy of {row['teacher_entropy']:.4f}, their mean one of "
        f"{row['teacher_mean_entropy']:.4f}; ln(out_dim) is {run.uniform:.4f}"
    )


def _length(rows: Sequence[Row]) -> int:
    return rows[-1]["step"] - rows[0]["step"]


def _steps(rows: Sequence[Row]) -> str:
    return f"{rows[0]['step']} to {rows[-1]['step']}"
