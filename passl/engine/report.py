"""``report.html``: what a run, or several beside each other, came to, on one page that needs nothing else."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import passl
from passl import page
from passl.doctor.finding import HEALTHY
from passl.doctor.reading import UnreadableRunError, read_run
from passl.doctor.verdict import diagnose
from passl.log import duration, read_metrics
from passl.visualize.curves import NOT_METRICS, draw_run, metric_families

REPORT = "report.html"
GALLERY = "report"  # folder in a run's folder, of what the page shows
ATTENTION, MAP, MAP_PICTURE, NOTES = "attention.png", "embeddings.fragment.html", "embeddings.png", "notes.json"

_GREATER_IS_BETTER = re.compile(r"top\d|mAP|mP@|J&F")
_MOST_IN_TITLE, _MOST_COLUMNS = 4, 6
_CONFIGS = ("config.yaml", "eval_config.yaml")


class ReportError(ValueError):
    """A folder that holds no run."""


@dataclass
class _Run:
    """What a run left in its folder.

    rows: of metrics.jsonl. results: of passl-eval. notes: what the gallery says of itself (see gallery.py).
    """

    folder: Path
    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)
    config: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


def write_report(folders: Sequence[Path], target: Path, title: Optional[str] = None) -> Path:
    """Write one page about the runs in ``folders`` (of passl-train and passl-eval).

    Raises:
        ReportError: a folder is missing, or holds no run.
    """
    runs = [_read(Path(folder)) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    names = _distinct([run.folder for run in runs])
    for run, name in zip(runs, names):
        run.name = name
    if title is None:
        title = ", ".join(names) if len(names) <= _MOST_IN_TITLE else f"{len(names)} runs"
    body = [page.heading(title, 1), *map(_verdict, runs)]
    body += [_numbers(runs), *map(_curves, runs), *map(_attention, runs), *map(_map, runs)]
    configurations = [page.folded(run.name, run.config) for run in runs if run.config]
    body += [_timings(runs), *[page.heading("Configuration")][: len(configurations)], *configurations, _versions()]
    return page.write(target, page.page(title, "".join(body)))


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> _Run:
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; give that of a run of passl-train or passl-eval")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if isinstance(row["step"], int)]
    run = _Run(folder, folder.name, rows)
    run.results = {key: value for key, value in _json(folder / "eval.json").items() if isinstance(value, (int, float))}
    run.notes = _json(folder / GALLERY / NOTES)
    if not run.rows and not run.results:
        below = sorted(found.parent for name in ("metrics.jsonl", "eval.json") for found in folder.glob(f"*/{name}"))
        hint = f"; did you mean {', '.join(map(str, below[:5]))}?" if below else ""
        raise ReportError(f"{folder}: neither metrics.jsonl nor eval.json has anything in it: no run{hint}")
    for name in _CONFIGS:
        if (folder / name).is_file():
            run.config = (folder / name).read_text(encoding="utf-8", errors="replace")
            break
    return run


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ReportError(f"{file}: damaged ({error})") from error
    return value if isinstance(value, dict) else {}


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


# --- the parts of the page -------------------------------------------------------------------------------------------


def _verdict(run: _Run) -> str:
    """The doctor's, on a run that trained."""
    if not any(row.get("phase") in ("train", "doctor") for row in run.rows):
        return ""
    try:
        finding = diagnose(read_run(run.folder / "metrics.jsonl"))
    except UnreadableRunError:
        return ""
    kind = "good" if finding.verdict == HEALTHY else "bad"
    text = "; ".join(finding.evidence)
    line = page.note(f"{run.name}: {finding.verdict}. {text}").replace('class="note"', f'class="{kind}"')
    return line + page.listed(finding.advice)


def _numbers(runs: Sequence[_Run]) -> str:
    """One row for each number, one column for each run: the last measurement, and the best where that was earlier."""
    shown = {run.name: _measured(run) for run in runs}
    keys = [
        key for family in metric_families([numbers for numbers in shown.values() if numbers]).values() for key in family
    ]
    if not keys:
        return page.note("Nothing was measured: no Evaluators, no DataLoader.Eval, or eval_during_train is false.")
    best = {run.name: _best(run) for run in runs}
    rows = [
        (key, *(_cell(shown[run.name].get(key), best[run.name].get(key)) for run in runs))
        for key in keys
    ]  # fmt: skip
    return page.heading("Results") + _beside(runs, rows)


def _beside(runs: Sequence[_Run], rows: Sequence[Sequence[str]]) -> str:
    """Rows of a name and a cell for each run; a table of many runs is turned, for a page is longer than wide."""
    cells = [("", *(run.name for run in runs)), *rows]
    if len(runs) > max(_MOST_COLUMNS, len(rows)):
        cells = list(zip(*cells))
    return page.table(cells[0], cells[1:], numbers_from=1)


def _measured(run: _Run) -> dict[str, float]:
    measured = [row for row in run.rows if row.get("phase") == "eval"]
    last = {key: row[key] for row in measured for key in row if key not in NOT_METRICS}
    return {**last, **run.results}


def _best(run: _Run) -> dict[str, tuple[float, int]]:
    """The largest value of each number of which more is better, with its epoch."""
    found: dict[str, tuple[float, int]] = {}
    for row in run.rows:
        values = row.items() if row.get("phase") == "eval" else ()
        for key, value in values:
            if not _GREATER_IS_BETTER.search(key) or not isinstance(value, (int, float)):
                continue
            if value > found.get(key, (float("-inf"), 0))[0]:
                found[key] = (value, row.get("epoch", 0))
    return found


def _cell(value: Any, best: Optional[tuple[float, int]]) -> str:
    if not isinstance(value, (int, float)):
        return ""
    text = f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"
    return f"{text} (best {best[0]:.2f}, epoch {best[1]})" if best and not best[0] <= value else text


def _curves(run: _Run) -> str:
    figure = draw_run([row for row in run.rows if row.get("phase") in ("train", "eval")]) if run.rows else None
    return page.heading(f"Curves: {run.name}") + page.picture(page.figure_svg(figure), "curves") if figure else ""


def _attention(run: _Run) -> str:
    file, reason = run.folder / GALLERY / ATTENTION, run.notes.get("no_attention")
    if not file.is_file():
        return page.heading(f"Attention: {run.name}") + page.note(str(reason)) if reason else ""
    return page.heading(f"Attention: {run.name}") + page.picture(
        file.read_bytes(), "attention maps", str(run.notes.get("attention", ""))
    )


def _map(run: _Run) -> str:
    file, reason = run.folder / GALLERY / MAP, run.notes.get("no_map")
    if not file.is_file():
        return page.heading(f"Map of features: {run.name}") + page.note(str(reason)) if reason else ""
    caption = page.note(str(run.notes.get("map", "")))
    return page.heading(f"Map of features: {run.name}") + file.read_text(encoding="utf-8") + caption


def _timings(runs: Sequence[_Run]) -> str:
    columns = [_times(run) for run in runs]
    keys = list(dict.fromkeys(key for times in columns for key in times))
    if not keys:
        return ""
    rows = [(key, *(times.get(key, "") for times in columns)) for key in keys]
    return page.heading("Timings") + _beside(runs, rows)


def _times(run: _Run) -> dict[str, str]:
    train = [row for row in run.rows if row.get("phase") == "train" and _is_finite(row.get("batch_cost"))]
    times: dict[str, str] = {}
    numbers = [row["step"] for row in train]
    # The first line of a run that began in another folder counts for as many steps as the second.
    begin = max(0, 2 * numbers[0] - numbers[1]) if len(numbers) > 1 else 0
    steps = [after - before for before, after in zip([begin, *numbers], numbers)]
    if sum(steps) > 0:
        seconds = sum(count * row["batch_cost"] for count, row in zip(steps, train))
        waited = sum(count * row.get("reader_cost", 0.0) for count, row in zip(steps, train))
        times["steps"] = str(train[-1]["step"])
        times["training, without evaluation"] = duration(seconds)
        times["images per second"] = f"{sum(c * r.get('ips', 0.0) for c, r in zip(steps, train)) / sum(steps):.1f}"
        times["of it waiting for data"] = f"{100 * waited / seconds:.1f} %" if seconds else ""
    for what, taken in _mapping(run.notes.get("seconds")).items():
        times[what] = f"{taken:.1f} s"
    return times


def _mapping(value: Any) -> Mapping[str, float]:
    return {key: one for key, one in value.items() if _is_finite(one)} if isinstance(value, dict) else {}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = [f"passl {passl.__version__}", f"Python {platform.python_version()}"]
    for name in ("paddlepaddle", "paddlepaddle-gpu", "numpy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return page.note(", ".join(found))
