"""The curves of a diagnosed run, as a picture and as one page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from passl import page
from passl.doctor.finding import HEALTHY, Finding
from passl.doctor.runs import Row, Run

_COLOURS = ("#2f6f9f", "#c2542d", "#5a8f3c", "#7a5aa0")
_GOOD, _BAD, _LINE = "#3c7d3c", "#b03a2e", "#555555"
_COLUMNS = 4
_BEYOND = 1e30


@dataclass(frozen=True)
class Panel:
    """title; keys of the rows -> their labels; whether ln(out_dim) is a line; whether the scale is logarithmic."""

    title: str
    keys: dict[str, str]
    with_uniform: bool = False
    is_log: bool = False
    meaning: str = ""


_LOSS = Panel("loss", {"loss": "loss"}, with_uniform=True, meaning="ln(out_dim) for ever: uniform collapse; 0: one-hot")
VISIT_PANELS = (
    _LOSS,
    Panel(
        "teacher entropy, nats",
        {"teacher_entropy": "of an answer", "teacher_mean_entropy": "of the mean"},
        with_uniform=True,
        meaning="the two lines must stay apart: both at ln(out_dim) is uniform collapse, both at 0 one-hot",
    ),
    Panel("student-teacher KL, nats", {"student_teacher_kl": "KL"}, meaning="0: nothing left to learn"),
    Panel("prototypes in use", {"prototypes_in_use": "prototypes"}, meaning="first choices in a batch; 1: one-hot"),
    Panel("norm of the centre", {"center_norm": "norm"}, meaning="0 after the first steps: centring is off"),
    Panel(
        "spread of features",
        {"feature_std": "teacher", "student_feature_std": "student"},
        meaning="0: all images look alike; 1: as different as can be",
    ),
    Panel("effective rank of features", {"effective_rank": "rank"}, meaning="1: all features lie on one line"),
    Panel(
        "gradient norms",
        {
            "gradient_norm": "all",
            "gradient_norm_backbone": "backbone",
            "gradient_norm_head": "head",
            "gradient_norm_last_layer": "last layer",
        },
        is_log=True,
        meaning="before clipping; a steep rise: unstable",
    ),
    Panel("change of weights per step", {"update_ratio": "share"}, is_log=True, meaning="above 0.015: lr too high"),
    Panel("size of weights (rms)", {"weight_rms": "rms"}, meaning="times 2.5 within 300 steps: lr too high"),
    Panel("share of time waiting for data", {"data_wait": "share"}, meaning="above 0.5: data-bound"),
    Panel("learning rate", {"lr": "lr"}),
)
CURVE_PANELS = (
    _LOSS,
    Panel("learning rate", {"lr": "lr"}),
    Panel("weight decay", {"weight_decay": "weight decay"}),
    Panel("share of time waiting for data", {"data_wait": "share"}, meaning="above 0.5: data-bound"),
)


def draw(run: Run, finding: Finding, title: str, target: Path) -> Path:
    """Write the curves of a run as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    panels = _panels(run)
    rows = math.ceil(len(panels) / _COLUMNS)
    columns = min(len(panels), _COLUMNS)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    colour = _GOOD if finding.verdict == HEALTHY else _BAD
    figure.suptitle(_plain(f"{title}: {finding.verdict}"), color=colour, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        _draw_panel(axes, panel, run)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _panels(run: Run) -> list[Panel]:
    """Those that there are numbers for."""
    panels = VISIT_PANELS if run.visits else CURVE_PANELS
    return [panel for panel in panels if any(_points(_rows(run, panel), key)[0] for key in panel.keys)]


def _rows(run: Run, panel: Panel) -> Sequence[Row]:
    # The training's own rows are closer together than the doctor's visits.
    return run.curve if run.curve and (not run.visits or panel.title in ("loss", "learning rate")) else run.visits


def _points(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Places and values; numbers that are not finite, or beyond any axis, leave a gap."""
    found = [(row.get("step", row.get("epoch", 0)), row[key]) for row in rows if _is_drawable(row.get(key))]
    return [float(place) for place, _ in found], [value if abs(value) <= _BEYOND else math.nan for _, value in found]


def _is_drawable(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _draw_panel(axes: Any, panel: Panel, run: Run) -> None:
    rows = _rows(run, panel)
    shown = 0
    highest = 0.0
    for (key, label), colour in zip(panel.keys.items(), _COLOURS):
        places, numbers = _points(rows, key)
        if places:
            marker = "o" if len(places) < 60 else None
            if panel.is_log:
                numbers = [number if number > 0 else math.nan for number in numbers]
            # A sum may lie on its largest part.
            width = 3.5 if shown == 0 and len(panel.keys) > 2 else 1.3
            axes.plot(places, numbers, color=colour, label=label, marker=marker, ms=2.5, lw=width)
            highest = max([highest, *(number for number in numbers if number > 0)])
            shown += 1
    if panel.with_uniform and math.isfinite(run.uniform):
        axes.axhline(run.uniform, color=_LINE, ls="--", lw=1, label=f"ln {run.out_dim} = {run.uniform:.3f}")
        shown += 1
    if panel.is_log and highest > 0:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("epoch" if run.is_by_epoch else "step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if shown > 1:
        axes.legend(frameon=False, fontsize=7)


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def write_page(run: Run, finding: Finding, title: str, picture: Path, target: Path) -> Path:
    """Write verdict, evidence, advice, the picture and the newest numbers as one HTML file without links."""
    kind = "good" if finding.verdict == HEALTHY else "bad"
    body = [
        f'<h1>{html.escape(title)}: <b class="{kind}">{html.escape(finding.verdict)}</b></h1>\n',
        page.listed(finding.evidence),
        page.heading("What to change") + page.listed(finding.advice) if finding.advice else "",
        page.picture(picture.read_bytes(), "curves"),
        page.table(("number", "newest", "what it says"), [_table_row(run, panel) for panel in _panels(run)]),
    ]
    return page.write(target, page.page(f"{title}: {finding.verdict}", "".join(body)))


def _table_row(run: Run, panel: Panel) -> tuple[str, str, str]:
    newest: list[str] = []
    for key, label in panel.keys.items():
        _, numbers = _points(_rows(run, panel), key)
        if numbers:
            newest.append(f"{numbers[-1]:.4g}" if len(panel.keys) == 1 else f"{label} {numbers[-1]:.4g}")
    return panel.title, ", ".join(newest), panel.meaning


def write_report(run: Run, finding: Finding, title: str, folder: Path) -> tuple[Path, Optional[Path]]:
    """doctor.png and doctor.html in `folder`."""
    picture = draw(run, finding, title, folder / "doctor.png")
    return picture, write_page(run, finding, title, picture, folder / "doctor.html")
