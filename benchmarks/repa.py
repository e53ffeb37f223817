"""Our samplers beside those of REPA's code: same weights, labels and noise, networks in float32, states in float64.

    python -m benchmarks.repa --repa PATH

PATH is a clone of github.com/sihyun-yu/REPA. Its network and its Euler, Heun and Euler-Maruyama samplers run from the clone,
nothing of it is copied. Largest and root mean square difference of the latents, over the standard deviation of REPA's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.presets import GUIDANCE_HIGH, GUIDANCE_SCALE
from common.reporting import run
from config import MissingFile, parse, setting

if TYPE_CHECKING:
    from torch import Tensor

    from models.guidance import Guidance, Velocity
    from models.sit import SiT


@dataclass(frozen=True)
class RepaBenchmark:
    repa: Path = setting(help="clone of github.com/sihyun-yu/REPA", group="what")
    depth: int = setting(2, "blocks of the SiT-S/2", group="what", at_least=1)
    input_size: int = setting(8, "side of the latent", group="what", at_least=2)
    batch_size: int = setting(4, "samples", group="what", at_least=1)
    steps: int = setting(20, "steps of every sampler", group="what", at_least=3)
    label: str = setting("run", "names the result files", group="how")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(RepaBenchmark, (__doc__ or "").splitlines()[0], argv)
    from benchmarks import harness

    rows = compare(settings)
    known: dict[str, Any] = {
        "repa commit": harness.commit(settings.repa),
        "depth": settings.depth,
        "latent": settings.input_size,
    }
    known |= {"samples": settings.batch_size, "steps": settings.steps, "guidance": GUIDANCE_SCALE}
    path = harness.write("repa", settings.label, known, rows)
    print(harness.table(path))


def compare(settings: RepaBenchmark) -> list[dict[str, Any]]:
    """The deviations of every sampler, one row each.

    Raises:
        MissingFile: there is no clone.
    """
    import torch

    from benchmarks import harness, published
    from models.guidance import Guidance, network_velocity
    from models.interpolant import Interpolant
    from models.published import to_published
    from models.samplers import ode_times, sde_times
    from models.sit import SiT, preset
    from models.solvers import euler, euler_maruyama, heun
    from models.state import State

    for file in ("samplers.py", "models/sit.py"):
        if not (settings.repa / file).is_file():
            raise MissingFile(f"--repa {settings.repa}: no {file}; give a clone of github.com/sihyun-yu/REPA")
    size = {"input_size": settings.input_size, "class_token_dim": 0}
    config = harness.sized(preset("SiT-S/2", **size), depth=settings.depth)
    torch.manual_seed(0)
    network = SiT(config).eval().requires_grad_(False)
    for parameter in network.parameters():  # the zero-initialised outputs would make every velocity 0
        parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = _their_network(published.module(settings.repa, "models/sit.py"), network)
    theirs.load_state_dict(to_published(network.state_dict()))
    samplers = published.module(settings.repa, "samplers.py")

    n, steps = settings.batch_size, settings.steps
    start = torch.randn(n, config.in_channels, settings.input_size, settings.input_size)
    label = torch.arange(n) * 37 % config.num_classes
    torch.manual_seed(1)
    noise = [State(torch.randn_like(start.double()), None) for _ in range(steps)]
    rows = []

    def row(name: str, path: str, guidance: Guidance, recorded: "Tensor", ours: State) -> None:
        difference = (ours.latent - recorded) / recorded.std()
        off, interval = guidance.scale == 1, f"[{guidance.low:g}, {guidance.high:g}]"
        largest, rms = difference.abs().max().item(), difference.square().mean().sqrt().item()
        columns = {"sampler": name, "path": path, "guided on": "-" if off else interval}
        rows.append(columns | {"max deviation": largest, "rms deviation": rms})

    for guidance in (Guidance(), Guidance(GUIDANCE_SCALE), Guidance(GUIDANCE_SCALE, high=GUIDANCE_HIGH)):
        flags = {"cfg_scale": guidance.scale, "guidance_low": guidance.low, "guidance_high": guidance.high}
        velocity = network_velocity(network, label, guidance)
        for solver in (euler, heun):
            with torch.no_grad():
                recorded = samplers.euler_sampler(theirs, start, label, num_steps=steps, heun=solver is heun, **flags)
                row(
                    solver.__name__,
                    "linear",
                    guidance,
                    recorded,
                    solver(velocity, State(start, None), ode_times(steps)),
                )
        if not guidance.off:
            ours = heun(_by_steps(network, label, guidance, steps), State(start, None), ode_times(steps))
            row("heun, guided by each step's first t", "linear", guidance, recorded, ours)
        for path in ("linear", "cosine"):
            torch.manual_seed(1)
            recorded = samplers.euler_maruyama_sampler(theirs, start, label, num_steps=steps, path_type=path, **flags)
            interpolant, times = Interpolant(path), sde_times(steps)
            ours = euler_maruyama(velocity, State(start, None), times, interpolant, noise.__getitem__)
            row("sde euler", path, guidance, recorded, ours)
    return rows


def _their_network(module: Any, network: "SiT") -> Any:
    """REPA's network of the same sizes."""
    from benchmarks import published

    arguments = published.network_arguments(network.config)
    return module.SiT(**arguments, projector_dim=network.config.projector_dim).eval()


def _by_steps(network: "SiT", label: "Tensor", guidance: "Guidance", steps: int) -> "Velocity":
    """The velocity of Heun's method as REPA guides it: both evaluations of a step by the step's first time."""
    from models.guidance import Guidance, network_velocity

    always, never = (network_velocity(network, label, g) for g in (Guidance(guidance.scale), Guidance()))
    calls = iter(range(2 * steps))
    guided = False

    def velocity(state: Any, t: "Tensor") -> Any:
        nonlocal guided
        if next(calls) % 2 == 0:  # the first evaluation of a step
            guided = guidance.low <= t <= guidance.high
        return (always if guided else never)(state, t)

    return velocity


if __name__ == "__main__":
    run(main)
