"""Layer norm modulated by the conditioning (adaLN), after a gated branch was added to the residual stream (adaLN-Zero)."""

from collections.abc import Callable

from torch import Tensor, nn


class AdaptiveNorm(nn.LayerNorm):
    """Add a branch through its gate, normalise, shift and scale. It has no parameters: the conditioning gives them.

    `kernel` computes the same with a faster backward pass; models/acceleration.py sets it where it is asked for.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, elementwise_affine=False, eps=1e-6)
        self.kernel: Callable[..., tuple[Tensor, Tensor]] | None = None

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor | None = None,
        branch: Tensor | None = None,
        parts: tuple[Tensor | None, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """The sum x + gate * branch, and that normalised and modulated; both (N, T, D).

        Args:
            x: (N, T, D), the residual stream.
            shift: (N, 1, D), like scale and gate.
            scale: less 1.
            gate: of the branch.
            branch: (N, T, D); nothing is added without it.
            parts: of x, if it is another x + gate * branch: the kernel keeps them for the backward pass, and not their sum.
        """
        if self.kernel is not None:
            return self.kernel(x, shift, scale, gate, branch, parts, self.eps)
        if gate is not None and branch is not None:
            x = x + gate * branch
        return x, super().forward(x) * (1 + scale) + shift
