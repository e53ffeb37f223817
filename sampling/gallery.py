"""Pictures of a finished job: the arrangement of the contact sheet, and the gallery page."""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.files import replacing

COLUMNS, GRID = 8, 100  # of grid.png: columns, at least; pictures, about


class Shown(NamedTuple):
    """One sample. nearest: the class that its class token is nearest to, if known."""

    number: int
    pixels: np.ndarray  # (H, W, 3) uint8
    label: int
    nearest: int | None


def arrange(shown: Sequence[Shown], strip: int = 0) -> list[list[Shown]]:
    """The rows of grid.png: about 100 of the first samples, at least 8 in a row.

    Few classes with many samples have a row each; otherwise there are about as many rows as columns, in the order of the
    samples.

    Args:
        shown: the first samples.
        strip: samples in each row of an interpolation, which stays whole; 0: none.
    """
    few = sorted({picture.label for picture in shown})
    if not strip and 1 < len(few) <= 20 and len(shown) >= COLUMNS * len(few):
        columns = min(2 * COLUMNS, max(COLUMNS, GRID // len(few)))
        return [[picture for picture in shown if picture.label == label][:columns] for label in few]
    columns = min(strip, GRID) or max(COLUMNS, round(min(len(shown), GRID) ** 0.5))
    whole = max(columns, GRID // columns * columns)
    return [list(shown[start : start + columns]) for start in range(0, min(len(shown), whole), columns)]


_NO_CLASS = "no class"  # the null label
_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:#222;background:#fff}
h1{font-size:1.3em}section{display:inline-block;vertical-align:top;max-width:100%;margin-right:18px}
h2{font-size:1.05em;margin:1.2em 0 .3em;width:0;min-width:100%}
h2{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.row{display:flex;flex-wrap:wrap;gap:6px}figure{margin:0;width:144px}img{width:100%;display:block}
img.small{image-rendering:pixelated}figcaption{font-size:11px;color:#555;overflow-wrap:anywhere}
.other{color:#b00}table{border-collapse:collapse;font-size:12px}td{border:1px solid #ddd;padding:2px 8px;vertical-align:top}
details{margin:1em 0}
"""


def write_gallery(path: Path, shown: list[Shown], names: tuple[str, ...], sidecar: dict[str, Any]) -> None:
    """One self-contained page: pictures by class, sample number below each, and every setting they were made with.

    names: class names, or empty. A token that names another class than the label is marked.
    """

    def name(label: int) -> str:
        return (*names, _NO_CLASS)[label] if label <= len(names) > 0 else str(label)

    parts = []
    for label in sorted({picture.label for picture in shown}):
        numbered = label < len(names) and names[label] != str(label)
        heading = html.escape(f"{label}: {name(label)}" if numbered else name(label))
        parts.append(f'<section><h2 title="{heading}">{heading}</h2><div class="row">')
        parts += [_figure(picture, name) for picture in shown if picture.label == label]
        parts.append("</div></section>")
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for key, value in sidecar.items()
    )
    solver = f"{sidecar['mode'].upper()} {sidecar['solver']}, {sidecar['nfe']} evaluations"
    head = f"{sidecar['n']} samples, {solver}, guidance {sidecar['cfg_scale']}, seed {sidecar['seed']}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(head)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(head)}</h1><details><summary>all settings</summary><table>{rows}</table></details>"
        f"{''.join(parts)}</html>\n"
    )
    with replacing(path) as temporary:  # folder names, and so class names, need not be UTF-8
        temporary.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def _figure(picture: Shown, name: Callable[[int], str]) -> str:
    from PIL import Image

    small = picture.pixels.shape[0] < 144
    data = io.BytesIO()
    Image.fromarray(picture.pixels).save(data, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 90}))
    source = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"
    caption = f"{picture.number}"
    if picture.nearest is not None and picture.nearest != picture.label:
        mark = "" if name(picture.label) == _NO_CLASS else ' class="other"'
        caption += f" <span{mark}>token: {html.escape(name(picture.nearest))}</span>"
    style = ' class="small"' if small else ""
    return (
        f'<figure><img{style} src="{source}" alt="sample {picture.number}"><figcaption>{caption}</figcaption></figure>'
    )
