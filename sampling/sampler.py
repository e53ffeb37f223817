"""From sample numbers to States: noise, guided velocity, solver; with the class token fixed or the best of k."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.class_token import agreement
from models.guidance import Guidance, Meter, Velocity, network_velocity
from models.interpolant import Interpolant
from models.noise import NoiseSource
from models.samplers import Solver
from models.solvers import Diffusion, Progress
from models.state import State
from sampling.settings import SampleConfig


def solver_of(s: SampleConfig) -> Solver:
    """The solver that resolved settings describe. Raises UserError for one that does not exist."""
    diffusion = Diffusion(s.diffusion, s.diffusion_scale)
    return Solver(s.mode, s.solver, s.num_steps, s.time_grid, s.shift, s.t_last, diffusion, s.last_step, s.rtol, s.atol)


def guidance_of(s: SampleConfig) -> Guidance:
    """The guidance that resolved settings describe. Raises UserError for an interval outside [0, 1]."""
    assert s.cfg_scale is not None
    latent, token = (s.guidance_low, s.guidance_high), (s.cls_guidance_low, s.cls_guidance_high)
    return Guidance(s.cfg_scale, s.cls_cfg_scale, *latent, *token)


class Drawn(NamedTuple):
    """N finished samples, and what each of them cost (see Meter)."""

    state: State
    evaluations: int
    forwards: int


@dataclass
class Sampler:
    """Everything that samples share: all but their numbers, labels and given tokens.

    Args:
        network: a SiT in eval mode on the device.
        interpolant: of the network.
        solver: at its settings.
        guidance: at its settings.
        guide: for autoguidance, a weaker SiT in the place of the null label.
        dtype: of the networks' arithmetic.
        seed: of the noise.
        best_of: candidates for each sample, of which the one whose class token agrees best with its label is kept.
        class_means: (classes, D) mean class tokens, which best_of > 1 needs.
    """

    network: nn.Module
    interpolant: Interpolant
    solver: Solver
    guidance: Guidance
    guide: nn.Module | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    best_of: int = 1
    class_means: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, index: Tensor, label: Tensor, token: Tensor | None = None, progress: Progress | None = None
    ) -> Drawn:
        """Draw N samples.

        Args:
            index: (N,) int64 on the device, the numbers of the noise.
            label: (N,) int64 on the device.
            token: (N, D) given class tokens; None: they are generated.
            progress: takes the finished fraction of the batch, all candidates together, after each step.
        """
        best = self._candidate(0, index, label, token, progress)
        for candidate in range(1, self.best_of):
            assert self.class_means is not None
            other = self._candidate(candidate, index, label, token, progress)
            scores = [agreement(drawn.state.class_token, label, self.class_means) for drawn in (best, other)]
            state = _choose(scores[1] > scores[0], other.state, best.state)
            best = Drawn(state, best.evaluations + other.evaluations, best.forwards + other.forwards)
        return best

    def _candidate(
        self, number: int, index: Tensor, label: Tensor, token: Tensor | None, progress: Progress | None
    ) -> Drawn:
        def after_step(fraction: float) -> None:
            if progress:
                progress((number + fraction) / self.best_of)

        noise = NoiseSource(self.network.config, self.seed, index, self.solver.num_steps, number)
        start, meter = noise.start(), Meter()
        velocity = network_velocity(self.network, label, self.guidance, guide=self.guide, dtype=self.dtype, meter=meter)
        if token is not None and start.class_token is not None:
            velocity = fixed_token(velocity, self.interpolant, token.double(), start.class_token.double())
        end = self.solver(velocity, start, self.interpolant, noise, after_step)
        if token is not None:
            end = State(end.latent, token.double())
        return Drawn(end, meter.evaluations, meter.forwards)


def _choose(first: Tensor, a: State, b: State) -> State:
    """Of N samples those of `a` where `first` (N,) bool says so, elsewhere those of `b`."""
    return a.map(lambda x, y: torch.where(first.view(-1, *[1] * (x.ndim - 1)), x, y), b)


def fixed_token(velocity: Velocity, interpolant: Interpolant, token: Tensor, noise: Tensor) -> Velocity:
    """The velocity of the latent under a given class token.

    At every t the network sees alpha(t) token + sigma(t) noise, whatever the solver's own token is, so that the latent alone
    is generated. token, noise: (N, D) float64.
    """

    def fixed(state: State, t: Tensor) -> State:
        seen = State(state.latent, interpolant.interpolate(token, noise, t))
        return State(velocity(seen, t).latent, interpolant.velocity(token, noise, t))

    return fixed
