"""Measure samples against a reference: `python -m evaluations.evaluate --reference R.npz --samples S.npz`.

FID, sFID, IS, precision and recall as the ADM evaluator computes them, and more on request; see docs/evaluation.md.
"""

if not __package__:  # run as a file
    __import__("script")  # starts it again as a module

from common.reporting import run, say
from config import parse
from evaluations.settings import EvaluateConfig

EXAMPLES = (
    "python evaluations/evaluate.py --reference VIRTUAL_imagenet256_labeled.npz --samples samples/reg-b2/samples.npz",
    "python evaluations/evaluate.py --reference images/ --samples samples/mine/samples.npz --features inception dinov2",
)


def main() -> None:
    settings = parse(EvaluateConfig, "Measure samples against a reference.", examples=EXAMPLES)
    from evaluations.measure import measure
    from evaluations.results import markdown

    results = measure(settings)
    if results is not None:  # rank 0
        for warning in results.warnings:
            say(f"warning: {warning}")
        say(markdown([results]).rstrip())


if __name__ == "__main__":
    run(main)
