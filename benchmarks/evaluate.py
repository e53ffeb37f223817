"""Evaluation's arithmetic against the usual NumPy and SciPy one: statistics, Frechet distance, precision and recall.

    python -m benchmarks.evaluate --samples 50000 --reference 10000

Both sides must give the same numbers and use the threads that OMP_NUM_THREADS gives. (NumPy's float16 norms are summed
in another order than TensorFlow's, which ours follows: under the "adm" rule some 0.1 % of the images fall otherwise.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.reporting import run
from config import parse, setting


@dataclass(frozen=True)
class EvaluateBenchmark:
    samples: int = setting(50_000, "feature vectors of samples", group="what")
    reference: int = setting(10_000, "feature vectors of the reference, for precision and recall", group="what")
    dim: int = setting(2048, "features", group="what")
    baseline_limit: int = setting(
        50_000, "more samples than this are not given to NumPy's precision and recall", group="what"
    )
    rounds: int = setting(5, "timed calls of each; of precision and recall, which takes minutes, one", group="how")
    device: str = setting("cpu", "of our side: cpu or cuda", group="how", choices=("cpu", "cuda"))
    label: str = setting("run", "names the result files", group="how")


def main() -> None:
    settings = parse(EvaluateBenchmark, (__doc__ or "").splitlines()[0])
    import numpy as np
    import torch

    from benchmarks import harness
    from evaluations.metrics import frechet_distance
    from evaluations.neighbours import precision_recall
    from evaluations.statistics import compute_statistics

    reference, samples = features(settings)
    on_device = [part.to(settings.device) for part in (reference, samples)]
    found: dict[str, Any] = {}

    def keep(name: str, function: Callable[[], Any]) -> Callable[[], None]:
        return lambda: found.__setitem__(name, function())

    rows = []

    def row(
        name: str, baseline: Callable[[], Any], ours: Callable[[], Any], what: str, rounds: int = settings.rounds
    ) -> None:
        calls = {"baseline": keep("baseline", baseline), "ours": keep("ours", ours)}
        seconds = harness.alternate(calls, rounds=rounds, warmup=0, device=settings.device)
        deviation = float(
            np.max(np.abs(np.subtract(found["ours"], found["baseline"])) / np.abs(found["baseline"]).max())
        )
        rows.append(
            {
                "what": name,
                "baseline": what,
                "s baseline": seconds["baseline"],
                "s ours": seconds["ours"],
                "speedup": harness.ratio(seconds["baseline"], seconds["ours"]),
                "largest relative deviation": deviation,
            }
        )
        print(f"{name}: {rows[-1]['s baseline']} s -> {rows[-1]['s ours']} s, {rows[-1]['speedup']} times", flush=True)

    row(
        f"mean and covariance, {len(samples)} x {settings.dim}",
        lambda: numpy_statistics(samples.numpy())[1],
        lambda: compute_statistics(on_device[1]).covariance,
        "np.mean, np.cov",
    )
    stats = [compute_statistics(part) for part in on_device]
    row(
        f"Frechet distance, {settings.dim}",
        lambda: sqrtm_frechet(*stats),
        lambda: frechet_distance(*stats),
        "scipy.linalg.sqrtm",
    )
    row(
        f"statistics and distance, {len(samples)} x {settings.dim}",
        lambda: sqrtm_frechet(stats[0], numpy_statistics(samples.numpy())),
        lambda: frechet_distance(stats[0], compute_statistics(on_device[1])),
        "np.cov, scipy.linalg.sqrtm",
    )

    def measured(rule: str) -> tuple[float, float]:
        found = precision_recall(on_device[0], on_device[1], rule=rule)
        return found.precision, found.recall

    if len(samples) <= settings.baseline_limit:
        for rule, dtype in (("adm", np.float16), ("fp32", np.float32)):
            row(
                f"precision and recall, {rule}, {len(reference)} x {len(samples)}",
                partial(numpy_precision_recall, reference.numpy(), samples.numpy(), dtype),
                partial(measured, rule),
                f"NumPy, {dtype.__name__} distances",
                1,
            )
    path = harness.write(
        "evaluate",
        settings.label,
        {
            "samples": settings.samples,
            "reference": settings.reference,
            "dim": settings.dim,
            "rounds": settings.rounds,
            "threads": torch.get_num_threads(),
        },
        rows,
        device=settings.device,
    )
    print(harness.table(path))


def features(settings: EvaluateBenchmark) -> tuple[Any, Any]:
    """Two sets (N, D) float32 like Inception's: positive, a fast falling spectrum, means apart."""
    import torch

    generator = torch.Generator().manual_seed(0)
    spectrum = torch.exp(-torch.linspace(0, 5, settings.dim))[:, None]
    mix = torch.randn(settings.dim, settings.dim, generator=generator) * spectrum * (0.5 / settings.dim**0.5) * 3
    sets = []
    for count, scale, shift in ((settings.reference, 1.0, 0.4), (settings.samples, 0.95, 0.42)):
        noise = torch.randn(count, settings.dim, generator=generator)
        sets.append((scale * noise @ mix + shift).clamp_(min=0))
    return sets[0], sets[1]


def numpy_statistics(x: Any) -> tuple[Any, Any]:
    """(mean, covariance), as FID programs compute them."""
    import numpy as np

    return np.mean(x, axis=0), np.cov(x, rowvar=False)


def sqrtm_frechet(a: Any, b: Any) -> float:
    """The textbook formula; a, b end in (mean, covariance)."""
    import numpy as np
    import scipy.linalg

    (m1, c1), (m2, c2) = a[-2:], b[-2:]
    return float((m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2) - 2 * np.trace(scipy.linalg.sqrtm(c1 @ c2)).real)


def numpy_precision_recall(reference: Any, samples: Any, dtype: Any) -> tuple[float, float]:
    """Block by block as the ADM evaluator, k = 3; distances rounded to `dtype` after each step."""
    import numpy as np

    block = 10_000
    reference, samples = reference.astype(dtype), samples.astype(dtype)

    def distances(u: Any, v: Any) -> Any:
        wide_u, wide_v = u.astype(np.float32), v.astype(np.float32)  # NumPy has no float16 product worth the name
        product = (wide_u @ wide_v.T).astype(dtype)
        norm_u, norm_v = ((x * x).sum(1, dtype=np.float32).astype(dtype) for x in (u, v))
        return np.maximum((norm_u[:, None] - dtype(2) * product) + norm_v[None], dtype(0)).astype(np.float32)

    def radii(x: Any) -> Any:
        found = []
        for start in range(0, len(x), block):
            rows = [distances(x[start : start + block], x[other : other + block]) for other in range(0, len(x), block)]
            found.append(np.partition(np.concatenate(rows, axis=1), np.arange(4), axis=1)[:, 3])
        return np.concatenate(found)

    radii_reference, radii_samples = radii(reference), radii(samples)
    inside, covered = np.zeros(len(samples), dtype=bool), np.zeros(len(reference), dtype=bool)
    for i in range(0, len(reference), block):
        for j in range(0, len(samples), block):
            cross = distances(reference[i : i + block], samples[j : j + block])
            inside[j : j + block] |= (cross <= radii_reference[i : i + block, None]).any(0)
            covered[i : i + block] |= (cross <= radii_samples[None, j : j + block]).any(1)
    return float(inside.mean()), float(covered.mean())


if __name__ == "__main__":
    run(main)
