"""What a rule finds."""

from __future__ import annotations

from dataclasses import dataclass

HEALTHY = "healthy"
UNIFORM = "uniform collapse"
ONE_HOT = "one-hot collapse"
NOT_LEARNING = "not learning"
UNSTABLE = "unstable"
DATA_BOUND = "data-bound"
VERDICTS = (HEALTHY, UNIFORM, ONE_HOT, NOT_LEARNING, UNSTABLE, DATA_BOUND)


@dataclass(frozen=True)
class Finding:
    """A verdict, the numbers that speak for it, and the settings to change, the likeliest first."""

    verdict: str
    evidence: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    def text(self) -> str:
        """The whole in a few lines."""
        lines = [self.verdict, *(f"  {line}" for line in self.evidence)]
        lines += ["  change:"] * bool(self.advice) + [f"  - {line}" for line in self.advice]
        return "\n".join(lines)
