"""Rules over the loss alone: of logs that hold nothing else. Each takes a run with a curve of at least one row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Callable, Optional

from passl.doctor import advice
from passl.doctor.finding import DATA_BOUND, NOT_LEARNING, ONE_HOT, UNIFORM, UNSTABLE, Finding
from passl.doctor.runs import Row, Run, is_number, trailing, values

MIN_EPOCHS = 3  # of a plateau
_MIN_STEPS, _SHORT = 200, 80  # of a plateau; where its cause is known
_MIN_ROWS = 3
_NEAR, _NEAR_GUESSED = 0.02, 0.01  # nats from ln K, with K known and not
_NOISE = 0.04  # nats that single rows may lie off where their mean does not: of a K that is told, or a power of two
_SHARE_OF_HIGHEST = 0.7  # no loss of a run without learning lies far above ln K
_ZERO = 0.05  # nats
_FLAT = 0.002  # spread of a loss that stands still, as a share of it
_JUMP = 1.5


def not_finite(run: Run) -> Optional[Finding]:
    if run.failure:
        return Finding(UNSTABLE, (run.failure,), tuple(advice.against_instability(run)))
    bad = next((row for row in run.curve if not math.isfinite(row["loss"])), None)
    if bad is None:
        return None
    evidence = f"{_place(run, bad)}: the loss is {bad['loss']}"
    return Finding(UNSTABLE, (evidence,), tuple(advice.against_instability(run)))


def uniform(run: Run) -> Optional[Finding]:
    """A plateau at ln K. Runs start there: it has to last, or to be come back to."""
    if run.has_labels:
        return None
    near = _NEAR if run.out_dim else _NEAR_GUESSED
    plateaus = ((one, _plateau(run, one, near)) for one in _candidates(run))
    out_dim, rows = next(((one, rows) for one, rows in plateaus if rows), (0, ()))
    if not rows:
        return None
    level = statistics.mean(row["loss"] for row in rows)
    if not run.out_dim and level < _SHARE_OF_HIGHEST * max(row["loss"] for row in run.curve):
        return None  # a run that came down this far has learned
    evidence = [
        f"the loss stays at {level:.4f} from {_place(run, rows[0])} to {_place(run, rows[-1])}: "
        f"ln {out_dim} is {math.log(out_dim):.4f}, the loss of a uniform answer of {out_dim} prototypes"
    ]
    if not run.out_dim:
        evidence.append(f"the log does not name the number of prototypes; --out-dim says it, if it was not {out_dim}")
    return Finding(UNIFORM, tuple(evidence), tuple(advice.against_uniform(run, {})))


def told_by_settings(run: Run) -> Optional[Finding]:
    """The configuration turns centring or sharpening off, and the loss goes where that leads."""
    losses = values(run.curve, "loss")
    if run.has_labels or not run.out_dim or not run.settings or run.last_step < _SHORT or not losses:
        return None
    teacher = run.settings.get(advice.height(run, "Schedules.teacher_temp"))
    student = advice.setting(run, "Model.student_temp")
    level = math.log(run.out_dim)
    if is_number(teacher) and is_number(student) and teacher >= student:
        rows = trailing(run.curve, lambda row: row["loss"] >= 0.95 * level)
        if len(rows) >= 2 and rows[-1]["step"] - rows[0]["step"] >= _SHORT:
            evidence = (
                f"the loss stays near ln(out_dim), {level:.4f}: {losses[-1]:.4f}",
                f"nothing sharpens: teacher_temp {teacher:g} is not below student_temp {student:g}",
            )
            return Finding(UNIFORM, evidence, tuple(advice.against_uniform(run, {})))
    if advice.setting(run, "Model.center_momentum") == 1 and losses[-1] <= 0.5 * losses[0]:
        evidence = ("centring is off: with center_momentum 1.0 the centre never moves", _fall(losses))
        return Finding(ONE_HOT, evidence, tuple(advice.against_one_hot(run)))
    return None


def _fall(losses: Sequence[float]) -> str:
    return f"the loss fell from {losses[0]:.4f} to {losses[-1]:.4f}, as it does when the answers become the same"


def _candidates(run: Run) -> list[int]:
    """Numbers of prototypes whose logarithm is near the last loss, the likeliest first."""
    if run.out_dim:
        return [run.out_dim]
    last, plausible = run.curve[-1]["loss"], plausible_out_dims()
    powers = [one for one in plausible if _is_power_of_two(one)]
    return [min(those, key=lambda one: abs(math.log(one) - last)) for those in (powers, plausible)]


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _plateau(run: Run, out_dim: int, near: float) -> Sequence[Row]:
    """The last rows, if they stay at ln K for long; a noisy plateau is longer, and its mean lies there."""
    level = math.log(out_dim)
    rows = trailing(run.curve, lambda row: abs(row["loss"] - level) <= near)
    if _is_long(run, rows) and not _falls(rows):
        return rows
    if run.out_dim is None and not _is_power_of_two(out_dim):
        return []
    rows = trailing(run.curve, lambda row: abs(row["loss"] - level) <= _NOISE)
    if len(rows) < 3 * _MIN_ROWS or not _is_long(run, rows) or _falls(rows):
        return []
    half = len(rows) // 2
    halves = [statistics.mean(row["loss"] for row in part) for part in (rows[:half], rows[half:])]
    return rows if all(abs(mean - level) <= near / 2 for mean in halves) else []


def plausible_out_dims() -> list[int]:
    """Numbers of prototypes that people use: powers of two, and round numbers."""
    powers = [2**power for power in range(8, 19)]
    return sorted({*powers, *range(1000, 10000, 1000), *range(10000, 100001, 10000)})


def one_hot(run: Run) -> Optional[Finding]:
    if run.has_labels:
        return None
    rows = trailing(run.curve, lambda row: row["loss"] <= _ZERO)
    # No run passes here, or starts here: it need not last.
    if len(rows) < 2 or not (len(rows) >= _MIN_ROWS or rows[-1]["loss"] < _ZERO / 10):
        return None
    since = f"since {_place(run, rows[0])} the loss is near 0, now {rows[-1]['loss']:.4f}"
    evidence = f"{since}: all images get the same prototype"
    return Finding(ONE_HOT, (evidence,), tuple(advice.against_one_hot(run)))


def jumps(run: Run) -> Optional[Finding]:
    """The loss leaps up, and stays up or leaps again. That of a probe at usual rates may come down."""
    losses = [row["loss"] for row in run.curve]
    if len(losses) < 4:
        return None
    lowest, leaps = losses[0], []
    for before, row in zip(losses, run.curve[1:]):
        lowest = min(lowest, before)
        if row["loss"] > _JUMP * before and row["loss"] > _JUMP * lowest and row["loss"] - before > 1:
            leaps.append((before, row))
    is_up = losses[-1] > max(2 * min(losses), losses[0] * 1.2)
    if not leaps or not (is_up or (len(leaps) > 1 and not run.has_labels)):
        return None
    evidence = [f"{_place(run, row)}: loss from {before:.3f} to {row['loss']:.3f}" for before, row in leaps[:3]]
    return Finding(UNSTABLE, tuple(evidence), tuple(advice.against_instability(run)))


def flat(run: Run) -> Optional[Finding]:
    """From the first row to the last one level, which is not that of a uniform answer."""
    losses = values(run.curve, "loss")
    spread = max(losses) - min(losses)
    if not _is_long(run, run.curve) or len(losses) < 2 * _MIN_ROWS or spread > _FLAT * abs(statistics.mean(losses)):
        return None
    evidence = [f"the loss stays between {min(losses):.4f} and {max(losses):.4f} from the first row to the last"]
    rates = values(run.curve, "lr")
    if rates and max(rates) == 0:
        evidence.append("the learning rate is 0")
    return Finding(NOT_LEARNING, tuple(evidence), tuple(advice.against_rest(run)))


def data_bound(run: Run) -> Optional[Finding]:
    waits = values(run.curve[len(run.curve) // 2 :], "data_wait")
    if len(waits) < _MIN_ROWS or statistics.median(waits) < 0.5:
        return None
    evidence = f"{statistics.median(waits):.0%} of the time passes waiting for data"
    return Finding(DATA_BOUND, (evidence,), tuple(advice.against_waiting(run)))


RULES: tuple[Callable[[Run], Optional[Finding]], ...] = (
    not_finite, uniform, one_hot, told_by_settings, jumps, flat, data_bound,
)  # fmt: skip


def _is_long(run: Run, rows: Sequence[Row]) -> bool:
    """Long enough to be more than a start or a passage."""
    if len(rows) < _MIN_ROWS:
        return False
    if run.is_by_epoch:
        return len(rows) >= max(MIN_EPOCHS, 0.05 * len(run.curve))
    length = rows[-1]["step"] - rows[0]["step"]
    return length >= max(_MIN_STEPS, 0.1 * run.curve[-1]["step"])


def _falls(rows: Sequence[Row]) -> bool:
    """Whether each third of the rows lies lower than the one before: a passage, not a plateau."""
    third = len(rows) // 3
    parts = (rows[:third], rows[third:-third], rows[-third:])
    levels = [statistics.mean(row["loss"] for row in part) for part in parts]
    spread = [statistics.pvariance([row["loss"] for row in part]) / len(part) for part in parts]
    by_chance = 3 * math.sqrt(spread[0] + spread[2])
    return levels[0] - levels[2] > max(0.004, by_chance) and levels[0] > levels[1] > levels[2]


def _place(run: Run, row: Row) -> str:
    return f"epoch {row['epoch']:g}" if run.is_by_epoch and "epoch" in row else f"step {row.get('step', 0):g}"
