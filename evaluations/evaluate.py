"""Measure samples against a reference: `python -m evaluations.evaluate --reference R.npz --samples S.npz`.

FID, sFID, IS, precision and recall as the ADM evaluator computes them, and more on request; see docs/evaluation.md.
"""

if not __package__:  # run as a file
    __import__("script")  # starts it again as a module

from common.reporting import run
from config import parse
from evaluations.settings import EvaluateConfig

EXAMPLES = (
    "python evaluations/evaluate.py --reference VIRTUAL_imagenet256_labeled.npz --samples samples/reg-b2/samples.npz",
    "python evaluations/evaluate.py --reference images/ --samples samples/mine/samples.npz --features inception dinov2",
)


def main() -> None:
    settings = parse(EvaluateConfig, "Measure samples against a reference.", examples=EXAMPLES)
    from evaluations.measure import measure

    measure(settings)


if __name__ == "__main__":
    run(main, "use a smaller --batch-size")
