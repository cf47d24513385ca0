"""Self-contained HTML pages: one file, no links, nothing to load, readable without a network and on paper."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from passl.formats.atomic import replacing

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.55 system-ui, sans-serif; max-width: 1180px; margin: 2.2em auto; padding: 0 1.2em; color: #222; }}
h1 {{ font-size: 1.5em; margin-bottom: .2em; }} h2 {{ font-size: 1.15em; margin-top: 2em; }}
img {{ max-width: 100%; }} figure {{ margin: 1em 0; }} figcaption, .note {{ color: #666; font-size: .92em; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2em 1.4em .2em 0; text-align: left; vertical-align: top; }}
th {{ border-bottom: 1px solid #999; font-weight: 600; }} td.number, th.number {{ text-align: right; }}
td.number {{ font-variant-numeric: tabular-nums; }}
pre {{ background: #f6f6f4; padding: .9em 1.1em; overflow-x: auto; font-size: .88em; }}
.wide {{ overflow-x: auto; }} summary {{ cursor: pointer; }}
@media print {{
  body {{ max-width: none; margin: 0; }} figure, tr, .passl-map {{ break-inside: avoid; }} h2 {{ break-after: avoid; }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }} details::details-content {{ content-visibility: visible; }}
  details > pre {{ font-size: .7em; }}
}}
.good {{ color: #3c7d3c; }} .bad {{ color: #b03a2e; }}
</style></head><body>
{body}
</body></html>
"""


def page(title: str, body: str) -> str:
    """A whole page; ``title`` is text, ``body`` is HTML."""
    return _PAGE.format(title=html.escape(title), body=body)


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>\n"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>\n'


def listed(lines: Sequence[str]) -> str:
    """A list; nothing for no lines."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>\n" if lines else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: Optional[int] = None) -> str:
    """A table of text; columns from ``numbers_from`` on are numbers, at the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if numbers_from is not None and i >= numbers_from else "" for i in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{kind}>{html.escape(cell)}</{tag}>' for kind, cell in zip(kinds, cells))}</tr>\n"

    content = row(header, "th") + "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>{content}</table></div>\n'


def folded(summary: str, text: str) -> str:
    """Long text, ``preformatted``, that opens on a click."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>\n"


def picture(content: bytes, alt: str, caption: str = "") -> str:
    """A PNG, JPEG or SVG inside the page."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg" if content.startswith(b"\xff\xd8") else "svg+xml"
    data = base64.b64encode(content).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">{below}</figure>\n'


def figure_svg(figure: Any) -> bytes:
    """A matplotlib figure as SVG, whose text stays text."""
    from matplotlib import rc_context

    content = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(content, format="svg")
    return content.getvalue()


def write(target: Path, content: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        file.write(content.encode("utf-8", "backslashreplace"))
    return target
