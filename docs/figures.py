"""Draw the pictures of the README: `python docs/figures.py [--sheet NPZ NAME ...]`, the method and, if given, sheets.

The sheets are of EuroSAT: `--sheet runs/study/eurosat/images/test.npz eurosat-real.png`, photographs that
`python -m study eurosat` holds out, and `--sheet samples/places/samples.npz eurosat-generated.png`, the samples of README's
first command.
"""

import argparse
from pathlib import Path

import numpy as np

IMAGES = Path(__file__).parent / "images"
INK, GREY = "#24292f", "#57606a"
BLUE, ORANGE, GREEN = "#1f6feb", "#d9730d", "#2da44e"  # of latents, of the class token, of the alignment
FILL = {BLUE: "#ddebff", ORANGE: "#ffe8d1", GREEN: "#dcf5e3", INK: "#eef1f4"}


def method(file: Path) -> None:
    """The training step as a diagram: from an image to the three losses."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    matplotlib.rcParams.update({"svg.hashsalt": "reg", "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    width, height = 92, 44
    figure = Figure(figsize=(width / 10, height / 10))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")

    def box(
        x: float, y: float, w: float, h: float, text: str, colour: str, size: float = 11, fill: str | None = None
    ) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x, y - h / 2),
                w,
                h,
                boxstyle="round,pad=0,rounding_size=0.9",
                lw=1.4,
                ec=colour,
                fc=fill or FILL[colour],
                zorder=2,
            )
        )
        axes.text(x + w / 2, y, text, ha="center", va="center", size=size, color=INK, zorder=3, linespacing=1.35)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
        axes.annotate(
            "",
            end,
            start,
            zorder=1,
            arrowprops={
                "arrowstyle": "-|>,head_width=0.3,head_length=0.6",
                "lw": 1.6,
                "color": colour,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )

    def note(x: float, y: float, text: str, colour: str = GREY, size: float = 9.5, **style: object) -> None:
        axes.text(x, y, text, size=size, color=colour, ha="center", va="center", linespacing=1.3, **style)

    corners = "round,pad=0,rounding_size=1.6"
    card = FancyBboxPatch((0.5, 0.5), width - 1, height - 1, boxstyle=corners, lw=1, ec="#d0d7de", fc="white")
    axes.add_patch(card)  # readable on light and dark pages
    upper, middle, lower = 33, 22, 11

    box(2, middle, 8, 7, "image", INK)
    box(13.5, upper, 10.5, 8, "VAE\n(frozen)", BLUE)
    box(13.5, lower, 10.5, 8, "DINOv2\n(frozen)", ORANGE)
    arrow((8.2, middle + 3.5), (13.5, upper - 1))
    arrow((8.2, middle - 3.5), (13.5, lower + 1))

    box(34, upper, 17, 8, r"$x_t = (1-t)\,x + t\,\epsilon_x$", BLUE)
    box(34, lower, 17, 8, r"$c_t = (1-t)\,c + t\,\epsilon_c$", ORANGE)
    arrow((24, upper), (34, upper), BLUE)
    arrow((24, lower), (34, lower), ORANGE)
    note(28.7, upper + 3.4, "latent $x$\n4 x 32 x 32", BLUE)
    note(28.7, lower - 3.4, "class token $c$\n768", ORANGE)
    note(42.5, middle, "noise on both\nat the same time $t$", size=10)
    arrow((42.5, middle + 2.6), (42.5, upper - 4))
    arrow((42.5, middle - 2.6), (42.5, lower + 4))

    box(56, middle, 12.5, 30, "", INK, fill="#f6f8fa")
    note(62.25, 40, "SiT", INK, 14, weight="bold")
    note(62.25, 34, "a sequence\nof 257 tokens")
    for y in (29.5, 25.4, 21.3):
        box(57.8, y, 8.9, 3.1, "patch", BLUE, 9.5)
    note(62.25, 17.4, "256 patches")
    box(57.8, lower, 8.9, 3.8, "class token", ORANGE, 9)
    note(62.25, 4.2, "embeddings of $t$ and label")
    arrow((51, upper), (56, upper), BLUE)
    arrow((51, lower), (56, lower), ORANGE)

    note(81.25, 40, "loss", INK, 14, weight="bold")
    box(73, upper, 16.5, 8, "velocity\n$\\epsilon_x - x$", BLUE)
    box(73, middle, 16.5, 8, "alignment with\nDINOv2's tokens", GREEN)
    box(73, lower, 16.5, 8, "velocity\n$\\epsilon_c - c$", ORANGE)
    for y, colour in ((upper, BLUE), (middle, GREEN), (lower, ORANGE)):
        arrow((68.5, y), (73, y), colour)
    note(81.25, (upper + middle) / 2, "+ 0.5", INK, 11)
    note(81.25, (middle + lower) / 2, "+ 0.03", INK, 11)

    figure.savefig(file, transparent=True, metadata={"Date": None})


def sheet(npz: Path, file: Path, rows: int = 2, gap: int = 3) -> None:
    """The first `rows` pictures of each class of an npz, unchosen: a class per column, transparent pixels between them."""
    from PIL import Image

    with np.load(npz) as stream:
        pixels, labels = stream["arr_0"], stream["arr_1"]
    side, classes = pixels.shape[1], np.unique(labels)
    drawn = Image.new("RGBA", (len(classes) * (side + gap) - gap, rows * (side + gap) - gap))
    for column, label in enumerate(classes):
        for row, picture in enumerate(pixels[labels == label][:rows]):
            drawn.paste(Image.fromarray(picture), (column * (side + gap), row * (side + gap)))
    drawn.save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sheet", nargs=2, action="append", default=[], metavar=("NPZ", "NAME"), help="images, picture"
    )
    sheets = parser.parse_args().sheet
    IMAGES.mkdir(exist_ok=True)
    method(IMAGES / "method.svg")
    for npz, name in sheets:
        sheet(Path(npz), IMAGES / name)


if __name__ == "__main__":
    main()
