"""Sample images from a model file: `python generate.py --checkpoint RUN --out DIR --preset preview`.

Sample i is a function of the settings, the seed and i: the same images on any number of processes, at any batch size and
after any interruption. Writes samples.npz, samples.json, grid.png and gallery.html; see docs/sampling.md.
"""

from collections.abc import Sequence

from common.reporting import run
from sampling.settings import read


def main(argv: Sequence[str] | None = None) -> None:
    settings = read(argv)
    from sampling.run import generate  # imports torch, which --help does not need

    generate(settings)


if __name__ == "__main__":
    run(main)
