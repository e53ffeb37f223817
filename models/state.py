"""What diffuses: the image latent and, with representation entanglement, the class token beside it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class State:
    """Image latent (N, C, H, W) and class token (N, E); the token is None without the class-token slot (SiT, REPA).

    Used for data, noise, interpolated states and velocities alike. Arithmetic acts on both tensors; factors are numbers or
    scalar tensors. So every formula is written once, and a solver reads `state = state + dt * v`.
    """

    latent: Tensor
    class_token: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *others: "State") -> "State":
        """Apply `function` to the latents and to the class tokens of self and others; without a token it stays None."""
        latent = function(self.latent, *[o.latent for o in others])
        if self.class_token is None:
            return State(latent)
        return State(latent, function(self.class_token, *[o.class_token for o in others]))

    def scaled(self, scale: float, class_scale: float) -> "State":
        """Latent and class token times a factor of their own."""
        return State(scale * self.latent, None if self.class_token is None else class_scale * self.class_token)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.latent, self.class_token))

    def double(self) -> "State":
        """The same numbers in float64."""
        return self.map(lambda x: x.double())

    def __add__(self, other: "State") -> "State":
        return self.map(lambda a, b: a + b, other)

    def __sub__(self, other: "State") -> "State":
        return self.map(lambda a, b: a - b, other)

    def __mul__(self, factor: Tensor | float) -> "State":
        return self.map(lambda a: factor * a)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Tensor | float) -> "State":
        return self.map(lambda a: a / divisor)
