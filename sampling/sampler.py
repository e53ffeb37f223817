"""From sample numbers to States: noise, guided velocity, solver; with the class token fixed or the best of k."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.class_token import agreement
from models.guidance import Guidance, Meter, Velocity, network_velocity
from models.interpolant import Interpolant
from models.noise import NoiseSource
from models.samplers import Solver
from models.solvers import Progress
from models.state import State


class Drawn(NamedTuple):
    """N finished samples. evaluations, forwards: what each of them cost (see Meter)."""

    state: State
    evaluations: int
    forwards: int


@dataclass
class Sampler:
    """Everything but the sample's own number, label and token.

    network, guide: SiTs in eval mode on the device. dtype: of the networks' arithmetic. best_of: candidates for each
    sample, of which the one whose token agrees best with its label is kept; needs class_means (classes, D).
    """

    network: nn.Module
    interpolant: Interpolant
    solver: Solver = field(default_factory=Solver)
    guidance: Guidance = field(default_factory=Guidance)
    guide: nn.Module | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    best_of: int = 1
    class_means: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, index: Tensor, label: Tensor, token: Tensor | None = None, progress: Progress | None = None
    ) -> Drawn:
        """index, label: (N,) int64 on the device; index numbers the noise. token: (N, D) given class tokens, or None to
        generate them. progress: takes the finished fraction of the batch, all candidates together, after each step."""
        best = self._candidate(0, index, label, token, progress)
        for candidate in range(1, self.best_of):
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
        if token is not None:
            velocity = fixed_token(velocity, self.interpolant, token.double(), start.class_token.double())
        end = self.solver(velocity, start, self.interpolant, noise, after_step)
        if token is not None:
            end = State(end.latent, token.double())
        return Drawn(end, meter.evaluations, meter.forwards)


def _choose(first: Tensor, a: State, b: State) -> State:
    """Of N samples those of `a` where `first` (N,) bool says so, elsewhere those of `b`."""
    return a.map(lambda x, y: torch.where(first.view(-1, *[1] * (x.ndim - 1)), x, y), b)


def fixed_token(velocity: Velocity, interpolant: Interpolant, token: Tensor, noise: Tensor) -> Velocity:
    """The velocity under a given class token: at every t the network sees alpha(t) token + sigma(t) noise, whatever the
    solver's own token is, so that the latent alone is generated. token, noise: (N, D) float64."""

    def fixed(state: State, t: Tensor) -> State:
        seen = State(state.latent, interpolant.interpolate(token, noise, t))
        return State(velocity(seen, t).latent, interpolant.velocity(token, noise, t))

    return fixed
