"""Say what a packed dataset holds, and draw a sheet of its images, decoded from the latents that training will see.

python -m preprocessing.describe --data-dir data/imagenet256
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: start again as a module that finds ours
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    os.execv(sys.executable, [sys.executable, "-P", "-m", "preprocessing.describe", *sys.argv[1:]])

from common.reporting import run
from config import parse
from preprocessing.settings import DescribeConfig

EXAMPLES = (
    "python -m preprocessing.describe --data-dir data/imagenet256",
    "python -m preprocessing.describe --data-dir data/mine --images 100 --sheet sheet.png",
)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(DescribeConfig, "Describe a packed dataset.", argv, examples=EXAMPLES)
    from preprocessing.overview import describe

    describe(settings)


if __name__ == "__main__":
    run(main)
