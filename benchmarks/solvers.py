"""Quality against cost: the Frechet distance of each solver at equal numbers of evaluations, on a trained model.

    python -m benchmarks.solvers --checkpoint runs/quickstart/reg --reference runs/quickstart/images/train.npz \
        --features timm:runs/quickstart/networks/judge --label digits

Every setting starts from the same noise and labels. Measures each at the given budgets of evaluations (NFE) and the
published SDE with 250 steps, several seeds each, and names the cheapest setting whose mean distance is within 2 % of that
and stays so with more evaluations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.presets import GUIDANCE_HIGH, GUIDANCE_SCALE
from common.reporting import progress, run
from config import UserError, parse, setting

TOLERANCE = 1.02
DOPRI5 = (1e-1, 1e-2, 1e-3)  # tolerances; its evaluations are what they are


@dataclass(frozen=True)
class SolverBenchmark:
    checkpoint: Path = setting(
        help="model file, checkpoint or run folder (its newest), published .pt, or hub OWNER/NAME[/FILE]", group="what"
    )
    reference: tuple[Path, ...] = setting(
        help="real images: .npz files, image folders or packed datasets", group="what"
    )
    features: str = setting("inception", "feature space, as evaluate.py takes it", group="what")
    vae: str | None = setting(None, "where the model's VAE is; default: as at packing", group="what")
    solvers: tuple[str, ...] = setting(
        ("sde-euler", "sde-dpmpp", "ode-euler", "ode-heun", "ode-dpmpp", "ode-dopri5"),
        "MODE-SOLVER or MODE-SOLVER-GRID",
        group="what",
    )
    budgets: tuple[int, ...] = setting((6, 10, 16, 25, 50, 100), "evaluations per sample", group="what", at_least=1)
    baseline_steps: int = setting(250, "steps of the SDE that sets the mark", group="what")
    cfg_scale: float = setting(GUIDANCE_SCALE, "guidance scale, of latent and class token", group="what")
    guidance_high: float = setting(GUIDANCE_HIGH, "guide up to this t", group="what")
    num_samples: int = setting(1000, "samples per setting and seed, balanced labels", group="how", at_least=1)
    seeds: int = setting(2, "seeds of each setting", group="how", at_least=1)
    batch_size: int = setting(250, "samples at once", group="how", at_least=1)
    dtype: str = setting("fp32", "arithmetic", group="how", choices=("fp32", "bf16", "fp16"))
    device: str = setting("auto", "where it runs", group="how", choices=("auto", "cpu", "cuda"))
    label: str = setting("run", "names the result files", group="how")


class Measured(NamedTuple):
    """A solver's setting: evaluations and network passes per sample, and the Frechet distance of each seed."""

    name: str
    nfe: float
    forwards: float
    distances: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.distances) / len(self.distances)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(SolverBenchmark, (__doc__ or "").splitlines()[0], argv)
    import torch

    from benchmarks import harness

    device = harness.pick_device(settings.device)
    distance = distance_of(settings, torch.device(device))
    cases = [("sde-euler, published", solver_of("sde-euler", settings.baseline_steps))]
    for name in settings.solvers:
        if name.startswith("ode-dopri5"):
            cases += [(f"{name} {tolerance:g}", solver_of(name, 1, tolerance)) for tolerance in DOPRI5]
        else:
            cases += [(name, solver_of(name, steps_of(name, budget))) for budget in settings.budgets]
    with progress(len(cases) * settings.seeds, unit="set") as bar:
        measured = []
        for name, solver in cases:
            found = []
            for seed in range(settings.seeds):
                found.append(distance(solver, seed))
                bar.update()
            nfe, forwards = (sum(f[i] for f in found) / len(found) for i in (1, 2))
            measured.append(Measured(name, nfe, forwards, tuple(f[0] for f in found)))
    best = cheapest(measured)
    rows = [
        {
            "solver": m.name,
            "NFE": m.nfe,
            "network passes": m.forwards,
            "FD": harness.spread(m.distances),
            "over SDE-250": m.mean / measured[0].mean,
            "cheapest within 2 %": "yes" if m == best else "",
        }
        for m in measured
    ]
    path = harness.write(
        "solvers",
        settings.label,
        {
            "features": Path(settings.features).name,
            "samples": settings.num_samples,
            "seeds": settings.seeds,
            "cfg scale": settings.cfg_scale,
            "guidance high": settings.guidance_high,
            "dtype": settings.dtype,
        },
        rows,
        device=device,
    )
    plot(measured, path.with_suffix(".png"))
    print(harness.table(path))
    print(
        f"cheapest within {TOLERANCE - 1:.0%} of the published SDE: {best.name}, {best.nfe:g} evaluations, "
        f"FD {best.mean:.4g} against {measured[0].mean:.4g}"
    )


def cheapest(measured: Sequence[Measured]) -> Measured:
    """The setting with the fewest network passes whose mean distance is within TOLERANCE of the first one's, and stays so
    with more passes of the same solver: a coarse solver's error can undo what guidance does to the distance, by luck."""

    def holds(setting: Measured) -> bool:
        solver = [m for m in measured if m.name.split()[0] == setting.name.split()[0]]
        return all(m.mean <= TOLERANCE * measured[0].mean for m in solver if m.forwards >= setting.forwards)

    return min(filter(holds, measured), key=lambda m: (m.forwards, m.mean))


def steps_of(name: str, budget: int) -> int:
    """Steps that cost `budget` evaluations: Heun takes two per step but one in the last."""
    solver = name.split("-")[1]
    return (budget + 1) // 2 if solver == "heun" else budget


def solver_of(name: str, steps: int, tolerance: float = 1e-3) -> Any:
    """MODE-SOLVER[-GRID] => Solver. Raises UserError for a word that is not of this form."""
    from models.samplers import Solver

    words = name.split("-")
    if len(words) not in (2, 3):
        raise UserError(f"--solvers {name}: expected MODE-SOLVER or MODE-SOLVER-GRID, such as ode-heun")
    mode, solver, grid = [*words, "uniform"][:3]
    return Solver(mode, solver, steps, grid, 3.0 if grid == "shifted" else 1.0, rtol=tolerance, atol=tolerance)


def distance_of(settings: SolverBenchmark, device: Any) -> Callable[[Any, int], tuple[float, float, float]]:
    """A function (solver, seed) => Frechet distance, evaluations, network passes."""
    import torch

    from evaluations import features
    from evaluations.image_sets import open_images
    from evaluations.metrics import frechet_distance
    from evaluations.statistics import compute_statistics
    from models import acceleration
    from models.guidance import Guidance
    from models.interpolant import Interpolant
    from models.model_file import load_model
    from models.obtain import obtain
    from sampling.loading import load_decoder, prepare
    from sampling.sampler import Sampler

    model = load_model(obtain(settings.checkpoint), device)
    decoder = load_decoder(model, settings.vae, device)
    extractor = features.load(settings.features, device=device)
    network = prepare(model.network, settings.dtype)
    real = open_images(settings.reference)
    size = settings.batch_size

    def pooled(pixels: Any) -> Any:
        return extractor(pixels).pooled.cpu()

    reference = compute_statistics(
        torch.cat(
            [
                pooled(torch.from_numpy(real.read(i, min(i + size, len(real))).copy()).permute(0, 3, 1, 2))
                for i in range(0, len(real), size)
            ]
        )
    )

    def distance(solver: Any, seed: int) -> tuple[float, float, float]:
        sampler = Sampler(
            network,
            Interpolant(model.info.path),
            solver,
            Guidance(settings.cfg_scale, None, 0.0, settings.guidance_high),
            dtype=acceleration.DTYPES[settings.dtype],
            seed=seed,
        )
        found, evaluations, forwards = [], 0.0, 0.0
        for start in range(0, settings.num_samples, size):
            index = torch.arange(start, min(start + size, settings.num_samples), device=device)
            drawn = sampler(index, index % model.info.network.num_classes)
            found.append(pooled(decoder.decode(drawn.state.latent, settings.batch_size)))
            evaluations += drawn.evaluations * len(index) / settings.num_samples
            forwards += drawn.forwards * len(index) / settings.num_samples
        return frechet_distance(reference, compute_statistics(torch.cat(found))), evaluations, forwards

    return distance


def plot(measured: Sequence[Measured], path: Path) -> None:
    """FD against NFE, both axes logarithmic, one line for each solver; the published SDE as a horizontal line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    figure, axes = plt.subplots(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    mark = measured[0]
    axes.axhline(mark.mean, color="0.4", lw=1, label=f"SDE Euler, {mark.nfe:g} (published)")
    axes.axhspan(mark.mean / TOLERANCE, mark.mean * TOLERANCE, color="0.4", alpha=0.15, lw=0)
    for name in dict.fromkeys(m.name.split(" ")[0] for m in measured[1:]):
        line = [m for m in measured[1:] if m.name.split(" ")[0] == name]
        axes.plot(
            [m.nfe for m in line],
            [m.mean for m in line],
            "--o" if name.startswith("sde") else "-o",
            ms=3.5,
            lw=1.2,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the velocity per sample", ylabel="Frechet distance")
    axes.set_xticks(sorted({round(m.nfe) for m in measured if m.name.startswith("sde")}))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.grid(True, which="both", lw=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
