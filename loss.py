"""The joint objective of REG (section 3): velocity of the latent, velocity of the class token, alignment.

total = mean |v - v*|^2  +  beta * mean |v_c - v_c*|^2  +  lambda * mean -cos(projection, teacher token)

REG is arXiv 2507.01467, REPA is arXiv 2410.06940.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from config import UserError
from models import philox
from models.choices import WEIGHTINGS, check
from models.interpolant import Interpolant
from models.noise import Stream, as_state, latent_size
from models.sit import SiTConfig, SiTOutput
from models.state import State


class Draws(NamedTuple):
    """All randomness of one training step, a function of (seed, step, index in the global batch) alone.

    posterior: (N, C, H, W) standard normal, for the VAE posterior. noise: State of standard normals. time: (N,) in
    (0, 1) for weighting "uniform", standard normal for "lognormal". drop: (N,) in (0, 1), compared with the dropout
    probability.
    """

    posterior: Tensor
    noise: State
    time: Tensor
    drop: Tensor


class LossTerms(NamedTuple):
    """The three terms per sample, unweighted, float32; zeros where a term is off. t: the times they were taken at."""

    velocity: Tensor  # (N,)
    class_velocity: Tensor  # (N,)
    alignment: Tensor  # (N,) in [-1, 1]
    t: Tensor  # (N,)


class Noised(NamedTuple):
    """What the network sees and should predict. state: noisy latent and class token. t: (N,). label: (N,) int64, after label
    dropout. target: velocities."""

    state: State
    t: Tensor
    label: Tensor
    target: State


def normals_of_a_step(config: SiTConfig) -> int:
    """How many normal numbers `draw` makes for a sample: posterior, noise, log-normal t."""
    return 2 * latent_size(config) + config.class_token_dim + 1


def draw(
    seed: int, step: int | Tensor, index: Tensor, config: SiTConfig, weighting: str, blocks: Tensor | None = None
) -> Draws:
    """All random numbers of the samples at positions `index` of this step's global batch.

    They are the same for any number of processes and micro-batches, and after any resume.

    Args:
        seed: of the run.
        step: number of the optimiser step, or (1,) int64.
        index: (N,) int64.
        config: of the network, for the shapes.
        weighting: distribution of t; see `models.choices.WEIGHTINGS`.
        blocks: of `normals_of_a_step`, for a compiled caller; see `models.philox.normals`.
    """
    size = latent_size(config)
    z = philox.normal(seed, Stream.TRAINING_NORMALS, step, index, normals_of_a_step(config), blocks)
    posterior, noise, log_sigma = z.split([size, size + config.class_token_dim, 1], dim=1)
    u = philox.uniform(seed, Stream.TRAINING_UNIFORMS, step, index, 2, blocks).float()
    noise = as_state(noise, config)
    return Draws(
        posterior=posterior.reshape(noise.latent.shape),
        noise=noise,
        time=u[:, 0] if weighting == "uniform" else log_sigma[:, 0],
        drop=u[:, 1],
    )


@dataclass(frozen=True)
class Objective:
    """Turns a batch into loss terms (REG section 3). beta and lambda of the paper are `class_coeff` and `proj_coeff`."""

    interpolant: Interpolant = Interpolant("linear")
    weighting: str = "uniform"
    class_coeff: float = 0.03
    proj_coeff: float = 0.5
    cfg_prob: float = 0.1  # probability that a label is replaced by the null class
    align_class_token: bool = True  # or the patch tokens alone, beside a class token that is denoised

    def __post_init__(self) -> None:
        check("weighting", self.weighting, WEIGHTINGS)
        if not 0 <= self.cfg_prob <= 1:
            raise UserError(f"the label dropout probability (cfg-prob) must be in [0, 1], got {self.cfg_prob}")

    def times(self, draws: Draws) -> Tensor:
        """(N,) times in (0, 1): uniform, or the t at which sigma/alpha = exp(N(0, 1)) (log-normal, as published)."""
        if self.weighting == "uniform":
            return draws.time
        return self.interpolant.time_of_sigma_ratio(draws.time.exp())

    def __call__(
        self,
        network: Callable,
        clean: State,
        label: Tensor,
        teachers: Sequence[Tensor],
        draws: Draws,
        *,
        null_label: int,
    ) -> LossTerms:
        """The loss terms of one batch: SiT eq. 7 for latent and class token, and the alignment (REG section 3).

        Args:
            network: SiT, wrapped or not.
            clean: data latent (N, C, H, W), normalised, and class token (N, E) or None.
            label: (N,) int64.
            teachers: one (N, T, E_k) for each projector, class token first; without any there is no alignment.
            draws: the batch's random numbers.
            null_label: the config's num_classes, which takes the place of dropped labels.
        """
        noised = self.noised(clean, label, draws, null_label=null_label)
        seen = noised.state
        output = network(seen.latent, noised.t, noised.label, seen.class_token, project=len(teachers) > 0)
        return self.terms(output, noised, teachers)

    def noised(self, clean: State, label: Tensor, draws: Draws, *, null_label: int) -> Noised:
        """The part before the network: times, interpolation (SiT eq. 1 and 7), label dropout. Arguments as in `__call__`."""
        t = self.times(draws)
        x_t = clean.map(lambda x, noise: self.interpolant.interpolate(x, noise, t), draws.noise)
        target = clean.map(lambda x, noise: self.interpolant.velocity(x, noise, t), draws.noise)
        return Noised(x_t, t, torch.where(draws.drop < self.cfg_prob, null_label, label), target)

    def terms(self, output: SiTOutput, noised: Noised, teachers: Sequence[Tensor]) -> LossTerms:
        """The part after the network: the terms of its output. Arguments as in `__call__`."""
        projections: Sequence[Tensor] = output.projections
        if teachers and output.class_velocity is not None and not self.align_class_token:
            projections, teachers = ([tokens[:, 1:] for tokens in side] for side in (projections, teachers))
        error = State(output.velocity, output.class_velocity).map(_mean_square, noised.target)
        zero = torch.zeros_like(noised.t)
        return LossTerms(
            velocity=error.latent,
            class_velocity=zero if error.class_token is None else error.class_token,
            alignment=alignment(projections, teachers) if teachers else zero,
            t=noised.t,
        )

    def total(self, terms: LossTerms) -> Tensor:
        """The scalar to minimise (REG section 3): velocity + beta * class_velocity + lambda * alignment, averaged over the
        batch."""
        return (
            terms.velocity.mean()
            + self.class_coeff * terms.class_velocity.mean()
            + self.proj_coeff * terms.alignment.mean()
        )


def alignment(projections: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """REPA's alignment (REPA section 3) on class and patch tokens: mean over tokens and encoders of -cosine, in float32.

    projections, teachers: (N, T, E_k) for each encoder k => (N,). The normalisation runs in float32 whatever autocast
    does, because the square of a small half-precision token underflows to a zero norm.
    """
    cosines = [_cosine(p.float(), z.float()).mean(1) for p, z in zip(projections, teachers, strict=True)]  # (N,) each
    return -torch.stack(cosines).mean(0)


def _cosine(p: Tensor, z: Tensor) -> Tensor:
    """Cosine of (N, T, E) vectors => (N, T): reductions alone, so that no normalised copy of either is written."""
    return (p * z).sum(-1) / (_length(p) * _length(z))


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-12)  # as F.normalize


def _mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square().flatten(1).mean(1)  # (N,)
