"""Sampling by the published code and by ours: same weights, same noise, same machine, in turn in one process.

    python -m benchmarks.sample --published PATH --model SiT-XL/2 --batch-size 64 --steps 50 --compile

Measures the sampler alone (networks, guidance, solver, noise), without VAE and files: images per second, peak memory, and
how far the latents of each variant, as it runs, are from the published sampler's in plain float32 (TF32 off) under the
same noise. The published sampler runs as its generate.py calls it, in float32 with TF32 and attention that is not fused,
and once with fused attention, its best case.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from common.presets import GUIDANCE_HIGH, GUIDANCE_SCALE
from common.reporting import run
from config import parse, setting


@dataclass(frozen=True)
class SampleBenchmark:
    published: Path | None = setting(None, "clone of the published code at 021ea2e to run beside ours", group="what")
    model: str = setting("SiT-B/2", "SiT-{S,B,L,XL}/{2,4,8}", group="what")
    depth: int | None = setting(None, "blocks; default: the model's", group="what")
    input_size: int = setting(32, "side of the latent", group="what")
    batch_size: int = setting(64, "samples at once", group="what")
    steps: int = setting(
        50, "steps of the SDE that are run; the result is extrapolated to --full-steps", group="what", at_least=3
    )
    full_steps: int = setting(250, "steps of the published evaluation", group="what")
    cfg_scale: float = setting(GUIDANCE_SCALE, "guidance scale, of latent and class token", group="what")
    guidance_high: float = setting(GUIDANCE_HIGH, "guide up to this t", group="what")
    dtypes: tuple[str, ...] = setting(("fp32", "bf16"), "arithmetic of our variants", group="how")
    compile: bool = setting(False, "also measure our variants compiled", group="how")
    rounds: int = setting(3, "timed runs of each variant", group="how")
    deviation: bool = setting(True, "compare latents under the same noise", group="how")
    device: str = setting("auto", "where it runs", group="how", choices=("auto", "cpu", "cuda"))
    clock: str = setting("wall", "cpu: time of this process alone, on a busy CPU", group="how", choices=("wall", "cpu"))
    label: str = setting("run", "names the result files", group="how")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(SampleBenchmark, (__doc__ or "").splitlines()[0], argv)
    from benchmarks import harness, published
    from models import acceleration

    commit = published.check(settings.published) if settings.published else None
    device = harness.pick_device(settings.device)
    harness.keep_memory()
    acceleration.allow_tf32(True)
    bench = Bench(settings, device)
    variants: dict[str, Callable[[], Any]] = {}
    if settings.published:
        variants["published"] = bench.theirs(fused=False)
        variants["published, fused attention"] = bench.theirs(fused=True)
    for dtype in settings.dtypes:
        variants[f"ours, {dtype}"] = bench.ours(dtype, compiled=False)
        if settings.compile:
            variants[f"ours, {dtype}, compiled"] = bench.ours(dtype, compiled=True)
    memory = {name: harness.peak_memory(function, device) for name, function in variants.items()}
    timings = harness.alternate(variants, rounds=settings.rounds, warmup=0, device=device, clock=settings.clock)
    noise = harness.alternate({"noise": bench.draw_noise}, rounds=5, device=device, clock=settings.clock)["noise"]

    def write(agreement: float | None, deviations: Mapping[str, tuple[float, float]]) -> Path:
        rows = []
        for name, seconds in timings.items():
            full = [settings.full_steps / settings.steps * s for s in seconds.values]
            peak = memory[name]
            rows.append(
                {
                    "model": settings.model,
                    "variant": name,
                    "batch": settings.batch_size,
                    "ms per step": harness.spread([1e3 * s / settings.steps for s in seconds.values]),
                    f"images/s at {settings.full_steps} steps": harness.spread([settings.batch_size / s for s in full]),
                    "times published": harness.ratio(timings["published"], seconds) if settings.published else None,
                    "max deviation": deviations.get(name, (None, None))[0],
                    "rms deviation": deviations.get(name, (None, None))[1],
                    "GiB above all weights": peak and peak.peak - peak.resident,
                }
            )
        described = {
            "latent": settings.input_size,
            "steps": settings.steps,
            "cfg scale": settings.cfg_scale,
            "guidance high": settings.guidance_high,
            "rounds": settings.rounds,
            "clock": settings.clock,
            "published commit": commit,
            "depth": settings.depth,
            "noise share per step": f"{noise.median / list(timings.values())[-1].median:.2%}",
            "max deviation of ours in plain float32": None if agreement is None else f"{agreement:.1e}",
        }
        details = {"noise ms per step": 1e3 * noise.median / settings.steps}
        return harness.write("sample", settings.label, described, rows, device=device, details=details)

    path = write(None, {})  # whatever ends the program leaves it
    print(harness.table(path), flush=True)
    if settings.deviation:
        print(harness.table(write(*bench.deviations(variants))))


class Bench:
    """The variants, all on the same weights, labels and noise. Each is a function that samples one batch of latents."""

    def __init__(self, settings: SampleBenchmark, device: str) -> None:
        import torch

        from benchmarks import harness, published
        from models.published import from_published, to_published
        from models.sit import SiT, preset

        self.settings, self.device = settings, device
        config = harness.sized(preset(settings.model, input_size=settings.input_size), depth=settings.depth)
        self.config = config
        torch.manual_seed(0)
        with torch.device(device):
            network = SiT(config)
        with torch.no_grad():  # the zero-initialised outputs would make every velocity 0
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.weights = network.state_dict()
        self.their_weights = to_published(self.weights)
        assert from_published(self.their_weights).keys() == self.weights.keys()
        self.index = torch.arange(settings.batch_size, device=device)
        self.label = self.index * 37 % config.num_classes
        self.modules: dict[str, Any] = (
            {name: published.module(settings.published, f"{name}.py") for name in ("models/sit", "samplers")}
            if settings.published
            else {}
        )

    def noise(self, rows: int | None = None) -> Any:
        from models.noise import NoiseSource

        return NoiseSource(self.config, 0, self.index[:rows], self.settings.steps)

    def draw_noise(self) -> None:
        """All the noise of one run."""
        noise = self.noise()
        noise.start()
        for step in range(self.settings.steps - 1):
            noise(step)

    def ours(self, dtype: str, *, compiled: bool) -> Callable[..., Any]:
        """What generate.py runs between the noise and the VAE."""
        import torch

        from models import acceleration
        from models.guidance import Guidance
        from models.interpolant import Interpolant
        from models.samplers import Solver
        from models.sit import SiT
        from sampling.loading import prepare
        from sampling.sampler import Sampler

        with torch.device(self.device):
            network = SiT(self.config)
        network.load_state_dict(self.weights)
        sampler = Sampler(
            prepare(network, dtype, compiled=compiled),
            Interpolant(),
            Solver("sde", "euler", self.settings.steps),
            Guidance(self.settings.cfg_scale, None, 0.0, self.settings.guidance_high),
            dtype=acceleration.DTYPES[dtype],
        )

        def sample(rows: int | None = None) -> Any:
            return sampler(self.index[:rows], self.label[:rows]).state.latent

        return sample

    def theirs(self, *, fused: bool) -> "Theirs":
        """The published sampler, with its own network and random numbers."""
        import torch

        from benchmarks import published

        with torch.device(self.device):
            network = self.modules["models/sit"].SiT(**published.network_arguments(self.config, fused=fused))
        network.load_state_dict(self.their_weights)
        return Theirs(self, network.eval())

    def run_published(self, network: Any, latents: Any, tokens: Any) -> Any:
        """Its latents, float64; it does not return the class token."""
        s = self.settings
        return self.modules["samplers"].euler_maruyama_sampler(
            network,
            latents,
            self.label[: len(latents)],
            num_steps=s.steps,
            cfg_scale=s.cfg_scale,
            guidance_low=0.0,
            guidance_high=s.guidance_high,
            path_type="linear",
            cls_latents=tokens,
            args=SimpleNamespace(cls_cfg_scale=s.cfg_scale),
        )

    def deviations(self, variants: Mapping[str, Any]) -> tuple[float, dict[str, tuple[float, float]]]:
        """The largest deviation of ours in plain float32, and variant => largest and root mean square deviation as it runs,
        of the latents of the first few samples, over the standard deviation of the reference: the published sampler in plain
        float32 (ours without a clone)."""
        import torch

        from models import acceleration

        rows = min(8, len(self.index))
        plain = self.ours("fp32", compiled=False)
        acceleration.allow_tf32(False)
        with torch.no_grad():
            exact = plain(rows)
            reference = self._with_our_noise(variants["published"].network, rows) if self.modules else exact

        def deviation(latents: Any) -> tuple[float, float]:
            difference = (latents[:rows] - reference) / reference.std()
            return difference.abs().max().item(), difference.square().mean().sqrt().item()

        acceleration.allow_tf32(True)
        found = {}
        for name, function in variants.items():
            if name.startswith("published"):
                found[name] = deviation(self._with_our_noise(function.network, rows))
            else:  # a compiled network would be compiled anew for another batch size
                found[name] = deviation(function(None if name.endswith("compiled") else rows))
        gc.collect()
        return deviation(exact)[0], found

    def _with_our_noise(self, network: Any, rows: int) -> Any:
        """The published sampler with its calls of randn_like answered from our noise source, for the first `rows`."""
        noise = self.noise(rows)
        parts = (part for step in range(self.settings.steps) for part in noise(step))

        class Torch(ModuleType):
            randn_like = staticmethod(lambda x: next(parts).to(x.dtype))

            def __getattr__(self, name: str) -> Any:
                import torch

                return getattr(torch, name)

        module = self.modules["samplers"]
        original, module.torch = module.torch, Torch("torch")
        try:
            start = noise.start()
            return self.run_published(network, start.latent, start.class_token)
        finally:
            module.torch = original


@dataclass(frozen=True)
class Theirs:
    """The published sampler; called, it samples one batch."""

    bench: Bench
    network: Any

    def __call__(self) -> Any:
        import torch

        c, n, device = self.bench.config, len(self.bench.index), self.bench.device
        latents = torch.randn(n, c.in_channels, c.input_size, c.input_size, device=device)
        return self.bench.run_published(self.network, latents, torch.randn(n, c.class_token_dim, device=device))


if __name__ == "__main__":
    run(main)
