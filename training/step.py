"""One optimiser step: draws -> joint loss -> gradients -> clip -> AdamW -> EMA, without device-to-host synchronisation.

Needs torch alone, so that benchmarks and tests drive it without a launcher.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataset import Batch, decode_moments
from loss import LossTerms, Noised, Objective, draw, normals_of_a_step
from models.acceleration import autocast, compile_region
from models.autoencoder import LatentNormalization, sample_posterior
from models.ema import EMA
from models.encoder import VisionEncoder
from models.philox import block_numbers
from models.sit import SiT, SiTConfig, SiTOutput
from models.state import State


class StepResult(NamedTuple):
    """On the device, detached.

    Attributes:
        terms: of all micro-batches of this rank.
        grad_norm: scalar, before clipping.
        gradient_norms: (parameters,) its parts; not finite where the gradient is not, and then nothing was updated.
    """

    terms: LossTerms
    grad_norm: Tensor
    gradient_norms: Tensor


class Targets(NamedTuple):
    """What the network is trained towards beside the velocity.

    Attributes:
        class_token: (N, E) float32, or None.
        teachers: one (N, T, E_k) for each aligned encoder, in the order of the network's tokens.
    """

    class_token: Tensor | None
    teachers: tuple[Tensor, ...]


class TrainStep:
    """Takes a network through one optimiser step of the joint objective (REG section 3).

    A step whose gradient is not finite leaves weights and optimiser as they were, decided on the device.
    """

    def __init__(
        self,
        network: SiT,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        normalization: LatentNormalization,
        *,
        seed: int = 0,
        wrapped: nn.Module | None = None,
        encoders: Sequence[VisionEncoder] = (),
        precision: str = "fp32",
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float = 1.0,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
        learning_rate: Callable[[int], float] | None = None,
        compiled: bool = False,
    ) -> None:
        """Keep the parts of a step.

        Args:
            network: the SiT itself.
            objective: of the loss.
            optimizer: fused AdamW over the network's parameters.
            ema: updated after each step.
            normalization: of the latents.
            seed: of all draws.
            wrapped: the network inside DDP, whose forward pass runs; default: the network.
            encoders: run on the batch's pixels; empty when the tokens are cached or not needed.
            precision: "fp32", "fp16" (give a GradScaler) or "bf16", by autocast over float32 weights.
            scaler: of the gradient, for fp16.
            max_grad_norm: clip to this norm.
            no_sync: context in which a backward pass does not exchange gradients.
            learning_rate: of each step; None: the optimiser's own.
            compiled: make one graph of what is before the network, and one of the loss behind it.
        """
        self.network, self.objective, self.optimizer, self.ema = network, objective, optimizer, ema
        self.wrapped = network if wrapped is None else wrapped
        self.normalization, self.seed, self.encoders = normalization, seed, tuple(encoders)
        self.precision, self.scaler = precision, scaler
        self.max_grad_norm, self.no_sync, self.learning_rate = max_grad_norm, no_sync, learning_rate
        self.device = next(network.parameters()).device
        self.parameters = list(network.parameters())
        self._number = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._blocks = block_numbers(normals_of_a_step(network.config), self.device)
        self._before, self._after = self._noised, self._scored
        if compiled:
            self._before, self._after = compile_region(self._noised), compile_region(self._scored)

    def __call__(self, step: int, batches: Sequence[tuple[Batch, Tensor]]) -> StepResult:
        """Take one step.

        Args:
            step: its number, from 0.
            batches: for each micro-batch the records and their positions (n,) int64 in the global batch, on the device.
        """
        self.begin(step)
        return self.take(step, batches)

    def begin(self, step: int) -> None:
        """Write the number and the learning rate of a step where `take` reads them."""
        self._number.fill_(step)  # a tensor, so that compiled code and CUDA graphs see its value
        if self.learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)

    def take(self, step: int | Tensor, batches: Sequence[tuple[Batch, Tensor]]) -> StepResult:
        """Take the step that has begun, on the device alone; arguments as in `__call__`, step also as (1,) int64."""
        parts = []
        for number, (batch, positions) in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else self.no_sync():
                terms, loss = self.loss(batch, positions, len(batches))
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            parts.append(LossTerms(*(term.detach() for term in terms)))
        norms = self.update(step)
        terms = parts[0] if len(parts) == 1 else LossTerms(*(torch.cat(term) for term in zip(*parts)))
        return StepResult(terms, torch.linalg.vector_norm(norms), norms)

    def loss(self, batch: Batch, positions: Tensor, parts: int = 1) -> tuple[LossTerms, Tensor]:
        """The loss terms of one of the `parts` micro-batches of a step, on the device, and what it adds to the total."""
        with torch.no_grad():
            tokens = self.tokens(batch)
            noised, teachers = self._before(batch.moments, batch.label, *tokens, positions, self._number, self._blocks)
        with autocast(self.device, self.precision):
            seen = noised.state
            output = self.wrapped(seen.latent, noised.t, noised.label, seen.class_token, project=len(teachers) > 0)
            return self._after(output, noised, teachers, parts)

    def _noised(
        self,
        moments: Tensor,
        label: Tensor,
        class_tokens: tuple[Tensor, ...],
        patch_tokens: tuple[Tensor, ...],
        positions: Tensor,
        number: Tensor,
        blocks: Tensor,
    ) -> tuple[Noised, tuple[Tensor, ...]]:
        """From a micro-batch, with the step's number (1,) int64, to the inputs and targets of the network."""
        config = self.network.config
        draws = draw(self.seed, number, positions, config, self.objective.weighting, blocks)
        latent = sample_posterior(decode_moments(moments), draws.posterior, self.normalization)
        targets = targets_of(config, class_tokens, patch_tokens)
        clean = State(latent, targets.class_token)
        return self.objective.noised(clean, label, draws, null_label=config.num_classes), targets.teachers

    def _scored(
        self, output: SiTOutput, noised: Noised, teachers: tuple[Tensor, ...], parts: int
    ) -> tuple[LossTerms, Tensor]:
        terms = self.objective.terms(output, noised, teachers)
        return terms, self.objective.total(terms) / parts

    def tokens(self, batch: Batch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Class tokens and patch tokens of each encoder, cached or computed from the pixels."""
        if not self.encoders:
            return batch.class_token, batch.patch_tokens
        assert batch.pixels is not None
        pixels = batch.pixels.permute(0, 3, 1, 2)  # (N, 3, H, W)
        with autocast(self.device, self.precision):
            found = [encoder(pixels) for encoder in self.encoders]
        return tuple(t.class_token for t in found), tuple(t.patch_tokens for t in found)

    def update(self, step: int | Tensor) -> Tensor:
        """Clip the gradient to max_grad_norm and take step `step` of optimiser and EMA; returns the norm of each gradient.

        The fused optimiser reads `found_inf` on the device and then leaves weights and moments alone.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters]
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = torch.linalg.vector_norm(norms)
        clipped_inside = self.scaler is None and self.device.type == "cuda"  # AdamW divides while it reads: a pass less
        if not clipped_inside:
            torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        if self.scaler is None:
            too_long = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) if clipped_inside else None
            self.optimizer.grad_scale, self.optimizer.found_inf = too_long, (~norm.isfinite()).float()
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.network, step)
        return norms


def targets_of(config: SiTConfig, class_tokens: tuple[Tensor, ...], patch_tokens: tuple[Tensor, ...]) -> Targets:
    """Targets from the tokens of each encoder; the class token is the first encoder's, raw."""
    class_token = class_tokens[0].float() if config.class_token_dim else None
    if not config.align_dims:
        return Targets(class_token, ())
    if class_token is None:  # REPA: patches alone
        return Targets(None, tuple(patch_tokens))
    teachers = [torch.cat([c.unsqueeze(1), p], dim=1) for c, p in zip(class_tokens, patch_tokens)]
    return Targets(class_token, tuple(teachers))
