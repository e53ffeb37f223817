"""`python -m study LEVEL`: train and judge what the raw results of a level lack. `python -m study report`: write the page.

The paper's ablation (REG, arXiv 2507.01467) on real images: the same network, data order, noise, steps and solver for all
rows, several seeds, a curve for each. See docs/reproduction.md.
"""

import sys

from common.reporting import run
from config import UserError, parse
from study.settings import LEVELS, RECIPES, ReportConfig, StudyConfig

EXAMPLES = ("python -m study digits --only unlabelled reg", "python -m study report")


def main() -> None:
    word, *rest = sys.argv[1:] or [""]
    if word == "report":
        page = parse(ReportConfig, "Write the page of the study from its raw results.", rest)
        from study.report import report

        return report(page)
    if word in LEVELS:
        rest = ["--config", str(RECIPES / f"{word}.yaml"), *rest]
    elif word.startswith("-"):
        rest = [word, *rest]
    else:
        raise UserError(f"{word!r} is not a level of the study: give {', '.join(LEVELS)}, or report")
    settings = parse(StudyConfig, __doc__ or "", rest, examples=EXAMPLES)
    from study.run import study

    study(settings)


if __name__ == "__main__":
    run(main)
