"""Sample images from a model file: `python generate.py --checkpoint RUN --out DIR --preset preview`.

Sample i is a function of the settings, the seed and i: the same images on any number of processes, at any batch size and
after any interruption. Writes samples.npz, samples.json, grid.png and gallery.html; see docs/sampling.md.
"""

from collections.abc import Sequence

from common.presets import PRESETS
from common.reporting import run
from config import parse
from sampling.settings import SampleConfig, check

EXAMPLES = (
    "python generate.py --checkpoint runs/reg-b2 --out samples/preview --preset preview",
    "torchrun --nproc_per_node=8 generate.py --checkpoint runs/reg-b2 --out samples/reg-b2 --preset paper",
)


def read(argv: Sequence[str] | None = None) -> SampleConfig:
    """The settings of a command line. Raises UserError where they contradict each other."""
    settings = parse(SampleConfig, "Sample images from a model file.", argv, examples=EXAMPLES, presets=PRESETS)
    check(settings)
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    settings = read(argv)
    from sampling.run import generate  # imports torch, which --help does not need

    generate(settings)


if __name__ == "__main__":
    run(main, "use a smaller --per-proc-batch-size or --vae-batch-size, or --vae-tiling")
