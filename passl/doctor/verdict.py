"""The verdict on a run: a pure function of what it recorded, the same during the training and afterwards."""

from __future__ import annotations

from passl.doctor import curve_rules, visit_rules
from passl.doctor.finding import HEALTHY, Finding
from passl.doctor.runs import Run

_TOO_EARLY = 100  # steps


def diagnose(run: Run) -> Finding:
    """The first rule that applies decides: causes that are certain before symptoms, collapse before speed."""
    for rule in visit_rules.RULES if run.visits else ():
        finding = rule(run)
        if finding is not None:
            return finding
    # The loss alone says less: where the teacher's entropies are known, they decide.
    if run.curve and not run.has_entropies:
        for rule in curve_rules.RULES:
            finding = rule(run)
            if finding is not None:
                return finding
    return Finding(HEALTHY, tuple(_reassurance(run)))


def _reassurance(run: Run) -> list[str]:
    lines = []
    if run.has_entropies:
        last = run.visits[-1]
        lines.append(
            f"the teacher tells images apart: entropy {last['teacher_entropy']:.3f} of single answers, "
            f"{last['teacher_mean_entropy']:.3f} of their mean, and ln(out_dim) is {run.uniform:.3f}"
        )
    elif run.curve:
        first, last = run.curve[0], run.curve[-1]
        lines.append(f"the loss went from {first['loss']:.4f} to {last['loss']:.4f}")
    if not run.is_by_epoch and run.last_step < _TOO_EARLY:
        lines.append(f"only {run.last_step} steps: too early to rule out a collapse")
    if run.is_by_epoch and len(run.curve) < curve_rules.MIN_EPOCHS:
        lines.append(f"only {len(run.curve)} epochs: too early to rule out a collapse")
    return lines
