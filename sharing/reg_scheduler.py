"""The samplers of REG, REPA and SiT as a scheduler of diffusers: reverse SDE and probability-flow ODE, with guidance."""

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.guidance import Guidance
from models.interpolant import Interpolant
from models.samplers import Solver
from models.solvers import Diffusion
from sampling.sampler import Sampler


class REGScheduler(SchedulerMixin, ConfigMixin):
    """Goes from noise to data in one call, latent and class token as one state; settings as generate.py's flags."""

    @register_to_config
    def __init__(
        self,
        path_type: str = "linear",
        mode: str = "sde",
        solver: str = "euler",
        time_grid: str = "uniform",
        shift: float = 1.0,
        t_last: float = 0.04,
        diffusion: str = "linear",
        diffusion_scale: float = 1.0,
        last_step: str = "drift",
        rtol: float = 1e-3,
        atol: float = 1e-3,
    ) -> None:
        self.solver(2)  # refuses what does not exist

    def solver(self, num_steps: int) -> Solver:
        """The solver at its settings and a number of steps."""
        c = self.config
        diffusion = Diffusion(c.diffusion, c.diffusion_scale)
        return Solver(
            c.mode, c.solver, num_steps, c.time_grid, c.shift, c.t_last, diffusion, c.last_step, c.rtol, c.atol
        )

    def sample(
        self,
        network: nn.Module,
        labels: Tensor,
        *,
        seed: int,
        num_steps: int,
        guidance_scale: float,
        class_guidance_scale: float | None,
        guidance_interval: tuple[float, float],
        dtype: torch.dtype = torch.float32,
        progress: Callable[[float], object] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sample i is a function of seed, i and label, that of `generate.py --seed`.

        Args:
            network: the SiT.
            labels: (N,) int64, on its device.
            seed: of the noise.
            num_steps: of the solver.
            guidance_scale, class_guidance_scale: of the latent and of the class token; None: the same.
            guidance_interval: of t, where guidance is on.
            dtype: of the network's arithmetic.
            progress: takes the finished fraction after each step.

        Returns:
            Latents (N, C, H, W) and class tokens (N, E) or None, float64.
        """
        guidance = Guidance(guidance_scale, class_guidance_scale, *guidance_interval)
        sampler = Sampler(
            network, Interpolant(self.config.path_type), self.solver(num_steps), guidance, dtype=dtype, seed=seed
        )
        state = sampler(torch.arange(len(labels), device=labels.device), labels, progress=progress).state
        return state.latent, state.class_token
