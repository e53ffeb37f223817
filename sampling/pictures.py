"""What a person looks at: the grid, the strip of an interpolation, and the gallery page."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Shown(NamedTuple):
    """One picture of the gallery. nearest: the class its token names, or None."""

    index: int
    pixels: np.ndarray  # (H, W, 3) uint8
    label: int
    nearest: int | None


def columns_of(count: int, group: int | None) -> int:
    """Columns of a grid of `count` pictures: `group` when that is a readable number, else about the square root."""
    if group is not None and 1 < group <= 20:
        return min(group, count)
    return max(1, round(count**0.5))


def write_grid(path: Path, pixels: np.ndarray, columns: int) -> None:
    """Write a PNG of the pictures (N, H, W, 3) uint8, row by row; small ones are enlarged to at least 32 pixels."""
    from PIL import Image

    n, height, width, _ = pixels.shape
    factor = -(-32 // width)
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width, gap = height * factor, width * factor, 2
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(sheet).save(temporary, format="PNG")
    temporary.rename(path)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """One picture (H, W, 3) uint8 as a PNG file, whole or not at all."""
    from PIL import Image

    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)
    temporary.rename(path)


_NO_CLASS = "no class"  # the null label
_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:#222;background:#fff}
h1{font-size:1.3em}h2{font-size:1.05em;margin:1.2em 0 .3em}
.row{display:flex;flex-wrap:wrap;gap:6px}figure{margin:0}img{width:112px;display:block}
img.small{image-rendering:pixelated}figcaption{font-size:11px;color:#555}
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
        parts.append(f"<h2>{html.escape(f'{label}: {name(label)}' if numbered else name(label))}</h2>")
        parts.append('<div class="row">')
        parts += [_figure(picture, name) for picture in shown if picture.label == label]
        parts.append("</div>")
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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page)
    temporary.rename(path)


def _figure(picture: Shown, name: Any) -> str:
    from PIL import Image

    small = picture.pixels.shape[0] < 112
    data = io.BytesIO()
    Image.fromarray(picture.pixels).save(data, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 90}))
    source = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"
    caption = f"{picture.index}"
    if picture.nearest is not None and picture.nearest != picture.label:
        mark = "" if name(picture.label) == _NO_CLASS else ' class="other"'
        caption += f" <span{mark}>token: {html.escape(name(picture.nearest))}</span>"
    style = ' class="small"' if small else ""
    return f'<figure><img{style} src="{source}" alt="sample {picture.index}"><figcaption>{caption}</figcaption></figure>'
