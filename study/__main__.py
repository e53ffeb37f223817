"""`python -m study LEVEL`: train and judge what the raw results of a level lack. `python -m study report`: write the page.

The paper's ablation (REG, arXiv 2507.01467) on real images: the same network, data order, noise, steps and solver for all
rows, several seeds, a curve for each. See docs/reproduction.md.
"""

import sys
from pathlib import Path

from common.reporting import run
from config import UserError, parse
from study.settings import LEVELS, StudyConfig

RECIPES = Path(__file__).parents[1] / "recipes" / "study"


def main() -> None:
    word, *rest = sys.argv[1:] or [""]
    if word in LEVELS:
        rest = ["--config", str(RECIPES / f"{word}.yaml"), *rest]
    elif not word.startswith("-"):
        raise UserError(f"{word!r} is no level of the study: give {', '.join(LEVELS)}")
    settings = parse(StudyConfig, __doc__ or "", rest if word in LEVELS else sys.argv[1:])
    from study.run import study

    study(settings)


if __name__ == "__main__":
    run(main)
